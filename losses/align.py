"""ALIGN: contrastive with label smoothing (Jia et al., arXiv 2102.05918).

With unit features u, v, multiplier s = 1/tau, smoothing e and q_ij = (1 - e) [i = j] + e / B:

    L = L_i2t + L_t2i,    L_i2t = -1/B sum_i sum_j q_ij log softmax_j(s u_i.v_j),    t2i alike

The targets are linear in the logits, so that each direction is CLIP's plus
e * (mean_i s u_i.v_i - mean_ij s u_i.v_j), and the last mean is a product of two mean features.
Labels are not used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses._block import WALK, Walk
from losses._core import contrast
from losses._gather import Gather
from losses._method import CoreOptions, Features
from losses._method import Method as Base

DIRECTIONS = {"sum": 2, "mean": 1}


def align_loss(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor,
    smoothing: float,
    gather: Gather,
    walk: Walk = WALK,
) -> tuple[Tensor, Tensor]:
    """Mean of both directions over the global batch.

    Args:
        image_features, text_features: (b, D) l2-normalised features of this rank.
        scale: (1,) or scalar multiplier of the cosines, 1/tau.
        smoothing: e in [0, 1); with 0 it is CLIP's loss.
        gather: the ranks that share the batch. walk: memory, tiles and precision of the core.

    Returns:
        scalar, the global loss, equal on every rank; loss per sample (b,) without gradient, whose
        mean over the global batch is the loss. Gradients follow the convention of `losses._gather`.
    """
    own = torch.full((len(image_features),), -1, device=image_features.device)
    result = contrast(
        image_features, text_features, own, scale, gather,
        walk.keep_bytes, walk.tile, walk.precision,
    )  # fmt: skip
    dtype = result.loss.dtype
    x, y, scale = image_features.to(dtype), text_features.to(dtype), scale.to(dtype).reshape(())
    positive = (x * y).sum(1)
    mine = torch.cat([x.sum(0), y.sum(0), positive.sum()[None], x.new_full((1,), len(x))])
    *sums, rows = gather.total(mine).split([x.shape[1], x.shape[1], 1, 1])
    rows = rows.clamp(min=1)
    image_mean, text_mean, positive_mean = (value / rows for value in sums)
    spread = positive_mean.sum() - (image_mean * text_mean).sum()
    with torch.no_grad():
        of_sample = positive - 0.5 * (x @ text_mean + y @ image_mean)
        sample_loss = result.sample_loss + smoothing * scale * of_sample
    return result.loss + smoothing * scale * spread, sample_loss


@dataclass
class Config(CoreOptions):
    """smoothing: e, 0.1 as published.

    directions: "sum" of both, as published, for which published learning rates and bounds of the
    gradient hold, or their "mean", half of it, as our other methods have it.
    """

    smoothing: float = 0.1
    directions: str = "sum"

    def __post_init__(self) -> None:
        if self.directions not in DIRECTIONS:
            names = ", ".join(DIRECTIONS)
            raise ValueError(f"loss.directions={self.directions!r} is not one of {names}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"loss.smoothing={self.smoothing} is not in [0, 1)")


class Method(Base):
    """ALIGN's loss; image-label samples count as captions. The model learns the logarithm of the
    multiplier, where the paper learns the temperature itself."""

    Config = Config

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        image, text, scale = features["image"], features["text"], features["scale"][:1]
        loss, sample_loss = align_loss(image, text, scale, self.cfg.smoothing, gather, self.walk())
        factor = DIRECTIONS[self.cfg.directions]
        return {"contrastive_loss": factor * loss, "sample_loss": factor * sample_loss}
