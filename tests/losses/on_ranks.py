"""What every rank computes for the tests of this folder: one set of processes per world size."""

import functools
import math
import random

import numpy as np
import torch
from torch.nn import functional as F

import losses
from benchmarks import loss_ranks
from losses._block import Walk
from losses._core import contrast, normalisers, sigmoid_sum
from losses._gather import Gather
from losses._queue import Queue
from tests import multiprocess
from tests.losses import small

# Unequal numbers of rows per rank: 4 ranks form a 2 x 2 grid.
ROWS = {2: [9, 9], 3: [5, 11, 2], 4: [3, 8, 1, 6]}
LABELS = [0, 0, -1, 3, -1, -1, 0, 3, -1, -1, -1, 7, 7, 0, -2, -2, 3, 0]
DIMS = {"embed_dim": 6, "image_width": 6, "text_width": 6, "num_classes": 8, "vocab_size": 11}
# Shares of 40 rows; the later ones leave ranks empty, then a whole grid row, a whole grid column.
SHARES = {
    2: [[20, 20], [33, 7], [0, 40]],
    3: [[13, 13, 14], [5, 30, 5], [0, 0, 40]],
    4: [[10, 10, 10, 10], [3, 17, 9, 11], [0, 0, 15, 25], [0, 22, 0, 18]],
}
SCALES = [1.0, 14.3, 100.0, 400.0]
WIDE_SEEDS = range(24)
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
        "wide": [wide(rank, wide_case(seed, world_size)) for seed in WIDE_SEEDS],
        "received": received(rank),
    }
    if world_size == 2:
        found["empty"] = empty_rank(rank)
    return found


def make_batch():
    torch.manual_seed(7)
    image, text, second = (F.normalize(torch.randn(18, 6).double(), dim=1) for _ in range(3))
    return image, text, second, torch.tensor(LABELS)


def leaves_of(rows):
    """Everything that methods take of the given rows of the batch, as leaves."""
    image, text, second, _ = make_batch()
    leaves = {
        "image": image[rows], "text": text[rows], "first": image[rows], "second": second[rows],
        "image1": image[rows], "image2": second[rows], "image3": (image + 0.4 * second)[rows],
        "caption": text[rows], "synthetic": second[rows],
        "strong1": second[rows], "strong2": image[rows], "query": image[rows], "key": second[rows],
        "teacher_image": second[rows], "teacher_text": text[rows],
        "logits": torch.cat([image, text[:, :2]], 1)[rows],
        "eda": F.normalize(text + second, dim=1)[rows],
        "masked_sum": second[rows].abs().sum(1), "masked_count": (text[rows] > 0.3).sum(1).double(),
        "target": (0.3 * text + 0.7 * second)[rows],
        "original": text[rows], "chatgpt": second[rows], "bard": (text + second)[rows],
        "coco": (text - second)[rows], "human": (image + text)[rows],
        "image_in_text": F.normalize(image + second, dim=1)[rows], "text_in_image": second[rows],
        "both": F.normalize(image - second, dim=1)[rows],
        "global": image[rows], "local": second[rows], "regions": F.normalize(image - second)[rows],
        "summary": text[rows], "tags": F.normalize(text - second, dim=1)[rows],
        "scale": torch.full((len(image[rows]),), 12.0).double(),
        **tokens_of(image, text, second, rows),
    }  # fmt: skip
    return {
        key: value.clone().requires_grad_(value.is_floating_point())
        for key, value in leaves.items()
    }


def tokens_of(image, text, second, rows):
    """Three tokens of each image, five of each text, of which the last ones are padding."""
    sides = {
        "image": [image, second, image - text],
        "text": [text, second + text, image + 2 * text],
    }
    sides["text"] += [second - image, 3 * image + second]
    tokens = {f"{k}_tokens": F.normalize(torch.stack(v, 1), dim=2)[rows] for k, v in sides.items()}
    return {**tokens, "text_mask": (torch.arange(5) <= torch.arange(18)[:, None] % 5)[rows]}


