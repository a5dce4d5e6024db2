"""The teacher against plain torch, under every ZeRO stage, through checkpoints, and in 16 bits."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import losses
import models
from engine import checkpoint, deepspeed_engine, optim
from engine.step import Stepper, frozen_statistics
from engine.teacher import Teacher
from losses._gather import Gather
from models import weights
from tests import multiprocess
from tests.engine import tiny
from tests.losses.dense import moco

BATCH, QUEUE, DECAY, STEPS = 12, 30, 0.9, 4
IDENTITY = {"train.global_batch": BATCH}
PROJECTIONS = ("image_projection.weight", "image.trunk.norm.weight")
OPTIONS = {"queue": QUEUE, "projection": 8, "momentum": DECAY}


def build(drop_path=0.0, decay=DECAY, model=tiny.MODEL):
    """A module that learns by MoCo, the one method whose loss is its teacher's."""
    torch.manual_seed(5)
    settings = {**model, "image": {**model["image"]}}
    settings["image"]["kwargs"] = {**model["image"]["kwargs"]}
    if drop_path:
        settings["image"]["kwargs"]["drop_path_rate"] = drop_path
    tower = models.build(settings)
    dims = {**tiny.DIMS, "image_width": tower.image_width}
    method = losses.build("moco", {**OPTIONS, "momentum": decay}, dims)
    return deepspeed_engine.TrainModule(tower, method).train()


def start(stage, world_size, pieces=1, bf16=False, decay=DECAY):
    """A DeepSpeed engine around `build` that shards even the smallest weight."""
    module = build(decay=decay)
    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // (world_size * pieces),
        "gradient_accumulation_steps": pieces,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }
    optimizer = optim.build(module.model, module.method, tiny.OPTIM)
    return deepspeed_engine.initialise(module, optimizer, config, torch.device("cpu"))


def share(step, rank, world_size, pieces=1, dtype=torch.float32):
    mine = tiny.cut(tiny.make_batch(step, BATCH), rank, world_size)
    mine["image"] = mine["image"].to(dtype)
    return [tiny.cut(mine, piece, pieces) for piece in range(pieces)]


def advance(engine, first, last, rank, world_size, pieces=1, dtype=torch.float32):
    """Steps `first` to `last`; the losses of the global batch."""
    stepper, seen = Stepper(engine, Gather(), seed=3), []
    for step in range(first, last):
        mean = stepper(step, share(step, rank, world_size, pieces, dtype))["loss"].reshape(1)
        dist.all_reduce(mean)
        seen.append(float(mean) / world_size)
    return seen


def state(engine):
    return {name: tensor.float().numpy() for name, tensor in deepspeed_engine.full_state(engine)}


def plain_torch():
    """The same run by parameters, a copy of the model, and a list of keys."""
    module = build()
    student = torch.nn.ModuleDict({"model": module.model, "method": module.method})
    average = copy.deepcopy(student).eval()
    optimizer = optim.build(module.model, module.method, tiny.OPTIM)
    keys, seen = [], []
    for step in range(STEPS):
        images = tiny.make_batch(step, BATCH)["image"]
        query = student["method"].head(student["model"].encode_image(images[:, 0])["pooled"])
        with torch.no_grad():
            key = average["method"].head(average["model"].encode_image(images[:, 1])["pooled"])
            key = F.normalize(key, dim=1)
        loss = moco(F.normalize(query, dim=1), key, torch.tensor(keys).view(-1, 8), 0.2)
        keys = (keys + key.tolist())[-QUEUE:]
        optimizer.zero_grad()
        loss.backward()
        for parameter in student.parameters():
            if parameter.grad is None:  # the text tower; DeepSpeed has zeros there, which decay
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        with torch.no_grad():
            for mean, now in zip(average.parameters(), student.parameters(), strict=True):
                mean.copy_(DECAY * mean + (1 - DECAY) * now)
        seen.append(loss.item())
    averages = {f"teacher.{name}": value for name, value in average.named_parameters()}
    everything = {**dict(student.named_parameters()), **averages}
    return seen, {name: value.detach().numpy() for name, value in everything.items()}


