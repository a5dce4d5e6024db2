"""A run goes on at another number of ranks and ZeRO stage as if nothing had happened."""

from pathlib import Path

import numpy as np
import pytest
import torch

import losses
from engine import checkpoint, deepspeed_engine, optim, universal
from engine.step import Stepper
from losses._gather import Gather
from tests import multiprocess
from tests.engine import tiny

BATCH = 12
IDENTITY = {"train.global_batch": BATCH}


class Method(losses.find("multitask")):
    """A method with all kinds of state: a head, a frozen layer, a queue of features, and how far it
    is filled.

    Methods of `losses/` have some of these; the contract promises that all of them survive.
    """

    def __init__(self, cfg, dims):
        super().__init__(cfg, dims)
        self.register_buffer("queue", torch.zeros(2 * BATCH, dims["embed_dim"]))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.last = None
        self.frozen = torch.nn.Linear(dims["embed_dim"], 3)
        self.frozen.requires_grad_(False)

    def loss(self, features, labels, gather):
        self.last = gather.rows(features["image"].detach())
        out = super().loss(features, labels, gather)
        # Depends on features of earlier steps: a queue that was lost shows in the loss.
        out["frozen_loss"] = self.frozen(features["image"]).pow(2).mean()
        out["queue_loss"] = (features["image"] @ self.queue.T).pow(2).mean()
        return out

    def step_end(self):
        start = int(self.filled) % len(self.queue)
        self.queue[start : start + BATCH] = self.last
        self.filled += BATCH


def life(rank, world_size, folder, stage, start, stop):
    """Steps `start` to `stop` of one run; returns its losses and whole weights."""
    module = tiny.build("multitask")
    module.method = Method(module.method.cfg, tiny.DIMS)
    if start:  # what a fresh start draws must not matter
        for parameter in module.method.frozen.parameters():
            parameter.data.fill_(9.0)
    module.train()
    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "parameter_alignment": True},
        "steps_per_print": 10**9,
    }
    optimizer = optim.build(module.model, module.method, tiny.OPTIM)
    engine = deepspeed_engine.initialise(module, optimizer, config, torch.device("cpu"))
    last = checkpoint.last_good(Path(folder))
    done = checkpoint.load(engine, last, IDENTITY) if last else 0
    assert done == start
    stepper, seen = Stepper(engine, Gather(), seed=3), []
    for step in range(start, stop):
        share = tiny.cut(tiny.make_batch(step, BATCH), rank, world_size)
        out = stepper(step, [share])
        mean = torch.stack([out["loss"]])
        torch.distributed.all_reduce(mean)
        seen.append(float(mean) / world_size)
    checkpoint.save(engine, Path(folder), stop, IDENTITY, keep_last=5)
    return seen, {name: value.numpy() for name, value in deepspeed_engine.full_state(engine)}


def test_ranks_and_stages_change_on_the_way(tmp_path):
    """2 -> 1 -> 4 -> 2 ranks, ZeRO 1 -> 2 -> 3 -> 0 -> 3 -> 1 -> 3, against one undisturbed run."""
    lives = ((2, 1), (1, 2), (4, 3), (2, 0), (1, 3), (2, 1), (2, 3))  # (ranks, stage)
    steps = 2 * len(lives)
    whole, expected = multiprocess.run(life, 2, str(tmp_path / "whole"), 1, 0, steps)[0]
    seen = []
    for number, (ranks, stage) in enumerate(lives):
        start = 2 * number
        part, weights = multiprocess.run(
            life, ranks, str(tmp_path / "run"), stage, start, start + 2
        )[0]
        seen += part
    assert len(weights) == len(expected)
    assert weights["method.filled"] == steps * BATCH
    assert np.abs(expected["method.queue"]).min(axis=1).max() > 0
    np.testing.assert_allclose(seen, whole, rtol=2e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name], value, atol=2e-5, err_msg=name)
    left = list((tmp_path / "run" / "checkpoints").glob(f"*{universal.ENDING}"))
    assert not left, "a converted checkpoint is of no use once a newer one is complete"


def test_another_configuration_is_still_refused(tmp_path):
    facts = {"identity": {"seed": 0}, "step": 1, "world_size": 2, "zero_stage": 1}
    with pytest.raises(checkpoint.DataError, match="seed: checkpoint 0, now 1"):
        checkpoint.check_identity(facts, {"seed": 1}, tmp_path)
