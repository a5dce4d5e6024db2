"""What a run says: console and log.txt for people, metrics.jsonl for everything else.

TensorBoard and wandb are mirrors of metrics.jsonl (engine/mirrors.py).
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from engine import dist
from engine.clock import duration
from engine.environment import now
from engine.mirrors import Mirrors
from loaders.printable import printable


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
        self.bar: tqdm | None = None

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
            self.bar = tqdm(
                total=self.steps, initial=step, unit="step", disable=None, file=sys.stdout,
                leave=False,
            )  # fmt: skip

    def say(self, line: str) -> None:
        """One line to the console and to log.txt."""
        if self.active:
            line = _stamped(printable(line))
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
            self._append(line)

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
    """The console line of a record of metrics.jsonl."""
    parts = [
        f"step {record['step']}/{steps} ({100 * record['step'] / steps:.0f}%)",
        f"samples {record['samples']}",
        f"loss {record['loss']:.4f} (floor {record['floor']:.4f})",
    ]
    for name, key in (("label", "loss_image_label"), ("text", "loss_image_text")):
        if key in record:
            parts.append(f"{name} {record[key]:.4f}")
    parts += [f"{k} {v:.4f}" for k, v in record.items() if k.endswith("_loss")]
    parts.append(f"positives {record['mean_positives']:.2f}")
    parts.append(f"lr {record['lr']:.3e} scale {record['scale']:.2f}")
    if record.get("grad_norm") is not None:
        parts.append(f"grad {record['grad_norm']:.3f}")
    if "samples_per_second" in record:
        parts.append(
            f"{record['samples_per_second']:.0f} samples/s data {record['data_seconds']:.3f}s "
            f"ETA {duration(record['eta_seconds'])}"
        )
    if record["bad_samples"]:
        parts.append(f"bad {record['bad_samples']}")
    return " | ".join(parts)


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
