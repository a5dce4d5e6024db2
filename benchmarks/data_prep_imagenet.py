"""Sharding ImageNet from its tar of tars, against unpacking it and packing shards with tarfile.

Both sides are processes of their own, start from the same made-up archive (1000 classes, random
bytes behind a JPEG start, since no side decodes) with its pages dropped from the cache, write the
same samples in the same order, and fsync every shard. The plain way does not flush its unpacked
files, nor remove them within the measured time.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np

from benchmarks import harness
from data_prep.sets.shard_writer import permutation

REPOSITORY = Path(__file__).resolve().parent.parent
SHARD = 2000
_PRINT_PEAK = "print(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')))"
MEAN_BYTES = 110_000  # ILSVRC2012_img_train.tar: 138 GB, 1.28 M images


def make_archive(path: Path, images: int, mean_bytes: int) -> None:
    """A tar of 1000 class tars in the official layout; sizes are log-normal."""
    table = json.loads((REPOSITORY / "prompts" / "imagenet1k.json").read_text())["classes"]
    random = np.random.default_rng(0)
    noise = random.bytes(4 << 20)
    spread = 0.5
    sizes = random.lognormal(np.log(mean_bytes) - spread**2 / 2, spread, images).astype(int)
    starts = random.integers(0, len(noise) // 2, images)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as outer:
        for label, entry in enumerate(table):
            buffer = BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as inner:
                for i in range(label, images, len(table)):
                    size = min(int(sizes[i]), len(noise) // 2)
                    data = b"\xff\xd8\xff" + noise[starts[i] : starts[i] + size]
                    _add(inner, f"{entry['synset']}_{i}.JPEG", data)
            _add(outer, f"{entry['synset']}.tar", buffer.getvalue())


def plain(archive: Path, out: Path) -> None:
    """Unpack the archive and its class archives, then pack shuffled shards: tarfile alone."""
    unpacked = out / "unpacked"
    with tarfile.open(archive) as outer:
        outer.extractall(unpacked, filter="fully_trusted")
    files = []
    for label, tar in enumerate(sorted(unpacked.glob("*.tar"))):
        with tarfile.open(tar) as inner:
            inner.extractall(tar.with_suffix(""), filter="fully_trusted")
        files += [(label, path) for path in sorted(tar.with_suffix("").iterdir())]
    order = permutation(len(files), 0)
    for shard in range(-(-len(files) // SHARD)):
        with (
            open(out / f"{shard:05d}.tar", "wb") as file,
            tarfile.open(fileobj=file, mode="w") as tar,
        ):
            for row, index in enumerate(order[shard * SHARD : (shard + 1) * SHARD]):
                label, path = files[index]
                key, synset = f"{shard:05d}{row:04d}", path.parent.name
                about = {
                    "label": label,
                    "synset": synset,
                    "source": f"train/{synset}/{path.name}",
                }
                tar.add(path, f"{key}.jpg")
                _add(tar, f"{key}.cls", b"%d" % label)
                _add(tar, f"{key}.json", json.dumps(about).encode())
            tar.close()
            file.flush()
            os.fsync(file.fileno())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, BytesIO(data))


def run(contender: str, archive: Path, images: int, out: Path) -> tuple[float, float]:
    """Seconds and peak MiB of a process that shards `archive` into `out`."""
    script = str(REPOSITORY / "data_prep" / "imagenet.py")
    size = ["--expected-images", str(images), "--samples-per-shard", str(SHARD)]
    code, arguments = {
        "ours": (
            "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
            [script, "--split", "train", "--tar", str(archive), "--out", str(out), *size],
        ),
        "plain": (
            "from benchmarks.data_prep_imagenet import plain; plain(*map(Path, sys.argv[1:]))",
            [str(archive), str(out)],
        ),
    }[contender]
    # The peak is asked for inside: wait4 also counts this process, from before the exec.
    code = f"import runpy, sys; from pathlib import Path; {code}; {_PRINT_PEAK}"
    os.sync()
    with open(archive, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if child.returncode:
        raise RuntimeError(f"{contender}: {child.stderr[-2000:]}")
    return seconds, int(child.stdout.rpartition("VmHWM:")[2].split()[0]) / 1024


def contents(folder: Path) -> str:
    """SHA-256 over the names and bytes of all members of the shards in a folder."""
    digest = sha256()
    for path in sorted(folder.glob("[0-9]*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                digest.update(member.name.encode() + b"\0")
                digest.update(sha256(tar.extractfile(member).read()).digest())
    return digest.hexdigest()


def rows(quick: bool = False) -> Iterator[dict]:
    """Ratio of wall times, and peak memory at n and at 4n images."""
    images, rounds = (3000, 1) if quick else (24_000, 3)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        archive = work / "train.tar"
        make_archive(archive, images, MEAN_BYTES)
        gigabytes = archive.stat().st_size / 1e9
        seconds: dict[str, list[float]] = {"ours": [], "plain": []}
        for number in range(rounds):
            found = {}
            for contender in ("ours", "plain") if number % 2 else ("plain", "ours"):
                out = work / contender
                out.mkdir()
                seconds[contender].append(run(contender, archive, images, out)[0])
                found[contender] = number or contents(next(out.rglob("00000.tar")).parent)
                shutil.rmtree(out)
            if found["ours"] != found["plain"]:
                raise RuntimeError("the two ways wrote different samples")
        facts = {"images": images, "gigabytes": round(gigabytes, 2), "rounds": rounds}
        facts |= {key: round(statistics.median(value), 2) for key, value in seconds.items()}
        value = statistics.median(
            a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True)
        )
        yield harness.row(
            "wall time, unpack and pack with tarfile / imagenet.py", value, 2, False, **facts
        )
        archive.unlink()
        peaks = {}
        for count in (images, 4 * images):
            make_archive(archive, count, 11_000)
            peaks[count] = run("ours", archive, count, work / "ours")[1]
            shutil.rmtree(work / "ours")
            archive.unlink()
            yield harness.row("peak MiB, imagenet.py", peaks[count], images=count)
        yield harness.row(
            "peak memory, imagenet.py, 4n / n images", peaks[4 * images] / peaks[images], 1.1
        )


if __name__ == "__main__":
    harness.main("data_prep_imagenet", rows)
