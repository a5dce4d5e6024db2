"""SigLIP: a sigmoid for each pair of image and text (Zhai et al., arXiv 2303.15343).

With unit features u, v, multiplier t, bias b, and z_ij = 1 where labels are equal, else -1:

    L = -1/B sum_i sum_j log sigmoid( z_ij (t u_i.v_j + b) )

Since -log sigmoid(a) = softplus(a) - a, the whole sum is softplus(t u_i.v_j + b) over all pairs,
less (t u_i.v_j + b) over those with equal labels, which is a product of class sums. No softmax
means no normaliser: ranks add up. z = 1 off the diagonal, for samples of one class, is our reading
of the loss for labels; with captions alone it is the published loss.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from losses._block import WALK, Block, Classes, Walk
from losses._core import global_labels
from losses._gather import Gather
from losses._method import CoreOptions, Features
from losses._method import Method as Base


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    labels: Tensor,
    scale: Tensor,
    bias: Tensor,
    gather: Gather,
    walk: Walk = WALK,
) -> Tensor:
    """Sum over pairs of the global batch, divided by its size as in the paper's Algorithm 1.

    Args:
        image_features, text_features: (b, D) l2-normalised features of this rank.
        labels: (b,) int64, see `losses._core.global_labels`.
        scale, bias: (1,) or scalar, multiplier of the cosines and what is added.
        gather: the ranks that share the batch. walk: memory, tiles and precision of the core.

    Returns:
        Scalar, the global loss, equal on every rank. Gradients follow the convention of
        `losses._gather`.
    """
    block = Block(image_features, text_features, gather, walk, paired=True)
    ids, counts = global_labels(gather.rows(labels, block.row_sizes))
    share, mean = block.sigmoid_share(scale, bias, Classes(block, ids, counts))
    positives = counts[ids.split(block.row_sizes)[gather.rank]]
    share = share - (positives * (mean + bias.to(mean.dtype))).sum()
    return gather.total(share) / max(len(ids), 1)


@dataclass
class Config(CoreOptions):
    """bias_init: where b starts; -10 in the paper, so that the many negatives cost little at first.

    Beside it those of the core.
    """

    bias_init: float = -10.0


class Method(Base):
    """SigLIP over image-label and image-text samples alike. Evaluation ranks by cosines, which b
    does not change, so it belongs to the method and not to the model."""

    Config = Config

    def __init__(self, cfg: Any, dims: dict[str, int]):
        super().__init__(cfg, dims)
        self.bias = nn.Parameter(torch.full((1,), float(cfg.bias_init)))

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        image, text, scale = features["image"], features["text"], features["scale"][:1]
        loss = siglip_loss(image, text, labels, scale, self.bias, gather, self.walk())
        return {"contrastive_loss": loss}
