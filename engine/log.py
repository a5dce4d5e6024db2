"""What a run says: console and log.txt for people, metrics.jsonl for everything else."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine import dist
from engine.clock import duration
from loaders.printable import printable

# Sums over samples that the log is made of, in the order of the vector reduced over ranks.
SUMS = (
    "batches", "loss", "rows", "floor", "positives",
    "label_rows", "label_loss", "text_rows", "text_loss", "bad",
)  # fmt: skip


class Meter:
    """Collects sums on the device and reduces them over ranks only when a line is due."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)

    def add(self, out: dict[str, Tensor], labels: Tensor, bad: int) -> None:
        """One step of this rank.

        Args:
            out: `loss` scalar, optionally `sample_loss` (b,) and `positives` (b,).
            labels: (b,) int64, >= 0 for image-label samples.
            bad: samples of the step that were unreadable and replaced.
        """
        sample_loss = out.get("sample_loss", torch.zeros_like(labels, dtype=torch.float32))
        positives = out.get("positives", torch.ones_like(labels)).double()
        label = labels >= 0
        items = (
            1, out["loss"], len(labels), positives.log().sum(), positives.sum(),
            label.sum(), sample_loss[label].sum(), (~label).sum(), sample_loss[~label].sum(), bad,
        )  # fmt: skip
        self.sums += torch.stack(
            [torch.as_tensor(x, device=self.sums.device).double() for x in items]
        )

    def read(self) -> dict[str, float]:
        """Means over all ranks since the last call; starts anew."""
        sums = dict(zip(SUMS, dist.sum_over_ranks(self.sums).tolist(), strict=True))
        self.sums = torch.zeros_like(self.sums)
        rows = sums["rows"]
        record = {
            "loss": sums["loss"] / sums["batches"],
            "floor": sums["floor"] / rows,
            "mean_positives": sums["positives"] / rows,
            "bad_samples": int(sums["bad"]),
            "rows": int(rows),
        }
        for name, key in (("image_label", "label"), ("image_text", "text")):
            if sums[f"{key}_rows"]:
                record[f"loss_{name}"] = sums[f"{key}_loss"] / sums[f"{key}_rows"]
        return record


class RunLog:
    """The run folder's `log.txt` and `metrics.jsonl`, and the console; silent but on rank 0.

    Args:
        folder: the run folder. step: steps already done; later lines of an earlier attempt are
            cut from metrics.jsonl, so that every step stands there once. steps: of the run.
    """

    def __init__(self, folder: Path, step: int, steps: int):
        self.active = dist.rank() == 0
        self.steps = steps
        if not self.active:
            return
        self.metrics = folder / "metrics.jsonl"
        self.text = folder / "log.txt"
        _keep_until(self.metrics, step)
        self.bar = tqdm(
            total=steps, initial=step, unit="step", disable=None, file=sys.stdout, leave=False
        )

    def say(self, line: str) -> None:
        """One line to the console and to log.txt."""
        if self.active:
            line = printable(line)
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
            with self.text.open("a") as file:
                file.write(line + "\n")

    def advance(self) -> None:
        """One step forward on the progress bar."""
        if self.active:
            self.bar.update()

    def record(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl and print its line."""
        if not self.active:
            return
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.say(format_line(record, self.steps))


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
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(line + "\n" for line in kept))
    os.replace(scratch, path)
