"""The teacher against plain torch, sharded and not, and in 16 bits.

That runs with one continue, here and elsewhere, is in test_methods.py.
"""

import collections
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import losses
import models
from engine import deepspeed_engine, optim
from engine.nonfinite import FiniteGuard
from engine.step import Stepper
from engine.teacher import GROUP, Teacher, _groups
from losses._gather import Gather
from losses._queue import Queue
from tests import multiprocess
from tests.engine import run_folder, tiny
from tests.engine.test_step import Graph
from tests.losses.dense import moco

BATCH, QUEUE, DECAY, STEPS = 12, 30, 0.9, 4
# A text tower of few words: it does not learn here, and only takes time to be saved.
TEXT = {"name": "hf", "hf_config": run_folder.BERT, "context_length": 12}
MODEL = {**tiny.MODEL, "text": TEXT}
OPTIONS = {"queue": QUEUE, "projection": 8, "momentum": DECAY}


def build(drop_path=0.0, decay=DECAY, model=MODEL):
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
    config = tiny.deepspeed_settings(BATCH, stage, world_size, pieces, bf16)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
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
    for stage, pieces in ((1, 1), (3, 3)):
        engine = start(stage, world_size, pieces)
        seen = advance(engine, 0, STEPS, rank, world_size, pieces)
        found[f"zero{stage} x{pieces}"] = seen, state(engine)
    return found


def test_two_ranks_sharded_or_not_equal_plain_torch():
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
    assert np.abs(expected[name] - before[name]).max() > 1e-3


def in_bf16(rank, world_size):
    """One step under ZeRO-1 and 3: its loss, and the share of some weights' averages that moved."""
    found = []
    for stage in (1, 3):
        engine = start(stage, world_size, bf16=True, decay=0.999)
        before = {n: v.clone() for n, v in engine.module.teacher.named_buffers()}
        layer, outputs = engine.module.teacher.method.head.layers[0], []
        layer.register_forward_hook(lambda *call, outputs=outputs: outputs.append(call[-1]))
        seen = advance(engine, 0, 1, rank, world_size, dtype=torch.bfloat16)
        now = dict(deepspeed_engine.full_state(engine))
        assert [output.dtype for output in outputs] == [torch.bfloat16]
        assert {v.dtype for n, v in now.items() if n.startswith("model.")} == {torch.bfloat16}
        moved = []
        for name in engine.module.teacher.averaged:
            after = now[f"teacher.{name}"]
            assert after.dtype == torch.float32, name
            wanted = before[name].double() + 1e-3 * (now[name].double() - before[name].double())
            torch.testing.assert_close(after.double(), wanted, rtol=0, atol=1e-7, msg=name)
            # In bf16 it would have stayed where it was.
            assert (after.bfloat16() == before[name].bfloat16()).float().mean() > 0.9
            if "projection" in name or ("head" in name and after.ndim == 2):
                moved.append((after != before[name]).float().mean().item())
        found.append((seen, moved))
    return found


def test_under_bf16_the_average_is_float32_and_moves():
    for seen, moved in multiprocess.run(in_bf16, 1)[0]:
        assert np.isfinite(seen).all()
        assert len(moved) == 4
        assert min(moved) > 0.9  # they decay, at least


def counted(method, calls):
    """Count the calls of a method's hooks."""
    for name in ("encode", "targets", "loss", "step_end", "decay"):
        original = getattr(method, name)

        def count(*arguments, name=name, original=original):
            calls[name] += 1
            return original(*arguments)

        setattr(method, name, count)


@pytest.mark.parametrize(("pieces", "encoded"), [(1, 1), (3, 5)])
def test_a_step_asks_for_one_loss_and_for_the_targets_of_a_micro_batch_once(pieces, encoded):
    module, calls = build(), collections.Counter()
    engine = Graph(module)
    counted(module.method, calls)
    Stepper(engine, Gather(), seed=3)(0, share(0, 0, 1, pieces))
    # Of three micro-batches the graph of one is kept, and two are encoded again.
    assert calls == {
        "encode": encoded, "targets": pieces, "loss": 1, "step_end": 1, "decay": 1
    }  # fmt: skip
    calls.clear()
    plan = SimpleNamespace(
        cfg=SimpleNamespace(train=SimpleNamespace(max_nonfinite_windows=1)), deepspeed={}
    )
    guard = FiniteGuard(engine, plan, None, torch.device("cpu"))
    (guard.batch,) = share(0, 0, 1)
    assert guard._usable()
    assert calls == {"encode": 1}


def test_it_draws_no_random_numbers_and_stays_in_evaluation_mode():
    module = build(drop_path=0.5)
    (batch,) = share(0, 0, 1)
    module.train()
    before = torch.random.get_rng_state()
    first, second = module.targets(batch), module.targets(batch)
    assert torch.equal(first["key"], second["key"])
    assert not first["key"].requires_grad
    assert torch.equal(torch.random.get_rng_state(), before)
    assert module.method.training
    assert not any(part.training for part in module.teacher.modules())
    assert not list(module.teacher.parameters())


TOWERS = [
    {**MODEL, "image": {"name": "resnet10t", "size": 32, "kwargs": {}}},
    {**tiny.MODEL, "image": {"name": "vit_tiny_patch16_224", "size": 32, "kwargs": {"depth": 1}}},
]


@pytest.mark.parametrize("settings", TOWERS, ids=["resnet, bert", "vit, transformer"])
@torch.no_grad()
def test_it_starts_as_the_student_whatever_the_towers(settings):
    module = build(model=settings)
    student = copy.deepcopy(module.model).eval()
    batch = tiny.make_batch(0, 4)
    text = batch["text"][:, 0] % 80
    for ours, theirs in (
        (module.teacher.model.encode_image, student.encode_image),
        (module.teacher.model.encode_text, student.encode_text),
    ):
        argument = batch["image"][:, 0] if ours.__name__ == "encode_image" else text
        expected = theirs(argument)["feature"]
        torch.testing.assert_close(ours(argument)["feature"], expected, rtol=1e-5, atol=1e-6)
    assert not any(isinstance(part, Queue) for part in module.teacher.modules())


def test_a_mask_with_infinities_stays_as_it_is():
    module = build()
    module.model.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
    teacher = Teacher(module.model, module.method)
    teacher.update(module, 0.5)
    assert torch.equal(teacher.model.mask, module.model.mask)


def test_running_statistics_are_averaged_and_counted_for_the_student_alone():
    module = build(model=TOWERS[0])
    before = {name: value.clone() for name, value in module.teacher.state_dict().items()}
    Stepper(Graph(module), Gather(), seed=3)(0, share(0, 0, 1, 3))
    student, compared = module.state_dict(), 0
    for name, value in module.teacher.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert value == before[name] == 0
            assert student[name] == 3  # the key's view does not pass through the student
        elif "running" in name:
            wanted = DECAY * before[name] + (1 - DECAY) * student[name]
            torch.testing.assert_close(value, wanted)
            compared += bool((value != before[name]).any())
    assert compared > 10


def test_large_weights_are_gathered_in_groups():
    sizes = {"a": 3 * GROUP // 4, "b": GROUP // 2, "c": GROUP // 2, "d": 2 * GROUP, "e": 1}
    tensors = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
    assert list(_groups(list(sizes), tensors)) == [["a"], ["b", "c"], ["d"], ["e"]]
