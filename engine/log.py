"""What a run says: console and log.txt for people, metrics.jsonl for everything else.

Console and log.txt have the same lines; one of a window is a short view of its record.
TensorBoard and wandb are mirrors of metrics.jsonl (engine/mirrors.py).
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from engine import dist
from engine.clock import duration
from engine.environment import now
from engine.mirrors import Mirrors
from loaders.printable import printable
from loaders.progress import Progress


class StepBar(Progress):
    """The steps of a run. Off a terminal a line stands only between two records that are long in
    coming, and holds no rate of its own."""

    @property
    def line(self) -> str:
        """As the beginning of a record's line."""
        return _stamped(f"step {self.n}/{self.total}")


class RunLog:
    """The run folder's `log.txt` and `metrics.jsonl`, the console, and the mirrors of
    `log.report_to`; silent but on rank 0, and until `open`. Until `begin` it can only speak.

    Args:
        folder: the run folder. steps: of the run. cfg: of the run.
    """

    def __init__(self, folder: Path, steps: int, cfg: DictConfig):
        self.active = False
        self.folder, self.steps, self.cfg = folder, steps, cfg
        self.metrics = folder / "metrics.jsonl"
        self.text = folder / "log.txt"
        self.mirrors: Mirrors | None = None
        self.bar: StepBar | None = None

    def open(self) -> None:
        """Lines may be written from here on; the folder is made if it is missing."""
        self.active = dist.rank() == 0
        if self.active:
            self.folder.mkdir(parents=True, exist_ok=True)

    def begin(self, step: int) -> None:
        """Records come from here on.

        Args:
            step: steps done before this start; later lines of an earlier attempt are cut from
                metrics.jsonl, so that every step stands there once.
        """
        if self.active:
            self.mirrors = Mirrors(self.cfg, self.folder, step, self.say)
            keep_until(self.metrics, step)
            self.bar = StepBar(
                desc="training", unit="step", total=self.steps, initial=step, leave=False,
                file=sys.stdout,
            )  # fmt: skip

    def say(self, line: str) -> None:
        """One line to the console and to log.txt."""
        if self.active:
            line = _stamped(printable(line))
            Progress.write(line, file=sys.stdout)
            sys.stdout.flush()
            self._append(line)
            if self.bar:
                self.bar.quiet()

    def note(self, line: str) -> None:
        """One line to log.txt alone: what stderr says anyway."""
        if self.active:
            self._append(_stamped(line))

    def _append(self, line: str) -> None:
        with self.text.open("a") as file:
            file.write(line + "\n")

    def advance(self) -> None:
        """One step forward on the progress bar."""
        if self.active:
            self.bar.update()

    def record(self, record: dict[str, Any]) -> None:
        """Append a record, with its `time`, to metrics.jsonl and print its line."""
        if not self.active:
            return
        record = {**record, "time": now()}
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.mirrors.record(record)
        self.say(format_line(record, self.steps))

    def evaluated(self, row: dict[str, Any]) -> None:
        """A result row of an evaluation during training."""
        if self.active:
            self.mirrors.evaluated(row)
            self.say(
                f"evaluated step {row['step']}: {row['dataset']} {row['task']} {row['metric']} "
                f"{row['value']:.2f}"
            )

    def close(self, failed: bool = False) -> None:
        """No more records will come."""
        if self.mirrors:
            self.bar.close()
            self.mirrors.close(failed)


def format_line(record: dict[str, Any], steps: int) -> str:
    """The console line of a record of metrics.jsonl.

    With the clock before it, it has fewer than 120 characters for up to 999,999 steps, 999,999
    samples/s and 999 hours. The floor is shown where it is above 0, so where there are labels.

    Args:
        record: the record. steps: of the whole run.
    """
    loss = f"loss {_decimals(record['loss'], 4 if record['loss'] < 10 else 3)}"
    if record["floor"] > 0:
        loss += f" (floor {_decimals(record['floor'], 2)})"
    parts = [f"step {record['step']}/{steps}", loss, f"lr {record['lr']:.2e}"]
    if "samples_per_second" in record:
        parts.append(f"{_decimals(record['samples_per_second'], 0)} samples/s")
        parts.append(f"ETA {duration(record['eta_seconds'])}")
    memory = record["memory_gb"]
    parts.append(f"{memory:.{1 if memory < 10 else 0}f} GB")
    return ", ".join(parts)


def _decimals(value: float, decimals: int) -> str:
    """With so many decimals, or in short where that would be long."""
    return f"{value:.{decimals}f}" if abs(value) < 10 ** (6 - decimals) else f"{value:.3g}"


def _stamped(text: str) -> str:
    """Every line with the local time, to the second."""
    time = now()[: len("2026-01-01T00:00:00")]
    return "\n".join(f"{time} {line}" for line in text.splitlines())


def keep_until(path: Path, step: int) -> None:
    """Rewrite a JSONL file without the records after `step`; a line cut off half-way goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    replace_lines(path, kept)


def replace_lines(path: Path, lines: list[str]) -> None:
    """Write a file of lines as a whole, or leave the old one."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(scratch, path)
