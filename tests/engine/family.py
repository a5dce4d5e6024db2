"""Any method on a tiny model under DeepSpeed: start, advance, live in parts."""

from pathlib import Path

import torch
import torch.distributed as dist

import losses
import models
from engine import checkpoint, deepspeed_engine, optim
from engine.step import Stepper
from losses._gather import Gather
from tests.engine import everything, tiny
from tests.losses import small

BATCH = 8
EVERYTHING = "everything"  # no file of losses/
IDENTITY = {"train.global_batch": BATCH}


def start(name, stage, world_size, pieces=1, bf16=False):
    """A DeepSpeed engine around method `name` that shards even the smallest weight."""
    module = build(name)
    config = tiny.deepspeed_settings(BATCH, stage, world_size, pieces, bf16)
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    optimizer = optim.build(module.model, module.method, tiny.OPTIM)
    return deepspeed_engine.initialise(module, optimizer, config, torch.device("cpu"))


def build(name):
    """Model and method, the same at every start."""
    torch.manual_seed(5)
    model = models.build(tiny.model_settings(name))
    if name == EVERYTHING:
        method = everything.Method(everything.Method.Config(), tiny.DIMS)
    else:
        method = small.build(name, tiny.dims(model))
    return deepspeed_engine.TrainModule(model, method).train()


def untrained(name):
    """Weights and buffers before the first step, as arrays."""
    return {key: value.detach().numpy() for key, value in build(name).state_dict().items()}


def share(name, step, rank, world_size, pieces=1, dtype=torch.float32):
    """The micro-batches of one rank, with as many views as the method asks for."""
    method = everything.Method if name == EVERYTHING else losses.find(name)
    batch = tiny.make_batch(step, BATCH, len(method.images), len(method.texts))
    batch["image"] = batch["image"].to(dtype)
    mine = tiny.cut(batch, rank, world_size)
    return [tiny.cut(mine, piece, pieces) for piece in range(pieces)]


def advance(engine, name, first, last, rank, world_size, pieces=1, dtype=torch.float32):
    """Steps `first` to `last`; the losses of the global batch."""
    stepper, seen = Stepper(engine, Gather(equal_rows=True), seed=3), []
    for step in range(first, last):
        mean = stepper(step, share(name, step, rank, world_size, pieces, dtype))["loss"].reshape(1)
        dist.all_reduce(mean)
        seen.append(float(mean) / world_size)
    return seen


def lives(rank, world_size, name, folder, parts):
    """A run in parts, each a fresh engine: (stage, micro-batches, first step, last step).

    Args:
        folder: of its checkpoints, one after each part; None: it is made in one part.
    """
    seen = []
    for stage, pieces, first, last in parts:
        engine = start(name, stage, world_size, pieces)
        if folder:
            found = checkpoint.last_good(Path(folder))
            assert (checkpoint.load(engine, found, IDENTITY) if found else 0) == first
        seen += advance(engine, name, first, last, rank, world_size, pieces)
        if folder:
            checkpoint.save(engine, Path(folder), last, IDENTITY, keep_last=5)
    return seen, state(engine)


def state(engine):
    """All weights and buffers, whole, as arrays."""
    return {name: tensor.float().numpy() for name, tensor in deepspeed_engine.full_state(engine)}
