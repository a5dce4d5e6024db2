"""What every rank computes for the tests of this folder: one set of processes per world size."""

import functools

import numpy as np
import torch
from torch.nn import functional as F

import losses
from benchmarks import loss_ranks
from losses._core import contrast
from losses._gather import Gather
from tests import multiprocess

# Unequal numbers of rows per rank: 4 ranks form a 2 x 2 grid.
ROWS = {2: [9, 9], 3: [5, 11, 2], 4: [3, 8, 1, 6]}
LABELS = [0, 0, -1, 3, -1, -1, 0, 3, -1, -1, -1, 7, 7, 0, -2, -2, 3, 0]
DIMS = {"embed_dim": 6, "image_width": 6, "text_width": 6, "num_classes": 8}
# Shares of 40 rows; the later ones leave ranks empty, then a whole grid row, a whole grid column.
SHARES = {
    2: [[20, 20], [33, 7], [0, 40]],
    3: [[13, 13, 14], [5, 30, 5], [0, 0, 40]],
    4: [[10, 10, 10, 10], [3, 17, 9, 11], [0, 0, 15, 25], [0, 22, 0, 18]],
}
SCALES = [1.0, 14.3, 100.0, 400.0]
KINDS = ["mixed", "one_class", "distinct", "captions", "groups"]


@functools.cache
def results(world_size):
    """Per rank: `methods`, `cases`, `received`, and `empty` at two ranks."""
    return multiprocess.run(everything, world_size)


def everything(rank, world_size):
    starts = np.cumsum([0, *ROWS[world_size]])
    rows = slice(int(starts[rank]), int(starts[rank + 1]))
    found = {
        "methods": {name: gradients_of(name, rows) for name in losses.names()},
        "cases": [
            core(rank, case_batch(kind, scale, sum(share)), share, *options)
            for kind, scale, share, *options in cases(world_size)
        ],
        "received": received(rank),
    }
    if world_size == 2:
        found["empty"] = empty_rank(rank)
    return found


def make_batch():
    torch.manual_seed(7)
    image, text, second = (F.normalize(torch.randn(18, 6).double(), dim=1) for _ in range(3))
    return image, text, second, torch.tensor(LABELS)


def gradients_of(name, rows, keep_mib=64):
    """Loss and gradients of method `name` on the given rows of the batch."""
    image, text, second, labels = make_batch()
    head = {"hidden": 7, "projection": 5}
    options = {
        "unicl": {"keep_mib": keep_mib}, "clip": {"keep_mib": keep_mib}, "simclr": head,
        "slip": {"keep_mib": keep_mib, **head}, "moco": {"queue": 20, "projection": 6},
    }  # fmt: skip
    torch.manual_seed(3)  # heads
    method = losses.build(name, options.get(name, {}), DIMS).double()
    if name == "moco":  # with an empty queue its loss is 0
        method.queue.keep(text)
        method.step_end()
    leaves = {
        "image": image[rows], "text": text[rows], "first": image[rows], "second": second[rows],
        "strong1": second[rows], "strong2": image[rows], "query": image[rows], "key": second[rows],
        "logits": torch.cat([image, text[:, :2]], 1)[rows],
        "scale": torch.full((len(image[rows]),), 12.0).double(),
    }  # fmt: skip
    leaves = {key: value.clone().requires_grad_() for key, value in leaves.items()}
    out = method(leaves, labels[rows], Gather())
    loss = sum(value for key, value in out.items() if key.endswith("_loss") and value.ndim == 0)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    named = dict(zip(leaves, grads, strict=True))
    return {"loss": loss, **{k: v for k, v in named.items() if v is not None}}


def cases(world_size):
    """(kind of labels, scale, rows per rank, tile, budget for kept logits) of each case."""
    for number, kind in enumerate(KINDS):
        for turn, scale in enumerate(SCALES):
            shares = SHARES[world_size]
            tile, keep = [((7, 5), 600), ((64, 64), 2**20), ((3, 40), 0)][(number + turn) % 3]
            yield kind, scale, shares[(number + turn) % len(shares)], tile, keep


def case_batch(kind, scale, total):
    """Float64 features (total, 5), labels (total,) of the kind, and the scale (1,)."""
    torch.manual_seed(KINDS.index(kind))
    image, text = (F.normalize(torch.randn(total, 5).double(), dim=1) for _ in range(2))
    drawn = torch.randint(0, 6, (total,))
    labels = {
        "mixed": torch.tensor([-1, 0, 1, 2, 7, -1])[drawn],
        "one_class": torch.zeros(total, dtype=torch.int64),
        "distinct": torch.randperm(3 * total)[:total],
        "captions": torch.full((total,), -1),
        "groups": torch.tensor([-1, -2, -(2**61), 0, 5, -2])[drawn],
    }[kind]
    return image, text, labels, torch.tensor([scale]).double()


def core(rank, batch, share, tile, keep):
    """Everything the core returns for this rank's share of a batch."""
    image, text, labels, scale = batch
    own = slice(sum(share[:rank]), sum(share[: rank + 1]))
    image, text = (t[own].clone().requires_grad_() for t in (image, text))
    scale = scale.clone().requires_grad_()
    out = contrast(image, text, labels[own], scale, Gather(), keep, tile)
    gradients = torch.autograd.grad(out.loss, (image, text, scale))
    named = dict(zip(("image", "text", "scale"), gradients, strict=True))
    return {
        "loss": out.loss.detach(),
        "sample_loss": out.sample_loss,
        "positives": out.positives,
        **named,
    }


def received(rank):
    """Features over B * D, and bytes, that rank 0 receives in a forward and backward."""
    torch.manual_seed(rank)
    image, text = (F.normalize(torch.randn(24, 8), dim=1).requires_grad_() for _ in range(2))
    scale = torch.ones(1, requires_grad=True)
    batch = image, text, torch.full((24,), -1), scale
    if rank:  # counting takes seconds of imports, and shares are equal
        return loss_ranks.ours(batch)
    return loss_ranks.traffic(loss_ranks.ours, batch)


def empty_rank(rank):
    """Rank 1 holds image-label samples only: multitask's contrastive part has no row there."""
    torch.manual_seed(0)
    image = F.normalize(torch.randn(4, 6), dim=1).requires_grad_()
    labels = torch.tensor([-1, -1, 2, -1] if rank == 0 else [0, 1, 2, 3])
    features = {
        "image": image, "text": image * 1.0, "logits": torch.zeros(4, 8, requires_grad=True),
        "scale": torch.ones(4),
    }  # fmt: skip
    out = losses.build("multitask", {}, DIMS)(features, labels, Gather())
    (gradient,) = torch.autograd.grad(out["contrastive_loss"], image)
    return gradient, out["contrastive_loss"]
