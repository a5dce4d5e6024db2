"""verify.py on realistic JPEGs against a plain loop over tarfile and Pillow.

The plain loop only opens the tar and decodes; verify.py also walks the headers by itself, builds
the index, parses json and captions, and hashes the tar, in one pass over the file.
"""

import io
import shutil
import statistics
import tarfile
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import harness
from data_prep.sets import set_folder
from data_prep.sets.shard_writer import permutation, write_shards
from data_prep.verify import Summary, verify
from loaders.tarreader import INDEX_FOLDER

SHARDS = 4
DISTINCT = 64


def jpeg(seed: int) -> bytes:
    """A picture of 340 x 256 pixels and 20 to 40 kB: smooth shapes with some grain."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(small).resize((340, 256), Image.Resampling.BICUBIC))
    grain = random.normal(0, random.uniform(6, 14), (256, 340, 1))
    file = io.BytesIO()
    Image.fromarray((image + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def make(out: Path, count: int) -> float:
    """A caption set of `count` images in `SHARDS` shards; returns the mean bytes of an image."""
    pictures = [jpeg(seed) for seed in range(DISTINCT)]
    size = count // SHARDS
    set_folder.begin(
        out,
        set_folder.Preparation(
            "benchmark", "benchmark", "image_text", "", "", "2026-01-01", SHARDS, size, count
        ),
    )
    write_shards(
        out,
        permutation(count, 0),
        lambda i: {
            "jpg": pictures[i % DISTINCT],
            "txt": f"a caption of some length, number {i}".encode(),
            "json": b'{"url": "https://example.org/a.jpg", "width": 340, "height": 256}',
        },
    )
    return sum(map(len, pictures)) / DISTINCT


def plain(out: Path) -> None:
    """What one would write by hand: every image of every tar opened and decoded."""
    for path in sorted((out / set_folder.SHARDS).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    Image.open(io.BytesIO(tar.extractfile(member).read())).load()


def ours(out: Path, workers: int) -> Summary:
    """A first run: nothing is known of the set."""
    shutil.rmtree(out / "verify", ignore_errors=True)
    shutil.rmtree(out / set_folder.SHARDS / INDEX_FOLDER, ignore_errors=True)
    return verify(out, workers=workers)


def rows(quick: bool = False) -> list[dict]:
    """Images per second of processor time at 1 and 2 workers, and that time over the plain loop's.

    Processor time, because it hardly depends on what else the machine does.
    """
    count, rounds = (40 * SHARDS, 1) if quick else (1000 * SHARDS, 5)
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "set"
        facts = {"images": count, "mean_bytes": round(make(out, count))}
        contenders = {"plain": partial(plain, out), "one": partial(ours, out, 1)}
        seconds = harness.paired(contenders, rounds)
        # Each worker counts its own; starting them (once for all shards) is left out.
        seconds["two"] = [ours(out, 2).core_seconds for _ in range(rounds)]
    rates = {name: count / statistics.median(values) for name, values in seconds.items()}
    return [
        harness.row("images_per_second_per_core_plain_loop", rates["plain"], **facts),
        harness.row("images_per_second_per_core_1_worker", rates["one"], **facts),
        harness.row("images_per_second_per_core_2_workers", rates["two"], **facts),
        harness.row(
            "time_over_plain_loop_1_worker", harness.ratio(seconds, "one", "plain"), 1.3, **facts
        ),
        harness.row(
            "time_over_plain_loop_2_workers", harness.ratio(seconds, "two", "plain"), 1.3, **facts
        ),
    ]


if __name__ == "__main__":
    harness.main("data_prep_verify", rows)
