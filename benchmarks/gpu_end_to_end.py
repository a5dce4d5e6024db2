"""JPEGs to updates on one GPU: `train.py` on shards of 500 x 375 pictures, 16 loader workers.

    python -m benchmarks.gpu_end_to_end [--budget SECONDS] [--only SECTION]

The command that users type, in a process of its own: Swin-T at 224 pixels and the text transformer
of 12 layers and width 512, UniCL on captions, recipe `clip` (crops of at least 0.9 of a picture)
and `paper` (at least 0.08), bfloat16 under ZeRO-1. The pictures and captions are those of
`benchmarks.loader`: 256 synthetic JPEGs (quality 90) under many names, so the tars lie in the
page cache and the disk plays no part. Speed and the time that a step waited for its data are what
the run logs, over its last steps. Section `small` has ResNet-18 at 64 pixels, whose steps take so
little that the loader is what limits. Section `quickstart` is the quickstart's own configuration
with its data, 512 samples a step in one piece and in four, whose texts change shape at every step.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks import gpu, harness
from benchmarks.gpu import Job, Row
from benchmarks.loader import make
from loaders.manifest import write_manifest

PIXELS, SAMPLES = (500, 375), 16384
STEPS, STEADY = 40, 20  # steps of a run, and how many of the last ones are looked at
WORKERS = 16
WAITING = 0.05  # of a step's time at most
TOWERS = {
    "swin": {
        "image": {"name": "swin_tiny", "size": 224},
        "text": {"width": 512, "layers": 12, "heads": 8}, "embed_dim": 512,
    },
    "small": {
        "image": {"name": "resnet18", "size": 64},
        "text": {"width": 128, "layers": 2, "heads": 2}, "embed_dim": 128,
    },
}  # fmt: skip
# Samples per second of 512 in so many pieces, at least.
QUICKSTART = {1: 11_100, 4: 2_560}
CROPS = {"clip": "at least 0.9", "paper": "at least 0.08"}


def make_data(folder: Path, samples: int, pixels: tuple[int, int] = PIXELS) -> Path:
    """A captioned data set of `samples` pictures."""
    shards = folder / "shards"
    shards.mkdir(parents=True)
    make(shards, samples, pixels)
    write_manifest(folder, "pictures", "image_text", [], source="synthetic", license="none",
                   date="2026-01-01", attempted=samples)  # fmt: skip
    return folder


def train(
    folder: Path,
    data: Path,
    model: dict[str, Any],
    batch: int,
    pieces: int,
    recipe: str,
    workers: int,
    steps: int,
    cuda: bool = True,
) -> dict[str, float]:
    """The last line that `train.py` logs: mean speed and waiting over the steps before it.

    Args:
        cuda: on the device; on the CPU only the logic is tried, in float32.
    """  # fmt: skip
    config = {
        "name": "end_to_end", "output_dir": str(folder / "run"), "model": model,
        "deepspeed": f"ds_configs/zero1_{'bf16' if cuda else 'fp32'}.json",
        "loss": {"name": "unicl"},
        "data": {"image_text": str(data), "augmentation": recipe, "workers": workers},
        "train": {"global_batch": batch, "steps": steps, "accumulation": pieces},
        "optim": {"lr": 1e-4, "warmup_steps": steps // 4},
        # The log looks back over its own window alone, so the first steps are not in it.
        "log": {"every_steps": min(STEADY, steps // 2), "save_every_steps": 10**6},
    }  # fmt: skip
    path = folder / "end_to_end.yaml"
    path.write_text(yaml.safe_dump(config))
    return logged(folder / "run", path, cuda=cuda)


def logged(folder: Path, config: Path, *overrides: str, cuda: bool = True) -> dict[str, float]:
    """The last line that `train.py` logs of a configuration whose output folder is `folder`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if not cuda:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "train.py", "--config", str(config), *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"train.py failed:\n{(done.stdout + done.stderr)[-3000:]}")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])


def quickstart(pieces: int, workers: int, steps: int, cuda: bool = True) -> Iterator[Row]:
    """Samples per second of the quickstart's towers on its data, 512 samples in so many pieces."""
    with tempfile.TemporaryDirectory() as folder:
        seen = logged(
            Path(folder) / "run", Path("configs/quickstart_unicl.yaml"),
            f"output_dir={folder}/run", "train.samples=null", f"train.steps={steps}",
            "train.global_batch=512", f"train.accumulation={pieces}", f"data.workers={workers}",
            f"log.every_steps={steps // 3}", "log.save_every_steps=1000000",
            f"deepspeed=ds_configs/zero1_{'bf16' if cuda else 'fp32'}.json", cuda=cuda,
        )  # fmt: skip
    facts = {"data_seconds_per_step": round(seen["data_seconds"], 4), "workers": workers}
    yield harness.row("quickstart, samples per second", seen["samples_per_second"],
                      QUICKSTART[pieces], at_most=False, **facts)  # fmt: skip


def rows(data: Path, model: dict[str, Any], *arguments, **options) -> Iterator[Row]:
    """Samples per second, and the share of a step's time spent waiting for data."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        seen = train(Path(folder), data, model, *arguments, **options)
    facts = {"command_seconds": round(time.monotonic() - start, 1), "workers": arguments[3]}
    facts["data_seconds_per_step"] = round(seen["data_seconds"], 4)
    yield harness.row("end to end, samples per second", seen["samples_per_second"], **facts)
    step = arguments[0] / seen["samples_per_second"]
    yield harness.row("waiting for data, share of a step", seen["data_seconds"] / step, WAITING)


def sections(
    data: Path, towers=TOWERS, batches=((1024, 1), (4096, 8)), workers=WORKERS, steps=STEPS,
    cuda=True, samples=SAMPLES, pixels=PIXELS,
) -> gpu.Sections:  # fmt: skip
    """`swin`, `quickstart` and `small`; pictures are made when the first that needs them begins."""

    def own() -> Iterator[Job]:
        for pieces in QUICKSTART:
            run = lambda p=pieces: quickstart(p, workers, 3 * steps, cuda)  # noqa: E731
            yield Job("quickstart", run, 40, {"B": 512, "micro_batches": pieces})

    def jobs(name: str) -> Iterator[Job]:
        if not data.exists():
            make_data(data, samples, pixels)
        cases = [(batch, pieces, "clip") for batch, pieces in batches]
        cases.insert(1, (*batches[0], "paper"))
        for batch, pieces, recipe in cases:
            # The whole batch is kept small enough for one run of steps.
            count = steps if pieces == 1 else max(4, steps // 4)
            facts = {"towers": name, "B": batch, "micro_batches": pieces, "crop": CROPS[recipe]}
            arguments = (data, towers[name], batch, pieces, recipe, workers, count)
            run = lambda a=arguments: rows(*a, cuda=cuda)  # noqa: E731
            yield Job("end to end", run, 60, facts)

    first, *rest = towers
    others = {name: lambda name=name: jobs(name) for name in rest}
    return {first: lambda: jobs(first), "quickstart": own, **others}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        gpu.main("gpu_end_to_end", sections(Path(place) / "pictures"))
