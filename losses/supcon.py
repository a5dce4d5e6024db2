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

from losses._core import global_labels
from losses._gather import Gather
from losses._method import Features
from losses._method import Method as Base


def supcon_loss(
    first: Tensor, second: Tensor, labels: Tensor, temperature: float, gather: Gather
) -> tuple[Tensor, Tensor, Tensor]:
    """L_out over both views of the global batch.

    Args:
        first, second: (b, D) l2-normalised projections of the two views on this rank.
        labels: (b,) int64, see `losses._core.global_labels`.
        temperature: divides the cosines.
        gather: the ranks that share the batch.

    Returns:
        scalar whose mean over ranks is the global loss; loss per sample (b,) without
        gradient; number of positives per anchor (b,).
    """
    dtype = torch.promote_types(first.dtype, torch.float32)
    views = first.to(dtype), second.to(dtype)
    sizes = gather.sizes(len(first), first.device)
    local, everyone = torch.cat(views), torch.cat([gather.rows(view, sizes) for view in views])
    ids, _ = global_labels(gather.rows(labels, sizes))
    start, total = sum(sizes[: gather.rank]), len(ids)
    position = start + torch.arange(len(first), device=first.device)
    own = torch.cat([position, position + total])

    logits = local @ everyone.t() / temperature  # (2b, 2B)
    logits = logits.scatter(1, own[:, None], float("-inf"))
    normaliser = logits.logsumexp(1)
    same = ids.repeat(2)[None, :] == ids.repeat(2)[own][:, None]
    same.scatter_(1, own[:, None], False)
    positives = same.sum(1)
    anchor = normaliser - logits.masked_fill(~same, 0).sum(1) / positives
    loss = anchor.sum() * gather.world_size / (2 * total)
    return loss, anchor.detach().view(2, -1).mean(0), positives[: len(first)]


@dataclass
class Config:
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
        loss, sample_loss, positives = supcon_loss(
            features["first"], features["second"], labels, self.cfg.temperature, gather
        )
        return {"contrastive_loss": loss, "sample_loss": sample_loss, "positives": positives}
