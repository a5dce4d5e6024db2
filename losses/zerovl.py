"""ZeroVL: CLIP with coin-flip mixup (Cui et al., arXiv 2112.09331).

In each step a coin says whether the images or the texts are mixed, never both, and one coefficient
a ~ Beta(alpha, alpha) says how much, with f(i) the partner of sample i:

    image turn    image_i of a x_i + (1 - a) x_f(i), x the pixels
    text turn     text_i of a h_i + (1 - a) h_f(i), h the projection before it has unit length

    L = 1/2 [ a CE(S, I) + (1 - a) CE(S, F) + a CE(S^T, I) + (1 - a) CE(S^T, F) ]

with S the scaled cosines of all ranks, CE the mean over rows of the cross-entropy, and F the matrix
of f. F is symmetric, so one blend of texts, t_i = a text_i + (1 - a) text_f(i), has all positives:
L is the mean of (row + column normaliser) / 2 - s image_i . t_i. With a = 1 it is CLIP's loss.

Coin and coefficient are functions of the seed of the step, equal on all ranks. In the released
program (zerovl at d923a50) the partner is a sample's mirror image in the micro-batch of a rank, so
that it depends on their numbers. Ours is its neighbour (position xor 1), always in the same
micro-batch, which is therefore of even size; the other one is not offered. Captions lose and change
word pieces (`losses._pieces`).

Its decoupled accumulation of gradients is gradient caching here. Under mixup it logs the loss of
unmixed targets; ours is the one that is differentiated. Debiased sampling is
`data.sampler: one_source`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from losses._block import WALK, Walk
from losses._core import pair_losses
from losses._gather import Gather
from losses._method import CoreOptions, Features
from losses._method import Method as Base
from losses._mixing import blended
from losses._pieces import altered, vocabulary
from losses._random import symmetric_beta, uniform

TRIES = 64  # of rejection: with alpha = 1, where half fail, all fail once in 2^64 steps
EPS = 1e-8  # added to the length of a mixed text, as there


def shares(step_seed: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """How much of its own image and of its own text a sample keeps in a step.

    Args:
        step_seed: (b,) int64. alpha: of the Beta distribution, in (0, 1].

    Returns:
        (b,), (b,) float32 in [0, 1]; one of the two is 1.
    """
    coin, *pairs = uniform(step_seed, 1 + 2 * TRIES).split([1, TRIES, TRIES], dim=1)
    share = symmetric_beta(*pairs, alpha)
    image_turn, whole = coin[:, 0] > 0.5, torch.ones_like(share)
    return torch.where(image_turn, share, whole), torch.where(image_turn, whole, share)


def mixed_pairs_loss(
    image: Tensor, text: Tensor, target: Tensor, scale: Tensor, gather: Gather, walk: Walk = WALK
) -> tuple[Tensor, Tensor]:
    """L of the global batch.

    Args:
        image, text: (b, D) features of this rank, of unit length.
        target: (b, D) t_i, the blend of texts that an image stands for.
        scale: (1,) multiplier of the cosines. gather, walk: as for `losses._core.normalisers`.

    Returns:
        Scalar, equal on every rank; (b,) without gradient, whose mean over all ranks is the loss.
    """
    each = pair_losses(image, text, scale, gather, target, walk=walk)
    return gather.mean(each), each.detach()


@dataclass
class Config(CoreOptions):
    """Defaults: those of the released program; beside them the core's.

    alpha: of the Beta distribution of the coefficient, in (0, 1]. altered: probability that a word
    piece is masked, replaced or deleted.
    """

    alpha: float = 0.1
    altered: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"loss.alpha={self.alpha} is not in (0, 1]")
        if not 0 <= self.altered < 1:
            raise ValueError(f"loss.altered={self.altered} is not in [0, 1)")


class Method(Base):
    """Pairs; image-label samples count as captions."""

    Config = Config
    blends_neighbours = True

    @classmethod
    def check_model(cls, model: Any) -> None:
        vocabulary(model.text)

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> Features:
        of_image, of_text = shares(batch["step_seed"][:1], self.cfg.alpha)
        ids, known = batch["text"][:, 0], vocabulary(model.cfg.text)
        ids = altered(ids, model.text_mask(ids), batch["seed"], self.cfg.altered, known)
        text = blended(model.encode_text(ids)["projected"], of_text)
        text = text / (text.norm(dim=1, keepdim=True) + EPS)
        image = model.encode_image(blended(batch["image"][:, 0], of_image))["feature"]
        target = blended(text, of_image * of_text)
        return {
            "image": image,
            "text": text,
            "target": target,
            "scale": model.scale().expand(len(image)),
        }

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        image, text, target = (features[name] for name in ("image", "text", "target"))
        loss, each = mixed_pairs_loss(
            image, text, target, features["scale"][:1], gather, self.walk()
        )
        return {"contrastive_loss": loss, "sample_loss": each}
