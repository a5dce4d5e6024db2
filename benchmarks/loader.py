"""The training loader against open_clip's pipeline, and reading tars against webdataset.

    python -m benchmarks.loader [--quick]

Images per CPU second through whole loaders with worker processes: CPU seconds of the main process
and all workers, from the start of the workers to the last batch. JPEGs of 500 x 375 and of
1,024 x 768 pixels (quality 90, 4:2:0) with 1/f texture, edges and grain, captions of 6 to 16 words.
Ours gives uint8, which the device normalises (the row says what that costs on this CPU);
open_clip's gives normalised float32.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from benchmarks import harness
from loaders.manifest import open_shards
from loaders.views import normalize

SHARDS, BATCH, WORKERS = 4, 64, 2
SCALES = {"open_clip's default": 0.9, "the paper's": 0.08}
TARGET = 3.0
PIXELS = {"500 x 375": (500, 375), "1,024 x 768": (1024, 768)}  # width and height
WORDS = [
    "a", "the", "of", "on", "with", "and", "photo", "view", "small", "large", "old", "red", "green",
    "white", "wooden", "boat", "lake", "sunset", "street", "city", "people", "walking", "dog",
    "park", "kitchen", "table", "fresh", "fruit", "market", "mountains", "behind", "night",
]  # fmt: skip


def picture(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG whose spectrum falls with frequency, with rectangles and grain."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
    planes = np.fft.irfft2(spectrum / frequency, s=(height, width))
    planes = 40 * planes / planes.std()
    planes = 128 + 0.8 * planes[:1] + 0.3 * planes  # channels go together
    for _ in range(12):
        left, top = rng.integers(width - 20), rng.integers(height - 20)
        part = planes[:, top : top + rng.integers(15, 160), left : left + rng.integers(15, 160)]
        part += rng.integers(-60, 61, (3, 1, 1))
    planes += rng.normal(0, 8, (1, height, width))
    file = io.BytesIO()
    pixels = np.clip(planes, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(pixels).save(file, "JPEG", quality=90, subsampling="4:2:0")
    return file.getvalue()


def make(folder: Path, samples: int, size: tuple[int, int]) -> float:
    """SHARDS tars of jpg, txt, json; returns mean kB of an image. Images repeat after 256."""
    rng = np.random.default_rng(0)
    pool = [picture(rng, *size) for _ in range(min(samples, 256))]
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, samples, SHARDS):
                caption = " ".join(rng.choice(WORDS, rng.integers(6, 17)))
                facts = {"caption": caption, "url": f"http://example.org/{i}.jpg", "width": 500}
                contents = {"jpg": pool[i % len(pool)], "txt": caption.encode()}
                for name, data in {**contents, "json": json.dumps(facts).encode()}.items():
                    info = tarfile.TarInfo(f"{shard * 10000 + i:09d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return statistics.mean(len(data) for data in pool) / 1000


def run(side: str, shards: str, samples: int, workers: int, scale: float) -> dict:
    """One loader in a process of its own; see `loader_sides`."""
    command = [sys.executable, "-m", "benchmarks.loader_sides", side, shards]
    command += [str(value) for value in (samples, BATCH, workers, scale)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(shards: str, samples: int, rounds: int, facts: dict, pixels: str) -> Iterator[dict]:
    """Rows against open_clip at both crop scales: median over rounds, sides in turns."""
    sides = ("open_clip", "ours")
    for name, scale in SCALES.items():
        found = {side: [] for side in sides}
        for number in range(rounds):
            for side in sides[number % 2 :] + sides[: number % 2]:
                found[side].append(run(side, shards, samples, WORKERS, scale))
        costs = {
            kind: {side: [r[kind] / r["samples"] for r in runs] for side, runs in found.items()}
            for kind in ("cpu", "wall")
        }
        rates = {
            side: round(1 / statistics.median(values)) for side, values in costs["cpu"].items()
        }
        yield harness.row(
            "images per CPU second, ours / open_clip",
            harness.ratio(costs["cpu"], "open_clip", "ours"), TARGET, at_most=False,
            pixels=pixels, crop=name, scale=[scale, 1.0], workers=WORKERS, rounds=rounds,
            images_per_cpu_second=rates,
            wall=round(harness.ratio(costs["wall"], "open_clip", "ours"), 2), **facts,
        )  # fmt: skip


def scaling(shards: str, samples: int, rounds: int) -> Iterator[dict]:
    """Images per second of the clock with 2 workers over 1."""
    rates = {workers: [] for workers in (1, WORKERS)}
    for _ in range(rounds):
        for workers, values in rates.items():
            done = run("ours", shards, samples, workers, 0.08)
            values.append(done["samples"] / done["wall"])
    ratio = statistics.median(b / a for a, b in zip(rates[1], rates[WORKERS], strict=True))
    medians = {f"workers_{n}": round(statistics.median(v)) for n, v in rates.items()}
    yield harness.row(
        f"images per second, {WORKERS} workers / 1", ratio, rounds=rounds,
        images_per_second=medians,
    )  # fmt: skip


def from_tar(shards: list[str], samples: int, rounds: int) -> Iterator[dict]:
    """Reading image, text and json (ours parsed) of every sample, one process, no image decoded."""
    opened = open_shards(shards)
    shuffled = np.random.default_rng(0).permutation(samples).tolist()

    def ours() -> None:
        for i in shuffled:
            assert opened.read_image(i)
            assert opened.read_text(i)
            assert opened.read_json(i)

    def peer() -> None:
        steps = [webdataset.SimpleShardList(shards), webdataset.tarfile_to_samples()]
        assert sum(len(s["jpg"]) > 0 for s in webdataset.DataPipeline(*steps)) == samples

    seconds = harness.paired({"ours": ours, "webdataset": peer}, rounds)
    rates = {side: round(samples / statistics.median(v)) for side, v in seconds.items()}
    yield harness.row(
        "samples per CPU second from tar, ours / webdataset",
        harness.ratio(seconds, "webdataset", "ours"), 5.0, at_most=False,
        samples_per_cpu_second=rates, webdataset=webdataset.__version__, rounds=rounds,
        order="ours shuffled, webdataset as stored",
    )  # fmt: skip


def rows(quick: bool) -> Iterator[dict]:
    """All rows."""
    samples, rounds = (256, 1) if quick else (1024, 3)
    torch.set_num_threads(1)
    batch = torch.zeros(BATCH, 1, 3, 224, 224, dtype=torch.uint8)
    seconds = harness.paired({"": lambda: normalize(batch, (0.5,) * 3, (0.5,) * 3)}, 5)
    packages = ("open_clip_torch", "webdataset")
    peer = ", ".join(f"{name}=={version(name)}" for name in packages)
    with tempfile.TemporaryDirectory() as place:
        for pixels, size in PIXELS.items():
            folder = Path(place) / pixels.replace(" ", "")
            folder.mkdir()
            facts = {
                "image_kb": round(make(folder, samples, size)), "batch": BATCH, "samples": samples,
                "peer": peer, "load_before": round(os.getloadavg()[0], 1),
                "normalising_ms_per_image": round(1000 * statistics.median(seconds[""]) / BATCH, 2),
            }  # fmt: skip
            paths = [str(folder / f"{shard:05d}.tar") for shard in range(SHARDS)]
            open_shards(paths)  # makes the index
            braces = str(folder / f"{{00000..{SHARDS - 1:05d}}}.tar")
            if pixels == next(iter(PIXELS)):
                yield from from_tar(paths, samples, 2 * rounds)
                yield from scaling(braces, samples, rounds)
            yield from compare(braces, samples, rounds, facts, pixels)


if __name__ == "__main__":
    harness.main("loader", rows)
