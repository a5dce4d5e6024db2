"""FILIP's loss: peak memory at the published size of a worker, and CPU time beside a dense einsum.

Forward and backward on given tokens of unit length: 50 of each image, 77 of each text of which a
random number is text, 256 numbers each. Memory is counted above the tokens; their gradients (132
MiB at 1,024 samples) are part of it. The dense form writes down the products of all pairs at once,
15.8 GiB at 1,024 samples in float32, so the two are compared on fewer.
"""

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness
from losses._gather import Gather
from losses.filip import Config, Method

IMAGE_TOKENS, TEXT_TOKENS, DIMENSION = 50, 77, 256
BATCH, DENSE_BATCH, ROUNDS = 1024, 96, 3
LARGEST_MIB = 1024


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens of images and texts, the mask of the texts' (b, M), and the multiplier (b,)."""
    torch.manual_seed(0)
    image, text = (
        F.normalize(torch.randn(batch, count, DIMENSION), dim=2).requires_grad_()
        for count in (IMAGE_TOKENS, TEXT_TOKENS)
    )
    mask = torch.arange(TEXT_TOKENS) < torch.randint(2, TEXT_TOKENS + 1, (batch, 1))
    return image, text, mask, torch.full((batch,), 1 / 0.07, requires_grad=True)


def ours(image: Tensor, text: Tensor, mask: Tensor, scale: Tensor) -> None:
    """Forward and backward of the method, with its defaults."""
    features = {"image_tokens": image, "text_tokens": text, "text_mask": mask, "scale": scale}
    labels = torch.full((len(image),), -1)
    _backward(Method(Config(), {})(features, labels, Gather())["contrastive_loss"], image, text)


def dense(image: Tensor, text: Tensor, mask: Tensor, scale: Tensor) -> None:
    """The same from the products of all pairs."""
    products = torch.einsum("ikd,jrd->ijkr", image, text)
    best = products.masked_fill(~mask[:, None], -math.inf).max(3).values
    of_image = best.mean(2)
    of_text = (products.max(2).values * mask).sum(2) / mask.sum(1)
    own = torch.arange(len(image))
    directions = (
        F.cross_entropy(scale[0] * of_image, own), F.cross_entropy(scale[0] * of_text.T, own),
    )  # fmt: skip
    _backward(sum(directions) / 2, image, text)


def _backward(loss: Tensor, *leaves: Tensor) -> None:
    loss.backward()
    for leaf in leaves:
        leaf.grad = None


def peak(run: Callable[..., None], batch: int) -> float:
    """Peak MiB of a pass above its inputs, in a fresh process."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # as in benchmarks/methods.py
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (run, batch))


def _measure(run: Callable[..., None], batch: int) -> float:
    run(*inputs(4))  # what is made once
    return harness.peak_mib(partial(run, *inputs(batch)))


def rows(quick: bool) -> Iterator[dict]:
    """Peaks of ours at full size and of both at one where the dense form fits, and their times."""
    batch, small, rounds = (128, 24, 1) if quick else (BATCH, DENSE_BATCH, ROUNDS)
    facts = {"image_tokens": IMAGE_TOKENS, "text_tokens": TEXT_TOKENS, "D": DIMENSION}
    title = "peak MiB above the tokens, ours"
    yield harness.row(title, peak(ours, batch), LARGEST_MIB, B=batch, **facts)
    for name, run in (("ours", ours), ("dense einsum", dense)):
        yield harness.row(f"peak MiB above the tokens, {name}", peak(run, small), B=small, **facts)
    data = inputs(small)
    runs = {"ours": partial(ours, *data), "dense": partial(dense, *data)}
    value = harness.ratio(harness.paired(runs, rounds), "ours", "dense")
    title = "CPU time of forward and backward, ours / dense einsum"
    yield harness.row(title, value, B=small, rounds=rounds, **facts)


if __name__ == "__main__":
    harness.main("filip", rows)
