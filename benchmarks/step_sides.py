"""The two training commands that `benchmarks.step` compares, watched from outside.

Ours is `torchrun train.py`, the peer `torchrun -m open_clip_train.main` of open_clip_torch 3.3.0
(through `step_peer`, because it refuses several CPU processes otherwise).
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

RANKS, WORKERS = 2, 1
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.98), 1e-6, 0.1
# A line of open_clip's log with --log-every-n-steps 1.
LOG_LINE = re.compile(r"Batch \(t\): ([\d.]+).*Contrastive_loss: ([\d.]+)")


@dataclass
class Task:
    """One training that both sides can do.

    Attributes:
        shards: folder with `{00000..}.tar` and `sizes.json`. model: `model:` section.
        weights: open_clip folder with the initial weights, those of `seed`.
        pieces: micro-batches of a rank, by exact gradient caching on both sides.
        fixed_view: the whole image instead of a random crop.
    """

    shards: Path
    model: dict
    weights: Path
    batch: int
    steps: int
    warmup: int
    rate: float
    seed: int
    pieces: int = 1
    fixed_view: bool = False


@dataclass
class Run:
    """What a command did."""

    losses: list[float]  # of every step
    steady: float  # samples per second over the last steps
    wall: float  # seconds from start to end
    cpu: float  # seconds per sample of all processes, after the first steps
    rank_mib: float  # largest resident set of a rank's process
    all_mib: float  # largest sum over all processes, shared pages once (PSS)


def ours(task: Task, folder: Path, steady: int) -> Run:
    """`train.py` under ZeRO-1; `steady`: steps at the end that the speed is taken from."""
    augmentation = "none" if task.fixed_view else "clip"
    config = {
        "name": "ours",
        "output_dir": str(folder),
        "seed": task.seed,
        "deepspeed": "ds_configs/zero1_fp32.json",
        "loss": {"name": "clip"},
        "model": task.model,
        "data": {"image_text": str(task.shards), "augmentation": augmentation, "workers": WORKERS},
        "train": {
            "global_batch": task.batch, "steps": task.steps, "accumulation": task.pieces,
        },
        "optim": {
            "lr": task.rate, "warmup_lr": 0.0, "min_lr": 0.0, "warmup_steps": task.warmup,
            "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY,
        },
        "log": {"every_steps": 1, "save_every_steps": 10**6},
    }  # fmt: skip
    folder.mkdir(parents=True)
    path = folder / "benchmark.yaml"
    path.write_text(yaml.safe_dump(config))
    log, command = folder / "metrics.jsonl", [*_torchrun(), "train.py", "--config", str(path)]
    facts = _watch(command, folder / "console.txt", task, lambda: _lines(log))
    records = [json.loads(line) for line in log.read_text().splitlines()]
    # The log looks back on 50 steps at most, fewer if there are fewer.
    assert len(records) == task.steps
    assert steady == min(50, task.steps - 1)
    losses = [record["loss"] for record in records]
    return Run(losses, records[-1]["samples_per_second"], **facts)


def open_clip(task: Task, folder: Path, steady: int) -> Run:
    """`open_clip_train.main` with DDP and its gathered loss; arguments as `ours`."""
    shards = sorted(task.shards.glob("*.tar"))
    view = ["scale=(1.0,1.0)"] if task.fixed_view else ["scale=(0.9,1.0)"]
    arguments = {
        "model": f"local-dir:{task.weights}",
        "train-data": f"{task.shards}/{{{shards[0].stem}..{shards[-1].stem}}}.tar",
        "dataset-type": "webdataset",
        "train-num-samples": task.batch * task.steps,
        "batch-size": task.batch // RANKS // task.pieces,
        "accum-freq": task.pieces,
        "epochs": 1,
        "warmup": task.warmup,
        "workers": WORKERS,
        "precision": "fp32",
        "lr": task.rate,
        "beta1": BETAS[0],
        "beta2": BETAS[1],
        "eps": EPS,
        "wd": WEIGHT_DECAY,
        "seed": task.seed,
        "log-every-n-steps": 1,
        "logs": folder.parent,
        "name": folder.name,
        "device": "cpu",
        "dist-backend": "gloo",
    }
    # The double dash: torchrun would take --logs for a short form of its own --logs-specs.
    command = [*_torchrun(), "-m", "--", "benchmarks.step_peer"]
    command += ["--local-loss", "--gather-with-grad"]
    for key, value in arguments.items():
        command += [f"--{key}", str(value)]
    command += ["--aug-cfg", *view]
    log, console = folder / "out.log", folder.with_suffix(".console.txt")
    facts = _watch(command, console, task, lambda: _lines(log, "Train Epoch"))
    found = LOG_LINE.findall(log.read_text())
    assert len(found) == task.steps, f"{len(found)} of {task.steps} steps in {folder}/out.log"
    seconds = [float(batch) for batch, _ in found[-steady:]]
    return Run([float(loss) for _, loss in found], task.batch * steady / sum(seconds), **facts)


def _torchrun() -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc_per_node={RANKS}"]


def _watch(
    command: list[str], console: Path, task: Task, steps_done: Callable[[], int]
) -> dict[str, float]:
    """Run a command to its end; `wall`, `cpu`, `rank_mib` and `all_mib` of `Run`."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    start = time.perf_counter()
    with console.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    peaks = {"rank_mib": 0.0, "all_mib": 0.0}
    marks: list[tuple[int, float]] = []  # steps done, CPU seconds so far
    while process.poll() is None:
        time.sleep(2.0)  # looking costs time itself
        cpu = _sample(process.pid, peaks)
        if (done := steps_done()) >= min(task.warmup, task.steps // 2):
            marks.append((done, cpu))
    wall = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{console.read_text()[-3000:]}")
    # Only while it trains: saving at the end, and processes that have gone, are left out.
    marks = [mark for mark in marks if mark[0] < task.steps]
    (first, before), (last, after) = marks[0], marks[-1]
    return {"wall": wall, "cpu": (after - before) / (last - first) / task.batch, **peaks}


def _sample(launcher: int, peaks: dict[str, float]) -> float:
    """CPU seconds of all processes so far; raises the peaks of ranks and of all together."""
    together = cpu = 0.0
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            with process.oneshot():
                times, parent = process.cpu_times(), process.ppid()
            status = Path(f"/proc/{process.pid}/status").read_text()
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except (OSError, psutil.NoSuchProcess):
            continue  # it has just ended
        cpu += times.user + times.system
        together += _kib(rollup, "Pss") / 1024
        if parent == launcher:
            peaks["rank_mib"] = max(peaks["rank_mib"], _kib(status, "VmHWM") / 1024)
    peaks["all_mib"] = max(peaks["all_mib"], together)
    return cpu


def _lines(path: Path, mark: str = "") -> int:
    """Lines of a log that hold `mark`."""
    return sum(mark in line for line in path.read_text().splitlines()) if path.exists() else 0


def _kib(text: str, key: str) -> int:
    """A figure of a /proc file in KiB, 0 for a process that is gone."""
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) if found else 0