def every_stage(rank, world_size):
    found = {}
    for stage, pieces in ((0, 3), (1, 1), (2, 3), (3, 1), (3, 3)):
        engine = start(stage, world_size, pieces)
        seen = advance(engine, 0, STEPS, rank, world_size, pieces)
        found[f"zero{stage} x{pieces}"] = seen, state(engine)
    return found


def test_two_ranks_any_stage_any_accumulation_equal_plain_torch():
    values, expected = plain_torch()
    first, second = multiprocess.run(every_stage, 2)
    before = {name: value.detach().numpy() for name, value in build().state_dict().items()}
    assert sum(name.startswith("teacher.") for name in expected) * 2 == len(expected)
    for case, (seen, ours) in first.items():
        np.testing.assert_allclose(seen, values, rtol=2e-5, err_msg=case)
        for name, value in expected.items():
            moved = np.abs(value - before[name]).max()
            np.testing.assert_allclose(
                ours[name], value, atol=2e-4 * moved + 2e-6, err_msg=f"{case} {name}"
            )
        for name in ours:
            np.testing.assert_array_equal(ours[name], second[case][1][name], err_msg=name)
    name = "teacher.method.head.layers.0.weight"
    assert 1e-3 < np.abs(expected[name] - before[name]).max()


def lives(rank, world_size, folder, parts):
    """A run in parts, each a fresh engine: (stage, first step, last step)."""
    seen = []
    for stage, first, last in parts:
        engine = start(stage, world_size)
        found = checkpoint.last_good(Path(folder))
        assert (checkpoint.load(engine, found, IDENTITY) if found else 0) == first
        seen += advance(engine, first, last, rank, world_size)
        checkpoint.save(engine, Path(folder), last, IDENTITY, keep_last=5)
    return seen, state(engine)


def on_two(rank, world_size, folder):
    """Undisturbed, interrupted once, and the first life of a run that goes on elsewhere."""
    whole = lives(rank, world_size, f"{folder}/whole", [(1, 0, 4)])
    parts = lives(rank, world_size, f"{folder}/parts", [(1, 0, 2), (1, 2, 4)])
    sharded = lives(rank, world_size, f"{folder}/sharded", [(3, 0, 2), (3, 2, 4)])
    lives(rank, world_size, f"{folder}/wandering", [(3, 0, 1)])
    return whole, parts, sharded


def test_a_continued_run_is_the_same_at_the_same_and_at_other_ranks_and_stages(tmp_path):
    found = multiprocess.run(on_two, 2, str(tmp_path))
    for (values, expected), (again, bits), (sharded, close) in found:
        assert values == again
        np.testing.assert_allclose(sharded, values, rtol=2e-5)
        for name, value in expected.items():
            np.testing.assert_array_equal(bits[name], value, err_msg=name)
            np.testing.assert_allclose(close[name], value, atol=2e-5, err_msg=name)
    wandering = [(2, 1, 2), (0, 2, 3), (3, 3, 4)]
    seen, ours = multiprocess.run(lives, 1, str(tmp_path / "wandering"), wandering)[0]
    np.testing.assert_allclose(seen, values[1:], rtol=2e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, atol=2e-5, err_msg=name)
    # What evaluation reads is the student; the teacher is not in its way.
    folder = tmp_path / "wandering"
    (folder / "config.yaml").write_text(json.dumps({"model": tiny.MODEL}))  # JSON is YAML
    evaluated = weights.load(checkpoint.last_good(folder)).model
    for name, value in evaluated.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), ours[f"model.{name}"])
    assert any((ours[f"teacher.model.{n}"] != ours[f"model.{n}"]).any() for n in PROJECTIONS)
