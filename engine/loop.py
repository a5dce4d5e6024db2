"""The training loop: order, step, log, save, stop. Everything a method does not have to know."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from omegaconf import OmegaConf

import models
from engine import build, checkpoint, dist, ds, optim
from engine.clock import Clock
from engine.log import Meter, RunLog
from engine.schedule import learning_rate
from engine.signals import StopRequest, requeue
from engine.step import Batch, Stepper
from loaders.batch import BadSampleCounter, make_loader
from loaders.errors import NonFiniteLoss
from loaders.views import normalize
from losses._gather import Gather


class Trainer:
    """A run from its plan to its last step.

    Args:
        plan: the checked plan. device: of this rank.
        evaluate: called on all ranks with the folder of a checkpoint every `evals.every_steps`
            steps; returns result rows on rank 0.
    """

    def __init__(
        self,
        plan: build.Plan,
        device: torch.device,
        evaluate: Callable[[Path], list[dict]] | None = None,
    ):
        self.evaluate = evaluate
        self.plan, self.cfg, self.device = plan, plan.cfg, device
        self.folder = Path(plan.cfg.output_dir)
        self.identity = plan.identity()
        self.image = build.model_config(plan.cfg).image
        self.engine = build_engine(plan, device)
        self.done = 0
        last = checkpoint.last_good(self.folder)
        if last:
            self.done = checkpoint.load(self.engine, last, self.identity)
        _write_run_folder(self.folder, plan)
        dist.barrier()
        self.log = RunLog(self.folder, self.done, plan.steps)
        self.log.say(plan.describe())
        if last:
            self.log.say(f"continuing {self.folder} after step {self.done}")
        self.stepper = Stepper(self.engine, Gather(), self.cfg.seed)
        self.meter = Meter(device)
        self.clock = Clock(self.cfg.train.global_batch, plan.steps)
        self.bad = BadSampleCounter(self.cfg.data.max_bad_fraction)
        self.bad_total = self.seen_total = 0
        self.stop = StopRequest()

    def run(self) -> None:
        """Train to the last step, or save and return when a signal asks to stop.

        Raises:
            NonFiniteLoss: the loss of a logged window is NaN or infinite; the last checkpoint
                is left as it is. TooManyBadSamples: see `data.max_bad_fraction`.
        """
        saved = self.done
        for micro_batches in self._steps():
            step = self.done
            rate = self._set_learning_rate(step)
            out = self.stepper(step, micro_batches)
            self.done += 1
            self.clock.tick()
            self._count(out, micro_batches)
            if self.done % self.cfg.log.every_steps == 0 or self.done == self.plan.steps:
                self._report(rate)
            self.log.advance()
            stop = dist.max_over_ranks(self.stop.received, self.device)
            due = self.evaluate and self.done % self.cfg.evals.every_steps == 0
            if stop or due or self.done % self.cfg.log.save_every_steps == 0:
                target = self._save()
                saved = self.done
                if due and not stop:  # a job that is about to be killed has no time for it
                    self._evaluate(target)
            if stop:
                name = signal.Signals(stop).name
                self.log.say(f"stopped by {name} after a checkpoint")
                if dist.rank() == 0:
                    self.log.say(requeue(name))
                return
        if saved != self.done:
            self._save()
        self.log.say(f"finished after {self.done} steps: {self.folder}")

    def _steps(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each remaining step, normalised, on the device."""
        pieces = self.cfg.train.accumulation
        loader = make_loader(
            build.dataset(self.plan),
            self.plan.order,
            dist.rank(),
            dist.world_size(),
            self.plan.micro_batch,
            self.done,
            self.plan.steps,
            self.cfg.data.workers,
        )
        batches = iter(loader)
        for _ in range(self.done, self.plan.steps):
            start = time.perf_counter()
            raw = [next(batches) for _ in range(pieces)]
            self.clock.waited(time.perf_counter() - start)
            yield [self._to_device(batch) for batch in raw]

    def _to_device(self, batch: Batch) -> Batch:
        moved = {
            key: value.to(self.device, non_blocking=True)
            for key, value in batch.items()
            if isinstance(value, torch.Tensor)
        }
        dtype = ds.precision(self.plan.deepspeed)
        moved["image"] = normalize(moved["image"], self.image.mean, self.image.std, dtype)
        return {**moved, "bad": batch["bad"]}

    def _set_learning_rate(self, step: int) -> float:
        rate = learning_rate(
            step,
            self.plan.steps,
            self.plan.warmup,
            **self.plan.rates,
            schedule=self.cfg.optim.schedule,
        )
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _count(self, out: dict, micro_batches: list[Batch]) -> None:
        labels = torch.cat([batch["label"] for batch in micro_batches])
        bad = [item for batch in micro_batches for item in batch["bad"]]
        self.bad.update(bad, len(labels))
        self.meter.add(out, labels, len(bad))

    def _report(self, rate: float) -> None:
        record = self.meter.read()
        self.bad_total += record["bad_samples"]
        self.seen_total += record.pop("rows")
        record |= {
            "step": self.done,
            "samples": self.done * self.cfg.train.global_batch,
            "lr": rate,
            "scale": ds.scale(self.engine),
            "grad_norm": _gradient_norm(self.engine),
            **self.clock.read(self.done),
        }
        self.log.record(record)
        self.bad.check(self.bad_total, self.seen_total)
        if not math.isfinite(record["loss"]):
            raise NonFiniteLoss(
                f"loss is {record['loss']} in the window that ends at step {self.done}; the last "
                f"good checkpoint is kept. Lower optim.lr, set optim.grad_clip_norm, or use bf16 "
                "instead of fp16, and run the same command again"
            )

    def _evaluate(self, checkpoint: Path) -> None:
        for row in self.evaluate(checkpoint):
            self.log.say(
                f"evaluated step {row['step']}: {row['dataset']} {row['task']} {row['metric']} "
                f"{row['value']:.2f}"
            )
        dist.barrier()
        self.clock.pause()

    def _save(self) -> Path:
        target = checkpoint.save(
            self.engine, self.folder, self.done, self.identity, self.cfg.log.keep_last
        )
        self.log.say(f"saved {target}")
        return target


def build_engine(plan: build.Plan, device: torch.device):
    """Model, method and optimizer under DeepSpeed, the same initial weights at any world size."""
    cfg = plan.cfg
    torch.manual_seed(cfg.seed)
    model = models.build(build.model_config(cfg))
    if cfg.train.grad_checkpointing:
        model.set_grad_checkpointing(True)
    method = build.build_method(plan, model)
    optimizer = optim.build(model, method, cfg.optim)
    module = ds.TrainModule(model, method).to(device).train()
    return ds.initialise(module, optimizer, plan.deepspeed, device)


def _write_run_folder(folder: Path, plan: build.Plan) -> None:
    if dist.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(plan.cfg, folder / "config.yaml", resolve=True)
        (folder / "ds_config.json").write_text(json.dumps(plan.deepspeed, indent=1) + "\n")


def _gradient_norm(engine) -> float | None:
    """Norm of the last step's gradient before clipping, where DeepSpeed computed it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)
