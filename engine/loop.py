"""The training loop: order, step, log, save, stop. Everything a method does not have to know."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from engine import build, checkpoint, deepspeed_engine, dist, record
from engine.bad_samples import BadSamples
from engine.clock import Clock, slow_line
from engine.log import Meter, RunLog, read_window, write_window
from engine.nonfinite import FiniteGuard
from engine.signals import StopRequest, requeue
from engine.step import Batch, Stepper
from engine.watch import Watch
from loaders.batch import make_loader
from loaders.errors import UserError
from loaders.printable import printable
from loaders.views import normalize
from loaders.workers import ReadingNotes, end_workers, ignore_deaths
from losses._gather import Gather


class Trainer:
    """A run from its plan to its last step.

    Args:
        plan: the checked plan. device: of this rank.
        evaluate: called on all ranks with the folder of a checkpoint every `evals.every_steps`
            steps; returns result rows on rank 0.
        stop: made as early as possible, so that no signal finds the process without it.
    """

    def __init__(
        self,
        plan: build.Plan,
        device: torch.device,
        evaluate: Callable[[Path], list[dict]] | None = None,
        stop: StopRequest | None = None,
    ):
        self.evaluate, self.stop = evaluate, stop or StopRequest()
        self.plan, self.cfg, self.device = plan, plan.cfg, device
        self.folder = Path(plan.cfg.output_dir)
        # Before anything long: from here on a rank that does not answer is named.
        self.watch = Watch(self.cfg.timeout_minutes, self._last_words)
        self.notes = ReadingNotes(self.cfg.data.workers)
        self.dataset = build.dataset(plan)
        self.log: RunLog | None = None

    def run(self) -> None:
        """Train to the last step, or save and return when a signal asks to stop.

        Raises:
            NonFiniteLoss: see `train.max_nonfinite_windows`; the last checkpoint is left as it is.
            TooManyBadSamples: see `data.max_bad_fraction`. DataError: a data worker died or hangs.
            LostRank: another rank ended, or did not reach a collective operation.
        """
        try:
            try:
                self.start = record.examine_together(self.plan)
                if not self.start.finished:
                    self._start()
                    self._train()
                elif dist.rank() == 0:
                    print(printable("\n".join(self.start.lines)), flush=True)
            except Exception:
                # Else torch may raise, at any line below, that a worker has died. If it does so
                # before this line, that is the error.
                ignore_deaths()
                raise
        except Exception as error:
            ignore_deaths()
            reason = self._explain(error) or error
            self.watch.stop(f"{type(reason).__name__}: {str(reason)[:300]}")
            if self.log:
                self.log.note(f"error: {reason}")
                self.log.close(failed=True)
            end_workers()
            if reason is error:
                raise
            raise reason from error
        self.watch.stop()
        if self.log:
            self.log.close()

    def _start(self) -> None:
        """Build the engine, continue the last good checkpoint, and open the log."""
        plan = self.plan
        self.identity = plan.identity()
        self.image = build.model_config(plan.cfg).image
        self.engine = build.engine(plan, self.device)
        self.done = self.start.done
        if self.start.checkpoint:
            checkpoint.load(self.engine, self.start.checkpoint, self.identity)
        checkpoint.check_space(self.engine, self.folder)
        self.log = RunLog(self.folder, plan.steps, self.cfg)
        for line in (plan.describe(), *self.start.lines):
            self.log.say(line)
        graph_bytes = int(self.cfg.train.graph_memory_gb * 1e9)
        self.stepper = Stepper(self.engine, Gather(), self.cfg.seed, graph_bytes)
        self.guard = FiniteGuard(self.engine, plan, self.dataset, self.device)
        self.meter = Meter(self.device)
        if self._inside_window() and (rows := read_window(self.folder, self.done)):
            self.meter.restore(rows)
        self.clock = Clock(self.cfg.train.global_batch, plan.steps)
        self.bad = BadSamples(self.folder, self.cfg.data.max_bad_fraction)

    def _train(self) -> None:
        saved = self.done
        if stop := dist.max_over_ranks(self.stop.received, self.device):
            return self._leave(stop, "at the start, before its first step")
        for micro_batches in self._steps():
            step = self.done
            self.watch.at(step + 1, "forward, backward and update")
            rate = self._set_learning_rate(step)
            out = self._step(step, micro_batches)
            self.done += 1
            if step == self.start.done:
                self._keep_record()
            self.clock.tick()
            self._count(out, micro_batches)
            if self.done % self.cfg.log.every_steps == 0 or self.done == self.plan.steps:
                self._report(rate)
            self.log.advance()
            stop = dist.max_over_ranks(self.stop.received, self.device)
            due = self.evaluate and self.done % self.cfg.evals.every_steps == 0
            if stop or due or self.done % self.cfg.log.save_every_steps == 0:
                target = self._save()
                saved = self.done if target else saved
                if due and target and not stop:  # a job about to be killed has no time for it
                    self._evaluate(target)
            if stop:
                kept = "a checkpoint" if saved == self.done else "the last good checkpoint"
                return self._leave(stop, f"after {kept}")
        if saved != self.done and not self._save():
            self.guard.abort("the last window had a loss or gradient that is not finite")
        if totals := self.bad.totals():
            self.log.say(totals)
        self.log.say(f"finished after {self.done} steps: {self.folder}")

    def _keep_record(self) -> None:
        """A step of this start is made, so the folder changes."""
        self.watch.at(self.done, "writing the record", patient=True)
        self.log.begin(self.start.done)  # first, because a mirror may be refused
        self.bad.begin(self.start.done)
        record.write(self.plan, self.start, self.device)

    def _leave(self, stop: int, when: str) -> None:
        name = signal.Signals(stop).name
        self.log.say(f"stopped by {name} {when}")
        if dist.rank() == 0:
            self.log.say(requeue(name))

    def _step(self, step: int, micro_batches: list[Batch]) -> dict:
        try:
            return self.stepper(step, micro_batches)
        except Exception as error:
            if "loss scale already at minimum" not in str(error):  # DeepSpeed has no type for it
                raise
            self.guard.gave_up(step + 1, micro_batches, dist.first_line(error))

    def _explain(self, error: Exception) -> Exception | None:
        """A message for people, if the error has a reason that they can mend."""
        if isinstance(error, UserError):
            return None
        return self.notes.explain(error, self.dataset.sources) or self.watch.explain(error)

    def _last_words(self, line: str) -> None:
        if self.log:
            self.log.note(line)

    def _inside_window(self) -> bool:
        """Whether the step that was just done lies between two lines of the log."""
        return self.done % self.cfg.log.every_steps != 0 and self.done != self.plan.steps

    def _steps(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each remaining step, normalised, on the device."""
        pieces = self.cfg.train.accumulation
        loader = make_loader(
            self.dataset,
            self.plan.order,
            dist.rank(),
            dist.world_size(),
            self.plan.micro_batch,
            self.done,
            self.plan.steps,
            self.cfg.data.workers,
            self.notes,
            # Before the ranks that wait for this one give up: this one knows the sample.
            timeout=0.5 * 60 * self.cfg.timeout_minutes,
        )
        batches = iter(loader)
        for _ in range(self.done, self.plan.steps):
            self.watch.at(self.done + 1, "waiting for data")
            start = time.perf_counter()
            raw = [next(batches) for _ in range(pieces)]
            seconds = time.perf_counter() - start
            self.clock.waited(seconds)
            self.meter.waited += seconds
            yield [self._to_device(batch) for batch in raw]

    def _to_device(self, batch: Batch) -> Batch:
        moved = {
            key: value.to(self.device, non_blocking=True)
            for key, value in batch.items()
            if isinstance(value, torch.Tensor)
        }
        dtype = deepspeed_engine.precision(self.plan.deepspeed)
        moved["image"] = normalize(moved["image"], self.image.mean, self.image.std, dtype)
        return {**moved, "bad": batch["bad"]}

    def _set_learning_rate(self, step: int) -> float:
        rate = self.plan.rate(step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _count(self, out: dict, micro_batches: list[Batch]) -> None:
        labels = torch.cat([batch["label"] for batch in micro_batches])
        bad = [item for batch in micro_batches for item in batch["bad"]]
        self.bad.add(self.done, bad, len(labels))
        flag = self.guard.add(self.done, out, micro_batches)
        self.meter.add(out, labels, len(bad), flag)

    def _report(self, rate: float) -> None:
        self.watch.at(self.done, "logging")
        facts, waits = self.meter.read()
        rows = facts.pop("rows")
        speed = self.clock.read(self.done, waits)
        facts |= {
            "step": self.done,
            "samples": self.done * self.cfg.train.global_batch,
            "lr": rate,
            "scale": deepspeed_engine.scale(self.engine),
            "grad_norm": _gradient_norm(self.engine),
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

    def _evaluate(self, checkpoint: Path) -> None:
        self.watch.at(self.done, "evaluating", patient=True)
        with self.clock.paused():
            for row in self.evaluate(checkpoint):
                self.log.evaluated(row)
            dist.barrier()

    def _save(self) -> Path | None:
        """Save a checkpoint, unless it would not be a good one."""
        self.watch.at(self.done, "saving", patient=True)
        with self.clock.paused():
            if not self.guard.may_save():
                self.log.say(
                    f"warning: no checkpoint of step {self.done}: its window has a loss or "
                    "gradient that is not finite; the last good one is kept"
                )
                return None
            if self._inside_window():
                self._write_bad(dist.max_over_ranks(len(self.bad.waiting), self.device))
                write_window(self.folder, self.done, self.meter.state(), self.cfg.log.keep_last)
            target = checkpoint.save(
                self.engine, self.folder, self.done, self.identity, self.cfg.log.keep_last
            )
        self.log.say(f"saved {target}")
        return target


def _gradient_norm(engine) -> float | None:
    """Norm of the last step's gradient before clipping, where DeepSpeed computed it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)
