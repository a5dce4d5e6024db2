"""Real runs of `train.py` on a device, each in an interpreter of its own, and what they logged."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
PIECES = (1, 4)
STEPS = 10
# The quickstart's towers and data; every step is logged, and one checkpoint is written at the end.
SETTINGS = (
    "train.samples=null", f"train.steps={STEPS}", "train.global_batch=64", "data.workers=1",
    "log.every_steps=1", "log.save_every_steps=1000",
)  # fmt: skip
# Largest |loss - loss of the CPU in float32| / loss over ten steps, by the type of the weights. In
# float32 cuDNN's convolutions are TF32: 10 bits of a product's inputs, as torch sets it; bfloat16
# has 7, for weights as well.
BOUNDS = {"fp32": 0.01, "bf16": 0.05}


def start(
    folder: Path, *overrides: str, cuda: bool, hook: str = "", **environment: str
) -> subprocess.Popen:
    """`train.py` in the background, its output in FOLDER.out.

    Args:
        folder: of the run. overrides: `key=value` behind SETTINGS.
        cuda: on the device, or on the CPU of the same machine.
        hook: a function of `tests.gpu.hooks`, called first in the process.
    """
    script = ["-m", "tests.gpu.hooks", hook] if hook else ["train.py"]
    config = "configs/quickstart_unicl.yaml"
    command = [sys.executable, *script, "--config", config, "--output-dir", str(folder)]
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    if not cuda:
        variables |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".out").open("a") as file:
        return subprocess.Popen(
            [*command, *SETTINGS, *overrides], cwd=ROOT, env=variables, stdout=file,
            stderr=subprocess.STDOUT,
        )  # fmt: skip


def finish(process: subprocess.Popen, folder: Path, timeout: float = 200) -> str:
    """Wait for a run; what it printed. Raises AssertionError with that, if it failed."""
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = "no end"
    text = folder.with_suffix(".out").read_text()
    assert code == 0, f"{code}: {text[-3000:]}"
    return text


def losses(folder: Path) -> list[float]:
    """Of every step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def train(folder: Path, file: str, pieces: int, cuda: bool) -> list[float]:
    """Losses of a run with a file of ds_configs/ in so many micro-batches."""
    overrides = (f"deepspeed=ds_configs/{file}.json", f"train.accumulation={pieces}")
    finish(start(folder, *overrides, cuda=cuda), folder)
    return losses(folder)


def difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference; infinite if one is not finite or a step is missing."""
    if len(found) != len(expected) or not all(map(math.isfinite, found)):
        return math.inf
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
