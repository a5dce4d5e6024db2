"""Loss and step of every method beside CLIP's: CPU time in one process, peak memory in fresh ones.

The loss is forward and backward on given features of 1,024 samples and 512 dimensions, with the
defaults of each method. The step is on small towers, all that a trainer does with one batch: views
and texts encoded, the teacher's targets, loss, backward, AdamW, queues, the teacher's movement.
The encoders' multiple is the same without the loss and what comes after it; a step should cost
little more, which the targets say for the methods whose loss is the largest.

That no loss holds a matrix of the size of the batch squared is measured on a batch where such a
matrix would be larger than everything else: 4,096 samples, 32 dimensions, small heads and queues,
and no memory for what can be computed again. FILIP's loss, which compares the tokens of all pairs,
is work of another order; benchmarks/filip.py measures its memory.
"""

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import losses
import models
from benchmarks import harness
from engine.deepspeed_engine import TrainModule
from engine.step import total_loss
from losses._gather import Gather

PEER = "clip"
BATCH, DIMENSION, STEP_BATCH, ROUNDS = 1024, 512, 128, 5
SQUARE_BATCH, SQUARE_DIMENSION = 4096, 32
SMALL = {"hidden": 64, "projection": 32, "queue": 512, "keep_mib": 0}
CLASSES, TOKENS, PIXELS = 100, 16, 64
ENCODE = 64  # samples that features are made of
OVERHEAD = {"declip": 1.15, "otter": 1.15, "uniclip": 1.15}
# What a method's model has beyond the small towers, or in their place.
MODELS = {
    "filip": {"similarity": "late", "token_dim": 64},
    "oner": {
        "kind": "one_tower",
        "image": {
            "name": "vit_tiny_patch16_224", "size": PIXELS,
            "kwargs": {"patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 4},
        },
    },
    "uniclip": {"augmentation": {"width": 32, "hidden": 128}},
}  # fmt: skip
ELSEWHERE = ("filip",)  # the methods whose memory is measured elsewhere


def build(name: str, dimension: int, **options: Any) -> TrainModule:
    """Small towers and method `name`, with the options that it has of those given."""
    torch.manual_seed(0)
    model = models.build(
        {
            "image": {
                "name": "swin_tiny", "size": PIXELS,
                "kwargs": {"embed_dim": 32, "depths": [2, 2, 2], "num_heads": [2, 4, 8],
                           "window_size": 4, "drop_path_rate": 0.0},
            },
            # One token more than CLIP's, for methods that mask tokens.
            "text": {"width": 128, "layers": 2, "heads": 4, "context_length": TOKENS,
                     "vocab_size": 49409},
            "embed_dim": dimension, **MODELS.get(name, {}),
        }
    )  # fmt: skip
    options = {"objects": False, **options}  # they need another tower
    known = {field.name for field in dataclasses.fields(losses.find(name).Config)}
    given = {key: value for key, value in options.items() if key in known}
    dims = {
        "embed_dim": dimension, "image_width": model.image_width, "text_width": model.text_width,
        "num_classes": CLASSES, "vocab_size": 49409,
    }  # fmt: skip
    return TrainModule(model, losses.build(name, given, dims)).train()


def make_batch(method: type, size: int) -> dict[str, Tensor]:
    """As many views as the method wants; all samples are labelled, or half of them where pairs are
    welcome."""
    torch.manual_seed(1)
    text = torch.randint(1, 49000, (size, len(method.texts), TOKENS))
    text[..., -1] = 49407
    label = torch.randint(CLASSES, (size,))
    if not method.needs_labels:
        label[::2] = -1
    return {
        "image": torch.randn(size, len(method.images), 3, PIXELS, PIXELS),
        "augmentation": torch.rand(size, len(method.images), 13),
        "text": text, "label": label,
        "seed": torch.arange(size), "step_seed": torch.zeros(size, dtype=torch.int64),
    }  # fmt: skip


def loss_of(name: str, batch: int, dimension: int, **options: Any) -> Callable[[], None]:
    """One forward and backward of the loss on features of noise, made once."""
    module, made = build(name, dimension, **options), make_batch(losses.find(name), ENCODE)
    with torch.no_grad():
        targets = module.targets(made)
        found = {**module.method.encode(module.model, made), **targets}
    # The same samples over and over: neither time nor memory depends on what they are.
    again = torch.arange(batch) % ENCODE
    features = {key: value[again] for key, value in found.items()}
    for key, value in features.items():
        value.requires_grad_(value.is_floating_point() and key not in targets)
    return partial(_loss, module.method, features, made["label"][again])


def _loss(method: torch.nn.Module, features: dict[str, Tensor], labels: Tensor) -> None:
    total_loss(method(features, labels, Gather())).backward()
    for value in (*features.values(), *method.parameters()):
        value.grad = None


def step_of(name: str, batch: int) -> Callable[[], None]:
    """One step of training on a batch that stays."""
    return step_and_encoders(name, batch)[0]


def step_and_encoders(name: str, batch: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """One step of training on a batch that stays; and what it encodes, forward and backward, with
    the teacher's targets."""
    module, data = build(name, DIMENSION), make_batch(losses.find(name), batch)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)
    return partial(_step, module, data, optimizer), partial(_encoders, module, data)


def _step(module: TrainModule, data: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    total_loss(module(data, Gather())).backward()
    optimizer.step()
    optimizer.zero_grad()
    module.method.step_end()
    if module.teacher is not None:
        module.teacher.update(module, module.method.decay(0))


def _encoders(module: TrainModule, data: dict[str, Tensor]) -> None:
    features = module.method.encode(module.model, data)
    module.targets(data)
    sum(value.sum() for value in features.values() if value.requires_grad).backward()
    module.zero_grad()


def peaks(name: str, batch: int, square: int, small: int) -> list[float]:
    """Peak MiB, above what was there before, of a method's loss at both sizes and of its step, in a
    fresh process."""
    # Memory that is freed goes back to the system at once, so that what is measured next does not
    # find it.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (name, batch, square, small))


def _measure(name: str, batch: int, square: int, small: int) -> list[float]:
    makes = (
        partial(loss_of, name, batch, DIMENSION),
        partial(loss_of, name, square, SQUARE_DIMENSION, **SMALL),
        partial(step_of, name, small),
    )
    found = []
    for make in makes:
        run = make()
        run()  # what is made once
        found.append(harness.peak_mib(run))
    return found


def rows(quick: bool) -> Iterator[dict]:
    """Ratios of CPU time to CLIP's, and peaks of memory above the inputs."""
    names, rounds, sizes = losses.names(), ROUNDS, (BATCH, SQUARE_BATCH, STEP_BATCH)
    if quick:
        names = [name for name in names if name in (PEER, *OVERHEAD)]
        rounds, sizes = 1, (128, 2048, 64)
    batch, square, small = sizes
    seconds = harness.paired({name: loss_of(name, batch, DIMENSION) for name in names}, rounds)
    for name in names:
        value = harness.ratio(seconds, name, PEER)
        yield harness.row(f"CPU time of the loss, {name} / {PEER}", value, B=batch, rounds=rounds)
    runs = {}
    for name in names:
        runs[name], runs[f"{name} encoders"] = step_and_encoders(name, small)
    seconds = harness.paired(runs, rounds)
    for name in names:
        value = harness.ratio(seconds, name, PEER)
        yield harness.row(f"CPU time of a step, {name} / {PEER}", value, B=small, rounds=rounds)
        value /= harness.ratio(seconds, f"{name} encoders", f"{PEER} encoders")
        title, target = f"the same / the encoders' multiple, {name}", OVERHEAD.get(name)
        yield harness.row(title, value, target, B=small, rounds=rounds)
    runs.clear()
    for name in names:
        large = batch if name in ELSEWHERE else square
        of_loss, of_square, of_step = peaks(name, batch, large, small)
        yield harness.row(f"peak MiB of the loss, {name}", of_loss, B=batch)
        title, numbers = f"peak of the loss / B x B numbers, {name}", square**2 * 4 / 2**20
        if name not in ELSEWHERE:
            yield harness.row(title, of_square / numbers, None if quick else 0.8, B=square)
        yield harness.row(f"peak MiB of a step, {name}", of_step, B=small)


if __name__ == "__main__":
    harness.main("methods", rows)
