"""Means over a window of steps: sums on the device, reduced over ranks when a line is due.

A checkpoint inside a window keeps the sums in RUN/window.jsonl, so that the line of a continued run
equals that of an uninterrupted one.
"""

import json
import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from engine import dist
from engine.log import keep_until, replace_lines
from loaders.errors import ConfigError
from losses._method import loss_terms, scalars

# Sums that the log is made of, in the order of the vector reduced over ranks; behind them come
# those of the method's own scalars. A window.jsonl of an earlier version ends before the last, so
# new ones come at the end.
SUMS = (
    "batches", "loss", "rows", "floor", "positives",
    "label_rows", "label_loss", "text_rows", "text_loss", "bad", "nonfinite", "scalar_batches",
    "label_floor", "text_floor",
)  # fmt: skip
# What else a line of metrics.jsonl may hold.
TAKEN = (
    "step", "time", "samples", "loss", "loss_image_label", "loss_image_text", "floor", "rows",
    "floor_image_label", "floor_image_text",
    "mean_positives", "bad_samples", "nonfinite", "lr", "scale", "grad_norm",
    "samples_per_second", "data_seconds", "eta_seconds", "data_share", "speed_ratio", "memory_gb",
)  # fmt: skip


class Meter:
    """Collects sums on the device and reduces them over ranks only when a line is due."""

    def __init__(self, device: torch.device):
        self.names: list[str] = []  # of the method's scalars that are logged
        self.fixed = False  # by the first step of this process
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self.waited = 0.0  # seconds that this rank waited for data

    def add(self, out: dict[str, Tensor], labels: Tensor, bad: int, nonfinite: Tensor) -> None:
        """One step of this rank; the first one is collective.

        Args:
            out: `loss` scalar, optionally `sample_loss` (b,) and `positives` (b,), and the
                method's own scalars.
            labels: (b,) int64, >= 0 for image-label samples.
            bad: samples of the step that were unreadable and replaced.
            nonfinite: bool scalar, see `engine.nonfinite`.

        Raises:
            ConfigError: the scalars have other names than those of the first step or of another
                rank, or a name that the log needs for something else.
        """
        own = logged_scalars(out)
        self._fix(sorted(own))
        sample_loss = out.get("sample_loss", torch.zeros_like(labels, dtype=torch.float32))
        positives = out.get("positives", torch.ones_like(labels)).double()
        label = labels >= 0
        # Not picked out by an index, for which the host would ask the device how many there are.
        of_labels = torch.where(label, sample_loss, 0).double().sum()
        of_texts = torch.where(label, 0, sample_loss).double().sum()
        floors = positives.log()
        items = (
            1, out["loss"], len(labels), floors.sum(), positives.sum(),
            label.sum(), of_labels, (~label).sum(), of_texts, bad,
            nonfinite, 1, torch.where(label, floors, 0).sum(), torch.where(label, 0, floors).sum(),
            *(own[name] for name in self.names),
        )  # fmt: skip
        self.sums += torch.stack([self._on_device(item) for item in items])

    def _on_device(self, value: Tensor | float) -> Tensor:
        """A float64 number on the device; one that the host knows is not copied but filled in."""
        if isinstance(value, Tensor):
            return value.to(self.sums.device, torch.float64, non_blocking=True)
        return torch.full((), value, dtype=torch.float64, device=self.sums.device)

    def read(self) -> tuple[dict[str, float], list[float]]:
        """Means over all ranks since the last call, the largest `peak_memory` of a rank (GB), and
        the seconds that each rank waited for data; starts anew. One reduction for everything."""
        ranks, device = dist.world_size(), self.sums.device
        own = torch.zeros(2, ranks, dtype=torch.float64, device=device)  # a column a rank
        own[:, dist.rank()] = own.new_tensor([self.waited, peak_memory(device) / 1e9])
        values = dist.sum_over_ranks(torch.cat([self.sums, own.flatten()])).tolist()
        sums = dict(zip((*SUMS, *self.names), values, strict=False))
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
            "memory_gb": max(values[-ranks:]),
        }
        for name, key in (("image_label", "label"), ("image_text", "text")):
            if sums[f"{key}_rows"]:
                record[f"loss_{name}"] = sums[f"{key}_loss"] / sums[f"{key}_rows"]
                record[f"floor_{name}"] = sums[f"{key}_floor"] / sums[f"{key}_rows"]
        record |= {name: sums[name] / sums["scalar_batches"] for name in self.names}
        return record, values[-2 * ranks : -ranks]

    def state(self) -> dict[str, list]:
        """For a checkpoint inside a window; collective.

        Returns:
            `rows`: the sums of every rank since the last `read`, a row of its own for each,
            because adding up in another order changes the last bits. `scalars`: the names of the
            method's, which come last in a row.
        """
        rows = torch.zeros(dist.world_size(), len(self.sums), dtype=torch.float64)
        rows[dist.rank()] = self.sums.cpu()
        return {
            "rows": dist.sum_over_ranks(rows.to(self.sums.device)).tolist(),
            "scalars": self.names,
        }

    def restore(self, state: dict[str, list]) -> None:
        """Go on from `state`; with another number of ranks the first one takes all rows."""
        rows = state["rows"]
        if len(rows) == dist.world_size():
            own = rows[dist.rank()]
        else:
            own = [sum(column) * (dist.rank() == 0) for column in zip(*rows, strict=True)]
        self.names = state.get("scalars", [])
        known = len(own) - len(self.names)  # an earlier version had fewer of SUMS
        own = [*own[:known], *[0.0] * (len(SUMS) - known), *own[known:]]
        self.sums = torch.tensor(own, dtype=torch.float64, device=self.sums.device)

    def _fix(self, names: list[str]) -> None:
        """The first step of this process decides the names, on all ranks alike."""
        if self.fixed:
            if names != self.names:
                raise ConfigError(
                    f"the method returned the scalars {', '.join(names) or 'none'}, and in its "
                    f"first step {', '.join(self.names) or 'none'}; its `loss` must return the "
                    "same names in every step, with 0 or NaN where there is nothing to say"
                )
            return
        everyone = [names] * dist.world_size()
        if dist.world_size() > 1:
            torch.distributed.all_gather_object(everyone, names)
        if different := next((other for other in everyone if other != everyone[0]), None):
            raise ConfigError(
                f"the method returned the scalars {', '.join(everyone[0]) or 'none'} on one rank "
                f"and {', '.join(different) or 'none'} on another; its `loss` must return the same "
                "names on all ranks"
            )
        if taken := sorted({*names} & {*TAKEN}):
            raise ConfigError(
                f"the method returned scalars named {', '.join(taken)}, which the log holds "
                "already for something else; give them other names in its `loss`"
            )
        if names != self.names:  # of a window that another version of the method has begun
            self.names = names
            self.sums = torch.cat([self.sums[: len(SUMS)], self.sums.new_zeros(len(names))])
            self.sums[SUMS.index("scalar_batches")] = 0
        self.fixed = True


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has needed at most so far: of tensors on a GPU, else of its own
    memory (without its data workers)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def logged_scalars(out: dict[str, Tensor]) -> dict[str, Tensor]:
    """The method's scalars but those that are in the log anyway: `loss`, and its only term."""
    terms = loss_terms(out)
    known = {"loss", *(terms if len(terms) == 1 else ())}
    return {name: value for name, value in scalars(out).items() if name not in known}


def write_window(folder: Path, step: int, state: dict[str, list], keep: int) -> None:
    """RUN/window.jsonl: the sums of a window that a checkpoint cuts in two; rank 0 writes.

    Args:
        step: of the checkpoint. state: `Meter.state()`. keep: checkpoints that are kept.
    """
    if dist.rank() == 0:
        path = folder / "window.jsonl"
        keep_until(path, step - 1)
        before = path.read_text().splitlines()[-keep:] if path.exists() else []
        replace_lines(path, [*before, json.dumps({"step": step, **state})])


def read_window(folder: Path, step: int) -> dict[str, Any] | None:
    """What `write_window` kept for a step, or None if it ended a window."""
    path = folder / "window.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines]
    return next((entry for entry in entries if entry["step"] == step), None)