def build(name, keep_mib=64):
    """Method `name` in float64, with small heads and queues that are not empty."""
    method = small.build(name, DIMS, keep_mib=keep_mib).double()
    for part in method.modules():
        if isinstance(part, Queue):
            part.keep(make_batch()[1][:, : part.rows.shape[1]])
            part.write()
    return method


def gradients_of(name, rows, keep_mib=64):
    """Loss and gradients of method `name` on the given rows of the batch."""
    leaves, labels = leaves_of(rows), make_batch()[-1]
    method = build(name, keep_mib)
    out = method(leaves, labels[rows], Gather())
    loss = sum(value for key, value in out.items() if key.endswith("_loss") and value.ndim == 0)
    leaves = {key: value for key, value in leaves.items() if value.requires_grad}
    leaves |= {f"parameter {key}": value for key, value in method.named_parameters()}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    named = dict(zip(leaves, grads, strict=True))
    return {"loss": loss.detach(), **{k: v for k, v in named.items() if v is not None}}


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


def wide_case(seed, world_size):
    """Rows and columns in different numbers, ids of what is excluded, any gradients, and the share
    of each rank; the seed decides everything. All float64."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shares = [[rng.randint(0, 7) for _ in range(world_size)] for _ in range(2)]
    if seed % 4 == 0:  # the last rank has no row, or no column
        shares[seed % 8 == 0][-1] = 0
    width, counts = rng.choice([1, 3, 8]), [sum(share) for share in shares]
    case = {"shares": shares, "tile": (rng.randint(1, 9), rng.randint(1, 9))}
    case["keep"], case["excluding"] = rng.choice([0, 100, 10**6]), seed % 3 > 0
    for side, count in zip(("rows", "columns"), counts, strict=True):
        case[side] = F.normalize(torch.randn(count, width).double(), dim=1)
        case[f"{side} ids"] = torch.randint(-2, rng.choice([1, 3, 30]), (count,))
        case[f"{side} gradient"] = torch.randn(count).double()
    if seed % 5 in (1, 2):  # a row, or a column, with id 0 has nothing left
        case[("columns ids", "rows ids")[seed % 5 - 1]][:] = 0
    case["scale"] = torch.tensor([rng.choice([1.0, 14.3, 100.0, 400.0])]).double()
    case["bias"] = torch.tensor([rng.choice([-10.0, 0.0, 5.0])]).double()
    return case


def wide(rank, case):
    """Normalisers and sigmoid sum of this rank's share, and gradients to everything."""
    own = {
        side: slice(sum(share[:rank]), sum(share[: rank + 1]))
        for side, share in zip(("rows", "columns"), case["shares"], strict=True)
    }
    rows, columns, scale, bias = leaves = [
        case[key][own.get(key, slice(None))].clone().requires_grad_()
        for key in ("rows", "columns", "scale", "bias")
    ]
    world_size = len(case["shares"][0])
    ids = tuple(case[f"{side} ids"][own[side]] for side in own) if case["excluding"] else None
    walk = Walk(case["keep"], case["tile"])
    lse = normalisers(rows, columns, scale, Gather(), ids, walk)
    upstream = [
        # What a loss makes of a normaliser of nothing may be anything.
        (case[f"{side} gradient"][own[side]] * world_size).masked_fill(found == -math.inf, math.nan)
        for side, found in zip(own, lse, strict=True)
    ]
    of_lse = torch.autograd.grad(lse, leaves[:3], upstream)
    total = sigmoid_sum(rows, columns, scale, bias, Gather(), walk)
    of_total = torch.autograd.grad(0.7 * total, leaves)
    return {
        "lse": [value.detach() for value in lse],
        "total": total.detach(),
        "of_lse": of_lse,
        "of_total": of_total,
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
