"""UniCLIP: images and texts contrast in one space, by three similarities (arXiv 2209.13430).

A reconstruction, for no code is public. Established is that views of an image and its text share
one space and one loss, that each positive meets the negatives alone (MP-NCE), that a similarity
depends on the two domains, and that the model knows what was done to an image. Ours are everything
else: three views, how temperature and offset enter, where they start, the bound of 100, weights.

Pair k has V views of its image and a text, M = V + 1 items. For items i, j of domains D(i, j), two
images (II), image and text (IT), or two texts (TT), with t_D and b_D learnt,

    s_ij = z_i.z_j / t_D + b_D        n_i = log sum over items j of other pairs of exp(s_ij)
    L = 1 / (M N) sum_i 1 / (M - 1) sum over the other items p of its pair of w_D l(i, p)
    l(i, p) = - log [ exp(s_ip) / (exp(s_ip) + exp(n_i)) ] = softplus(n_i - s_ip)

The core walks each D once, without an item's own pair, and says for every item the logarithm of its
sum of exp(z_i.z_j / t_D); n_i is made of the two that an item has. 1 / t of IT is the model's
multiplier; the order in which evaluation ranks depends on no t and no b.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses._block import WALK, Walk
from losses._core import normalisers
from losses._gather import Gather
from losses._method import CoreOptions, Features, multiplier, text_features
from losses._method import Method as Base

SCALE_MAX = 100.0  # largest 1 / t
LINEAR = 50.0  # above it softplus(a) is a to the last bit of float64


def nce(negatives: Tensor, positive: Tensor) -> Tensor:
    """l of a positive with similarity s that meets negatives alone, -log(e^s / (e^s + e^n)).

    Args:
        negatives: n, the logarithm of their sum. positive: s, of a shape that broadcasts with it.
    """
    return F.softplus(negatives - positive, threshold=LINEAR)


def mp_nce(
    images: Sequence[Tensor],
    text: Tensor,
    scales: Tensor,
    offsets: Tensor,
    gather: Gather,
    weights: tuple[float, float] = (1.0, 1.0),
    walk: Walk = WALK,
) -> tuple[Tensor, Tensor]:
    """MP-NCE of the global batch.

    Args:
        images: V tensors (b, D), the l2-normalised features of this rank, one for each view.
        text: (b, D) those of its texts.
        scales: (3,) 1 / t of II, IT, TT. offsets: (3,) b of the same; -inf leaves a domain out of
            the negatives.
        gather: the ranks that share the batch.
        weights: w of positives of II and IT; a pair has one text, so TT has none.
        walk: memory, tiles and precision of the core.

    Returns:
        Scalar, the global loss, equal on every rank and 0 for a single pair; loss of each pair
        (b,) without gradient, whose mean it is. Gradients follow the convention of
        `losses._gather`.
    """
    views = torch.stack(list(images))
    views, text = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (views, text))
    count, rows = len(views), len(text)
    before = sum(gather.sizes(rows, text.device)[: gather.rank])
    pair = before + torch.arange(rows, device=text.device)
    # All views of all pairs are the rows and columns of one block, so that a feature moves once.
    stacked, own = views.flatten(0, 1), pair.repeat(count)
    ii, _ = normalisers(stacked, stacked, scales[0], gather, (own, own), walk)
    it, ti = normalisers(stacked, text, scales[1], gather, (own, pair), walk)
    tt, _ = normalisers(text, text, scales[2], gather, (pair, pair), walk)
    alone = ii.view(count, rows) == -math.inf  # one pair in all: no item has a negative
    ii, it, ti, tt = (found.masked_fill(found == -math.inf, 0) for found in (ii, it, ti, tt))
    of_images = torch.logaddexp(ii + offsets[0], it + offsets[1]).view(count, rows)
    of_text = torch.logaddexp(ti + offsets[1], tt + offsets[2])

    # Sums of products rather than matrix products, which a GPU may round to fewer digits.
    across = scales[1] * (views * text).sum(-1) + offsets[1]
    each = weights[1] * (nce(of_images, across) + nce(of_text, across))
    for shift in range(1, count):  # each view with each other view of its pair
        among = scales[0] * (views * views.roll(shift, 0)).sum(-1) + offsets[0]
        each = each + weights[0] * nce(of_images, among)
    each = each.masked_fill(alone, 0).sum(0) / (count * (count + 1))
    return gather.mean(each), each.detach()


@dataclass
class Config(CoreOptions):
    """Values are ours. Beside these the core's.

    scale_init: logarithm of the multipliers 1 / t of II and TT at the start; ln(1 / 0.07) is
    CLIP's. image_weight, pair_weight: w of II and IT.
    """

    scale_init: float = 2.659260036932778
    image_weight: float = 1.0
    pair_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("image_weight", "pair_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name}={getattr(self, name)} must be at least 0")


class Method(Base):
    """Pairs; labels are not used. Four encodings a sample: three views of the image and a text."""

    Config = Config
    images = ("image1", "image2", "image3")
    needs_parameters = True

    def __init__(self, cfg: Any, dims: dict[str, int]):
        super().__init__(cfg, dims)
        self.log_scales = nn.Parameter(torch.full((2,), float(cfg.scale_init)))  # II, TT
        self.offsets = nn.Parameter(torch.zeros(3))  # II, IT, TT

    @classmethod
    def check_model(cls, model: Any) -> None:
        if model.augmentation is None:
            raise ValueError(
                "model.augmentation is missing: loss.name=uniclip tells the model what was done to "
                "each image view; give it the part that listens, model.augmentation={width: 256, "
                "hidden: 1024}"
            )

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> Features:
        features = {
            name: model.encode_image(batch["image"][:, v], batch["augmentation"][:, v])["feature"]
            for v, name in enumerate(self.images)
        }
        text = text_features(model, batch)
        return {**features, "text": text, "scale": model.scale().expand(len(text))}

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        of_images, of_texts = multiplier(self.log_scales, SCALE_MAX).split(1)
        scales = torch.cat([of_images, features["scale"][:1], of_texts])
        images = [features[name] for name in self.images]
        weights = self.cfg.image_weight, self.cfg.pair_weight
        loss, each = mp_nce(
            images, features["text"], scales, self.offsets, gather, weights, self.walk()
        )
        shown = {"image_scale": of_images.detach(), "text_scale": of_texts.detach()}
        return {"contrastive_loss": loss, "sample_loss": each, **shown}
