"""What a run says: console and log.txt for people, metrics.jsonl for everything else.

TensorBoard and wandb are mirrors of metrics.jsonl (engine/mirrors.py).
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from engine import dist
from engine.clock import duration
from engine.environment import now
from engine.mirrors import Mirrors
from loaders.printable import printable

# Sums over samples that the log is made of, in the order of the vector reduced over ranks.
SUMS = (
    "batches", "loss", "rows", "floor", "positives",
    "label_rows", "label_loss", "text_rows", "text_loss", "bad", "nonfinite",
)  # fmt: skip


class Meter:
    """Collects sums on the device and reduces them over ranks only when a line is due."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self.waited = 0.0  # seconds that this rank waited for data

    def add(self, out: dict[str, Tensor], labels: Tensor, bad: int, nonfinite: Tensor) -> None:
        """One step of this rank.

        Args:
            out: `loss` scalar, optionally `sample_loss` (b,) and `positives` (b,).
            labels: (b,) int64, >= 0 for image-label samples.
            bad: samples of the step that were unreadable and replaced.
            nonfinite: bool scalar, see `engine.nonfinite`.
        """
        sample_loss = out.get("sample_loss", torch.zeros_like(labels, dtype=torch.float32))
        positives = out.get("positives", torch.ones_like(labels)).double()
        label = labels >= 0
        items = (
            1, out["loss"], len(labels), positives.log().sum(), positives.sum(),
            label.sum(), sample_loss[label].sum(), (~label).sum(), sample_loss[~label].sum(), bad,
            nonfinite,
        )  # fmt: skip
        self.sums += torch.stack(
            [torch.as_tensor(x, device=self.sums.device).double() for x in items]
        )

    def read(self) -> tuple[dict[str, float], list[float]]:
        """Means over all ranks since the last call, and the seconds that each rank waited for
        data; starts anew. One reduction for everything."""
        waits = torch.zeros(dist.world_size(), dtype=torch.float64, device=self.sums.device)
        waits[dist.rank()] = self.waited
        values = dist.sum_over_ranks(torch.cat([self.sums, waits])).tolist()
        sums = dict(zip(SUMS, values, strict=False))
        self.sums = torch.zeros_like(self.sums)
        self.waited = 0.0
        rows = sums["rows"]
        record = {
            "loss": sums["loss"] / sums["batches"],
            "floor": sums["floor"] / rows,
            "mean_positives": sums["positives"] / rows,
            "bad_samples": int(sums["bad"]),
            "nonfinite": int(sums["nonfinite"]),
            "rows": int(rows),
        }
        for name, key in (("image_label", "label"), ("image_text", "text")):
            if sums[f"{key}_rows"]:
                record[f"loss_{name}"] = sums[f"{key}_loss"] / sums[f"{key}_rows"]
        return record, values[len(SUMS) :]

    def state(self) -> list[list[float]]:
        """Sums of every rank since the last `read`, for a checkpoint inside a window; collective.

        Every rank's row of its own, because adding up in another order changes the last bits.
        """
        rows = torch.zeros(dist.world_size(), len(SUMS), dtype=torch.float64)
        rows[dist.rank()] = self.sums.cpu()
        return dist.sum_over_ranks(rows.to(self.sums.device)).tolist()

    def restore(self, rows: list[list[float]]) -> None:
        """Go on from `state`; with another number of ranks the first one takes all rows."""
        if len(rows) == dist.world_size():
            own = rows[dist.rank()]
        else:
            own = [sum(column) * (dist.rank() == 0) for column in zip(*rows, strict=True)]
        self.sums = torch.tensor(own, dtype=torch.float64, device=self.sums.device)


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
            _keep_until(self.metrics, step)
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


def write_window(folder: Path, step: int, rows: list[list[float]], keep: int) -> None:
    """RUN/window.jsonl: the sums of a window that a checkpoint cuts in two; rank 0 writes.

    Args:
        step: of the checkpoint. rows: `Meter.state()`. keep: checkpoints that are kept.
    """
    if dist.rank() == 0:
        path = folder / "window.jsonl"
        _keep_until(path, step - 1)
        before = path.read_text().splitlines()[-keep:] if path.exists() else []
        lines = [*before, json.dumps({"step": step, "rows": rows})]
        _replace(path, lines)


def read_window(folder: Path, step: int) -> list[list[float]] | None:
    """What `write_window` kept for a step, or None if it ended a window."""
    path = folder / "window.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines]
    return next((entry["rows"] for entry in entries if entry["step"] == step), None)


def _stamped(text: str) -> str:
    """Every line with the local time, to the second."""
    time = now()[: len("2026-01-01T00:00:00")]
    return "\n".join(f"{time} {line}" for line in text.splitlines())


def _keep_until(path: Path, step: int) -> None:
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
    _replace(path, kept)


def _replace(path: Path, lines: list[str]) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(line + "\n" for line in lines))
    os.replace(scratch, path)
