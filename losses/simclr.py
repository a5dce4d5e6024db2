"""SimCLR: two views of an image find each other (Chen et al., arXiv 2002.05709, equation 1).

With a_i, b_i the l2-normalised projections of the two views of the B images of the global batch,
and t the temperature, view a_i is compared with all other 2B - 1 views:

    l(a_i) = log( sum_j exp(a_i.b_j / t) + sum_{j != i} exp(a_i.a_j / t) ) - a_i.b_i / t
    L      = 1 / (2B) sum_i [ l(a_i) + l(b_i) ]

l(b_i) alike. It is SupCon without labels. SimCLR's own code (google-research/simclr at 383d414)
adds the means of both halves instead of averaging all 2B terms, so that its value and gradient are
twice these; SLIP and SupContrast average.

The head runs in `loss`, over the global batch, once for each view, as in facebookresearch/SLIP.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses._block import WALK, Walk
from losses._core import normalisers
from losses._gather import Gather
from losses._heads import Mlp
from losses._method import CoreOptions, Features
from losses._method import Method as Base


def nt_xent(
    first: Tensor,
    second: Tensor,
    temperature: float,
    gather: Gather,
    walk: Walk = WALK,
) -> tuple[Tensor, Tensor]:
    """The normalised temperature-scaled cross-entropy of two views of the global batch.

    Args:
        first, second: (b, D) l2-normalised projections of this rank.
        temperature: divides the cosines.
        gather: the ranks that share the batch.
        walk: memory, tiles and precision of the core.

    Returns:
        Scalar, the global loss (equal on every rank); loss per image (b,) without gradient.
    """
    dtype = torch.promote_types(first.dtype, torch.float32)
    first, second = first.to(dtype), second.to(dtype)
    sizes = gather.sizes(len(first), first.device)
    views = torch.cat([first, second])
    itself = 2 * sum(sizes[: gather.rank]) + torch.arange(len(views), device=views.device)
    scale = views.new_full((), 1 / temperature)
    row_lse, _ = normalisers(views, views, scale, gather, (itself, itself), walk)
    each = row_lse.view(2, len(first)).mean(0) - (first * second).sum(1) / temperature
    return gather.mean(each), each.detach()


def project(head: Mlp, pooled: Tensor, gather: Gather) -> Tensor:
    """Unit-length projections (b, D) of pooled features (b, W) of one view; collective."""
    return F.normalize(head(pooled, gather), dim=1)


@dataclass
class Config(CoreOptions):
    """Defaults: those of SimCLR in facebookresearch/SLIP.

    temperature: divides the cosines. hidden: width of the head's two hidden layers. projection:
    width of its output.
    """

    temperature: float = 0.1
    hidden: int = 4096
    projection: int = 256


class Method(Base):
    """Two views of each image, labels and texts unused; a three-layer head with batch norms."""

    Config = Config
    images = ("first", "second")

    def __init__(self, cfg: Any, dims: dict[str, int]):
        super().__init__(cfg, dims)
        self.head = Mlp([dims["image_width"], cfg.hidden, cfg.hidden, cfg.projection])

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> Features:
        images = enumerate(self.images)
        return {name: model.encode_image(batch["image"][:, v])["pooled"] for v, name in images}

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        first, second = (project(self.head, features[name], gather) for name in self.images)
        loss, each = nt_xent(first, second, self.cfg.temperature, gather, self.walk())
        return {"contrastive_loss": loss, "sample_loss": each}
