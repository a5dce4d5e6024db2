"""Guard against losses, gradients and weights that are NaN or infinite.

Each step leaves a flag on the device that travels with the logged loss. A checkpoint is saved only
if no step of its window was flagged, and if all that would be saved is finite and gives finite
features: the last good checkpoint stays good. What made the first bad step is dumped, so that it
can be run again.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from engine import checkpoint, deepspeed_engine, dist
from engine.build import Plan
from engine.step import Batch, frozen_statistics
from loaders.batch import TripletDataset, collate
from loaders.errors import NonFiniteLoss

TENSORS_MIB = 64  # a batch up to this size is dumped with its images
CLEAN, FLAGGED, RUINED = 0, 1, 2


class Step(NamedTuple):
    """What is kept of a step until its window has turned out clean; tensors are on the device."""

    step: int
    flag: Tensor
    loss: Tensor
    grad_norm: Tensor | None
    uids: Tensor
    sample_loss: Tensor | None


class FiniteGuard:
    """Watches the steps of this rank.

    Args:
        engine: the DeepSpeed engine. plan: the plan of the run. dataset: what its loader reads.
        device: the device of this rank.
    """

    def __init__(self, engine, plan: Plan, dataset: TripletDataset, device: torch.device):
        self.engine, self.plan, self.dataset, self.device = engine, plan, dataset, device
        self.windows = plan.cfg.train.max_nonfinite_windows
        # At this scale dynamic loss scaling backs off no further; 1 is DeepSpeed's default.
        self.min_scale = plan.deepspeed.get("fp16", {}).get("min_loss_scale", 1)
        self.steps: list[Step] = []
        self.batch: Batch = {}
        self.bad_windows = 0
        # Masks of a text tower hold -inf on purpose, so only what is finite now must stay so.
        saved = engine.module.state_dict().keys()
        self.buffers = [
            name for name, value in engine.module.named_buffers()
            if name in saved and all_finite(iter([value]), device)
        ]  # fmt: skip

    def add(self, step: int, out: dict[str, Tensor], micro_batches: Sequence[Batch]) -> Tensor:
        """Remember a step and return its flag as a bool scalar, without waiting for the device.

        Args:
            step: the number of steps done, as logged. out: what the stepper returned.
        """
        loss, norm = out["loss"], self.engine.get_global_grad_norm()
        if norm is not None and not isinstance(norm, Tensor):  # filled in, not copied
            norm = torch.full((), float(norm), device=loss.device)
        flag = ~loss.isfinite()
        if norm is not None and not self._backing_off():
            flag = flag | ~norm.isfinite()
        self.batch = micro_batches[-1]
        uids = torch.cat([batch["uid"] for batch in micro_batches])
        self.steps.append(Step(step, flag, loss, norm, uids, out.get("sample_loss")))
        return flag

    def gave_up(self, step: int, micro_batches: Sequence[Batch], why: str) -> NoReturn:
        """End the run at a step that could not be made; collective, raises NonFiniteLoss."""
        unknown = torch.tensor(math.nan, device=self.device)
        self.add(step, {"loss": unknown}, micro_batches)
        self.abort(why)

    def close_window(self, bad: int) -> str | None:
        """Judge the window that was just logged; collective.

        Args:
            bad: how many steps of all ranks were flagged in it.

        Returns:
            A warning if the run goes on in spite of a bad window.

        Raises:
            NonFiniteLoss: too many bad windows in a row, or weights that nothing can mend.
        """
        if not bad:
            del self.steps[:-1]  # the last one is named should its update turn out bad
            self.bad_windows = 0
            return None
        self.bad_windows += 1
        if self._worst() == RUINED:
            self.abort("weights or optimizer state are not finite")
        if self.bad_windows >= self.windows:
            self.abort(
                f"{self.bad_windows} logged windows in a row had a loss or gradient that is not "
                "finite (train.max_nonfinite_windows)"
            )
        return (
            f"warning: loss or gradient was not finite in this window, number {self.bad_windows} "
            f"in a row of at most {self.windows}; the updates were skipped and the weights are "
            "finite. No checkpoint is saved until a window is clean"
        )

    def may_save(self) -> bool:
        """Whether a checkpoint may be written now; collective.

        The last update may have made weights so large that they are finite and their features are
        not, so the last micro-batch is encoded once more.

        Raises:
            NonFiniteLoss: the weights or the optimizer's state are ruined.
        """
        worst = self._worst()
        if worst == RUINED:
            self.abort("weights or optimizer state are not finite")
        return worst == CLEAN and not dist.max_over_ranks(not self._usable(), self.device)

    @torch.no_grad()
    def _usable(self) -> bool:
        with frozen_statistics(self.engine.module):
            features = self.engine(self.batch)
        usable = math.isfinite(deepspeed_engine.scale(self.engine))
        return all_finite(iter(features.values()), self.device) and usable

    def abort(self, why: str) -> NoReturn:
        """Dump the first bad step on all ranks and end the run; collective."""
        own = next((s.step for s in self.steps if s.flag.item()), self.steps[-1].step)
        first = -dist.max_over_ranks(-own, self.device)
        facts = next((s for s in self.steps if s.step == first), self.steps[-1])
        path = self._dump(facts, why)
        kept = checkpoint.last_good(path.parent)
        uids = facts.uids.tolist()
        raise NonFiniteLoss(
            f"{why}. First at step {facts.step} (loss {facts.loss.item():.6g}, gradient norm "
            f"{_number(facts.grad_norm)}); samples of this rank in that step: uids "
            f"{', '.join(map(str, uids[:8]))}{' …' if len(uids) > 8 else ''}, all in {path}. The "
            f"last good checkpoint is kept: {kept.name if kept else 'there is none yet'}. Lower "
            "optim.lr, set optim.grad_clip_norm, or use bf16 instead of fp16, and run the same "
            "command again"
        )

    def _dump(self, facts: Step, why: str) -> Path:
        """Write what is needed to run this rank's share of a step again; returns the JSON file."""
        folder = Path(self.plan.cfg.output_dir)
        path = folder / f"nonfinite_step_{facts.step}_rank_{dist.rank()}.json"
        uids = facts.uids.tolist()
        losses = [None] * len(uids) if facts.sample_loss is None else facts.sample_loss.tolist()
        samples = [
            {"uid": uid, **self.dataset.describe(uid), "loss": str(loss)}
            for uid, loss in zip(uids, losses, strict=True)
        ]
        order = self.plan.order.global_batch(facts.step - 1)
        first = dist.rank() * len(uids)
        addresses = [
            (facts.step - 1, position, int(order[position]))
            for position in range(first, first + len(uids))
        ]
        kept = checkpoint.last_good(folder)
        facts_of_step = {
            "why": why,
            "step": facts.step,
            "rank": dist.rank(),
            "world_size": dist.world_size(),
            "loss": str(facts.loss.item()),  # as text, because JSON has no NaN
            "grad_norm": _number(facts.grad_norm),
            "last_good": kept.name if kept else None,
            "replay": "engine.build.dataset(plan)[address] for the plan of config.yaml",
            "addresses": addresses,
            "samples": samples,
        }
        path.write_text(json.dumps(facts_of_step, indent=1) + "\n")
        one = self.dataset[addresses[0]]
        size = sum(v.nbytes for v in one.values() if isinstance(v, Tensor)) * len(addresses)
        if size <= TENSORS_MIB << 20:
            batch = collate([self.dataset[address] for address in addresses])
            tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
            torch.save(tensors, path.with_suffix(".pt"))
        return path

    def _worst(self) -> int:
        flags = [s.flag for s in self.steps]
        own = FLAGGED if flags and torch.stack(flags).any() else CLEAN
        if not all_finite(_saved_tensors(self.engine, self.buffers), self.device):
            own = RUINED
        return dist.max_over_ranks(own, self.device)

    def _backing_off(self) -> bool:
        """Whether fp16's dynamic loss scaling skipped this step and can still go lower."""
        engine = self.engine
        return (
            engine.fp16_enabled()
            and engine.dynamic_loss_scale()
            and not engine.was_step_applied()
            and engine.optimizer.cur_scale > self.min_scale
        )


@torch.no_grad()
def all_finite(tensors: Iterator[Tensor], device: torch.device) -> bool:
    """Whether no floating-point tensor holds NaN or infinity; waits for the device once."""
    fine = torch.ones((), dtype=torch.bool, device=device)
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            fine &= tensor.isfinite().all().to(device)
    return bool(fine)


def _saved_tensors(engine, buffers: Sequence[str]) -> Iterator[Tensor]:
    """What a checkpoint would hold of this rank: weights, buffers, the optimizer's state."""
    for parameter in engine.module.parameters():
        yield getattr(parameter, "ds_tensor", parameter)  # ZeRO-3 leaves only a share in place
    for name in buffers:
        yield engine.module.get_buffer(name)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for group in inner.param_groups:
        yield from group["params"]
    for state in inner.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _number(value: Tensor | None) -> str:
    return "unknown" if value is None else f"{value.item():.6g}"
