"""The life of a run: what its folder says, what it is built from, and how it ends.

A start reads the folder and touches nothing, builds the engine, continues the last good checkpoint
and opens the log; `engine.loop` then makes the steps. Whatever ends it is explained once, here.
"""

import signal
from collections.abc import Callable
from pathlib import Path

import torch

from engine import build, checkpoint, dist, optim, record
from engine.bad_samples import BadSamples
from engine.clock import Clock
from engine.log import RunLog
from engine.loop import Trainer
from engine.meter import Meter, read_window
from engine.nonfinite import FiniteGuard
from engine.signals import StopRequest, requeue
from engine.step import Stepper
from engine.watch import Watch
from loaders.errors import UserError
from loaders.printable import printable
from loaders.workers import ReadingNotes, end_workers, ignore_deaths
from losses._gather import Gather


class Run:
    """One start of a run, from its plan to its last words.

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
        self.plan, self.device, self.evaluate = plan, device, evaluate
        self.stop = stop or StopRequest()
        self.folder = Path(plan.cfg.output_dir)
        self.log = RunLog(self.folder, plan.steps, plan.cfg)
        # Before anything long: from here on a rank that does not answer is named.
        self.watch = Watch(plan.cfg.timeout_minutes, self.log.note)
        self.notes = ReadingNotes(plan.cfg.data.workers)
        self.dataset = build.dataset(plan)

    def run(self) -> Trainer | None:
        """Train to the last step, or save and return when a signal asks to stop.

        Returns:
            The trainer as it ended; None where the run was finished before.

        Raises:
            NonFiniteLoss: see `train.max_nonfinite_windows`; the last checkpoint is left as it is.
            TooManyBadSamples: see `data.max_bad_fraction`. DataError: a data worker died or hangs.
            LostRank: another rank ended, or did not reach a collective operation.
        """
        try:
            trainer = self._live()
        except Exception as error:
            ignore_deaths()
            reason = self._explain(error) or error
            self.watch.stop(f"{type(reason).__name__}: {str(reason)[:300]}")
            self.log.note(f"error: {reason}")
            self.log.close(failed=True)
            end_workers()
            if reason is error:
                raise
            raise reason from error
        self.watch.stop()
        self.log.close()
        return trainer

    def _live(self) -> Trainer | None:
        """Examine the folder, and train what is left to do."""
        try:
            start = record.examine_together(self.plan)
            if start.finished:
                if dist.rank() == 0:
                    print(printable("\n".join(start.lines)), flush=True)
                return None
            trainer = self._build(start)
            if received := trainer.train():
                self._leave(received, trainer)
            else:
                self._finish(trainer)
            return trainer
        except Exception:
            # Else torch may raise, while the error is told, that a worker has died. If it does so
            # before this line, that is the error that `run` tells.
            ignore_deaths()
            raise

    def _build(self, start: record.Start) -> Trainer:
        """Build the engine, continue the last good checkpoint, and open the log."""
        plan, cfg = self.plan, self.plan.cfg
        identity = plan.identity()
        engine = build.engine(plan, self.device)
        if start.checkpoint:
            checkpoint.load(engine, start.checkpoint, identity)
            optim.after_loading(engine.optimizer)
        checkpoint.check_space(engine, self.folder)
        self.log.open()
        for line in (plan.describe(), *start.lines):
            self.log.say(line)
        trainer = Trainer(
            plan=plan,
            start=start,
            identity=identity,
            device=self.device,
            dataset=self.dataset,
            notes=self.notes,
            engine=engine,
            stepper=Stepper(
                engine, Gather(equal_rows=True), cfg.seed, int(cfg.train.graph_memory_gb * 1e9)
            ),
            guard=FiniteGuard(engine, plan, self.dataset, self.device),
            meter=Meter(self.device),
            clock=Clock(cfg.train.global_batch, plan.steps),
            bad=BadSamples(self.folder, cfg.data.max_bad_fraction),
            log=self.log,
            watch=self.watch,
            stop=self.stop,
            evaluate=self.evaluate,
            done=start.done,
            saved=start.done,
        )
        if trainer.inside_window() and (window := read_window(self.folder, start.done)):
            trainer.meter.restore(window)
        return trainer

    def _leave(self, received: int, trainer: Trainer) -> None:
        """A signal asked to stop: say where the run stands, and put the job back into its queue."""
        name = signal.Signals(received).name
        if trainer.done == trainer.start.done:
            when = "at the start, before its first step"
        elif trainer.saved == trainer.done:
            when = "after a checkpoint"
        else:
            when = "after the last good checkpoint"
        self.log.say(f"stopped by {name} {when}")
        if dist.rank() == 0:
            self.log.say(requeue(name))

    def _finish(self, trainer: Trainer) -> None:
        """The last words of a run that is complete."""
        if totals := trainer.bad.totals():
            self.log.say(totals)
        self.log.say(f"finished after {trainer.done} steps: {self.folder}")

    def _explain(self, error: Exception) -> Exception | None:
        """A message for people, if the error has a reason that they can mend."""
        if isinstance(error, UserError):
            return None
        return self.notes.explain(error, self.dataset.sources) or self.watch.explain(error)
