"""The training loop: order, step, log, evaluate, save, stop.

`Trainer.train` is the whole of it; each of its lines is a method below, in the order of the page.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine import build, checkpoint, deepspeed_engine, dist, moves, record
from engine.bad_samples import BadSamples
from engine.clock import Clock, slow_line
from engine.log import RunLog
from engine.meter import Meter, write_window
from engine.nonfinite import FiniteGuard
from engine.signals import StopRequest
from engine.step import Batch, Stepper
from engine.watch import Watch
from loaders.batch import TripletDataset, make_loader
from loaders.views import normalize
from loaders.workers import ReadingNotes
from losses import _mixing


@dataclass
class Trainer:
    """The steps of a run that are left; `engine.run` builds all parts.

    Args:
        plan: of the run. start: what this start found in the folder.
        identity: what a checkpoint says of its run. device: of this rank.
        dataset: of the plan's samples. notes: what the data workers are reading.
        engine: DeepSpeed's. stepper: makes an update. guard: against values that are not finite.
        meter, clock: sums and times of a window. bad: samples that could not be used.
        log: the run's. watch: told what this rank does. stop: whether a signal came.
        evaluate: returns the result rows of a checkpoint's folder; None: no evaluations.
        done: steps made so far. saved: steps done in the last checkpoint.
    """

    plan: build.Plan
    start: record.Start
    identity: dict[str, Any]
    device: torch.device
    dataset: TripletDataset
    notes: ReadingNotes
    engine: Any
    stepper: Stepper
    guard: FiniteGuard
    meter: Meter
    clock: Clock
    bad: BadSamples
    log: RunLog
    watch: Watch
    stop: StopRequest
    evaluate: Callable[[Path], list[dict]] | None
    done: int
    saved: int

    def train(self) -> int:
        """Make all steps that are left; the number of the signal that ended it early, or 0."""
        cfg = self.plan.cfg
        if received := dist.max_over_ranks(self.stop.received, self.device):
            return received
        agreed = dist.LateMaximum(self.device)
        for micro_batches in self._batches():
            rate = self._set_learning_rate()
            out = self._step(micro_batches)
            self.done += 1
            if self.done == self.start.done + 1:
                self._keep_record()
            self.clock.tick()
            self._count(out, micro_batches)
            if not self.inside_window():
                self._report(rate)
            self.log.advance()
            # The signal that a rank received, so that all of them act on it at the same step.
            received = agreed(self.stop.received)
            due = self.evaluate and self.done % cfg.evals.every_steps == 0
            if received or due or self.done % cfg.log.save_every_steps == 0:
                target = self._save()
                if due and target and not received:  # a job about to be killed has no time for it
                    self._evaluate(target)
            if received and self.done < self.plan.steps:  # else nothing is left to come back for
                return received
        if self.saved != self.done and not self._save():
            self.guard.abort("the last window had a loss or gradient that is not finite")
        return 0

    def inside_window(self) -> bool:
        """Whether the step that was just done lies between two lines of the log."""
        return self.done % self.plan.cfg.log.every_steps != 0 and self.done != self.plan.steps

    def _batches(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each remaining step, normalised, on the device."""
        cfg = self.plan.cfg
        image = build.model_config(cfg).image
        dtype = deepspeed_engine.precision(self.plan.deepspeed)

        def prepare(batch: Batch) -> Batch:
            batch["image"] = normalize(batch["image"], image.mean, image.std, dtype)
            if not self.plan.mixes:
                return batch
            chosen = _mixing.draw(cfg.seed, batch["step"], image.size, image.size)
            return {**batch, **_mixing.mixed(batch["image"], chosen)}

        return moves.on_device(self._read(), self.device, prepare)

    def _read(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each remaining step, as the loader has them."""
        cfg = self.plan.cfg
        loader = make_loader(
            self.dataset,
            self.plan.order,
            dist.rank(),
            dist.world_size(),
            self.plan.micro_batch,
            self.done,
            self.plan.steps,
            cfg.data.workers,
            self.notes,
            # Before the ranks that wait for this one give up: this one knows the sample.
            timeout=0.5 * 60 * cfg.timeout_minutes,
        )
        batches = iter(loader)
        for step in range(self.done, self.plan.steps):
            self.watch.at(step + 1, "waiting for data")
            start = time.perf_counter()
            raw = [next(batches) for _ in range(cfg.train.accumulation)]
            seconds = time.perf_counter() - start
            self.clock.waited(seconds)
            self.meter.waited += seconds
            yield raw

    def _set_learning_rate(self) -> float:
        rate = self.plan.rate(self.done)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _step(self, micro_batches: list[Batch]) -> dict:
        self.watch.at(self.done + 1, "forward, backward and update")
        try:
            return self.stepper(self.done, micro_batches)
        except Exception as error:
            if "loss scale already at minimum" not in str(error):  # DeepSpeed has no type for it
                raise
            self.guard.gave_up(self.done + 1, micro_batches, dist.first_line(error))

    def _keep_record(self) -> None:
        """The first step of this start is made, so the folder changes."""
        self.watch.at(self.done, "writing the record", patient=True)
        self.log.begin(self.start.done)  # first, because a mirror may be refused
        self.bad.begin(self.start.done)
        record.write(self.plan, self.start, self.device)

    def _count(self, out: dict, micro_batches: list[Batch]) -> None:
        """Add the step to its window."""
        labels = torch.cat([batch["label"] for batch in micro_batches])
        bad = [item for batch in micro_batches for item in batch["bad"]]
        self.bad.add(self.done, bad, len(labels))
        flag = self.guard.add(self.done, out, micro_batches)
        self.meter.add(out, labels, len(bad), flag)

    def _report(self, rate: float) -> None:
        """Log the window that ends with this step, and judge it."""
        self.watch.at(self.done, "logging")
        facts, waits = self.meter.read()
        rows = facts.pop("rows")
        speed = self.clock.read(self.done, waits)
        norm = self.engine.get_global_grad_norm()  # before clipping, where DeepSpeed computed it
        facts |= {
            "step": self.done,
            "samples": self.done * self.plan.cfg.train.global_batch,
            "lr": rate,
            "scale": deepspeed_engine.scale(self.engine),
            "grad_norm": None if norm is None else float(norm),
            **speed,
        }
        self.log.record(facts)
        if slow := slow_line(speed, waits):
            self.log.say(slow)
        self._write_bad(facts["bad_samples"])
        self.bad.check(facts["bad_samples"], rows)
        if warning := self.guard.close_window(facts["nonfinite"]):
            self.log.say(warning)

    def _write_bad(self, count: int) -> None:
        if first := self.bad.write(count):
            self.log.say(first)

    def _save(self) -> Path | None:
        """Save a checkpoint, unless it would not be a good one."""
        cfg, folder = self.plan.cfg, Path(self.plan.cfg.output_dir)
        self.watch.at(self.done, "saving", patient=True)
        with self.clock.paused():
            if not self.guard.may_save():
                self.log.say(
                    f"warning: no checkpoint of step {self.done}: its window has a loss or "
                    "gradient that is not finite; the last good one is kept"
                )
                return None
            if self.inside_window():
                self._write_bad(dist.max_over_ranks(len(self.bad.waiting), self.device))
                write_window(folder, self.done, self.meter.state(), cfg.log.keep_last)
            target = checkpoint.save(
                self.engine, folder, self.done, self.identity, cfg.log.keep_last
            )
        self.saved = self.done
        self.log.say(f"saved {target}")
        return target

    def _evaluate(self, target: Path) -> None:
        self.watch.at(self.done, "evaluating", patient=True)
        with self.clock.paused():
            for row in self.evaluate(target):
                self.log.evaluated(row)
            dist.barrier()
