"""Supervised contrastive learning on two image views (Khosla et al., arXiv 2004.11362, L_out).

Anchor i among the 2B views of the global batch, P(i) = the other views of its label,
A(i) = all other views:

    L = 1/(2B) sum_i [ -1/|P(i)| sum_{p in P(i)} log ( e_ip / sum_{a in A(i)} e_ia ) ],
    e_ij = exp(z_i.z_j / t)

Baseline of Table 2 of UniCL. Without a label a sample's only positive is its other view
(then it is SimCLR).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses._block import WALK, Block, Classes, Walk
from losses._core import global_labels
from losses._gather import Gather
from losses._method import CoreOptions, Features
from losses._method import Method as Base


def supcon_loss(
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    temperature: float,
    gather: Gather,
    walk: Walk = WALK,
) -> tuple[Tensor, Tensor, Tensor]:
    """L_out over both views of the global batch.

    Args:
        first, second: (b, D) l2-normalised projections of the two views on this rank.
        labels: (b,) int64, see `losses._core.global_labels`.
        temperature: divides the cosines.
        gather: the ranks that share the batch.
        walk: memory, tiles and precision of the core.

    Returns:
        scalar, the global loss (equal on every rank); loss per sample (b,) without gradient;
        number of positives per anchor (b,).
    """
    sizes = gather.sizes(len(first), first.device)
    ids, counts = global_labels(gather.rows(labels, sizes))
    parts = ids.split(sizes)
    start, total, own = sum(sizes[: gather.rank]), len(ids), parts[gather.rank]

    # Both views of a rank as rows and as columns of one block, in which no view meets itself.
    views = torch.cat([first, second])
    block = Block(views, views, gather, walk, paired=True)
    views = views.to(block.dtype)
    itself = 2 * start + torch.arange(len(views), device=views.device)
    classes = Classes(block, torch.cat([part.repeat(2) for part in parts]), 2 * counts)
    scale = views.new_full((), 1 / temperature)
    normaliser, _, mean = block.normalisers(scale, (itself, itself), classes)
    # The mean over all views of a label, itself among them, made the mean over the others.
    members, positives = 2 * counts[own].repeat(2), 2 * counts[own] - 1
    positive = (members * mean - scale * views.square().sum(1)) / positives.repeat(2)
    anchor = normaliser - positive
    loss = gather.total(anchor.sum()) / max(2 * total, 1)
    return loss, anchor.detach().view(2, len(first)).mean(0), positives


@dataclass
class Config(CoreOptions):
    """temperature: 0.1 in SupContrast's recipes. projection: width of the head's output."""

    temperature: float = 0.1
    projection: int = 128


class Method(Base):
    """Two views of each image through the image tower and a two-layer projection head."""

    Config = Config
    images = ("first", "second")
    needs_labels = True

    def __init__(self, cfg: Any, dims: dict[str, int]):
        super().__init__(cfg, dims)
        width = dims["image_width"]
        self.head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, cfg.projection)
        )

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> Features:
        dtype = self.head[0].weight.dtype
        views = []
        for view in range(2):
            pooled = model.encode_image(batch["image"][:, view])["pooled"]
            views.append(F.normalize(self.head(pooled.to(dtype)).float(), dim=1))
        return {"first": views[0], "second": views[1]}

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        first, second, temperature = features["first"], features["second"], self.cfg.temperature
        loss, sample_loss, positives = supcon_loss(
            first, second, labels, temperature, gather, self.walk()
        )
        return {"contrastive_loss": loss, "sample_loss": sample_loss, "positives": positives}
