"""MixUp and CutMix: images blended in pairs, and the loss of blended targets.

MixUp (Zhang et al., arXiv 1710.09412) makes x = share x_i + (1 - share) x_p of two images, CutMix
(Yun et al., arXiv 1905.04899) pastes a box of the one into the other; the target is blended by the
same share. Values and semantics are those of timm 1.0.31's `Mixup` in mode `batch`, with the
settings of Swin's recipe: in half of the steps MixUp with alpha 0.8, in the others CutMix with
alpha 1.0. Different from there: the partner of a sample is its neighbour (position xor 1) instead
of its mirror image in the batch of a rank, and the share is one for the global batch. So ranks and
micro-batches, which are of even size, change nothing. Labels are not smoothed.

A loss whose targets are mixed is the blend of two losses of the same images, with the targets in
their own order and with those of the partners (`swapped`), because it is linear in its targets.
"""

import math
import random
from typing import NamedTuple

import torch
from torch import Tensor

MIXUP_ALPHA, CUTMIX_ALPHA, CUTMIX_SHARE = 0.8, 1.0, 0.5
KEY = "mix"  # of the batch and of the features: (b,) float32, a sample's share of its own image


class Mix(NamedTuple):
    """What is done in a step: a sample's share of its own target; the box that is pasted."""

    share: float
    box: tuple[int, int, int, int] | None  # top, bottom, left, right; None: MixUp


def draw(seed: int, step: int, height: int, width: int) -> Mix:
    """The mix of a step, a function of these numbers; the images are height x width."""
    rng = random.Random(f"mix {seed} {step}")
    if rng.random() >= CUTMIX_SHARE:
        return Mix(rng.betavariate(MIXUP_ALPHA, MIXUP_ALPHA), None)
    ratio = math.sqrt(1 - rng.betavariate(CUTMIX_ALPHA, CUTMIX_ALPHA))
    edges = []
    for side in (height, width):
        cut, centre = int(side * ratio), rng.randrange(side)
        edges += [max(0, centre - cut // 2), min(side, centre + (cut + 1) // 2)]
    top, bottom, left, right = edges
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mixed(images: Tensor, chosen: Mix) -> dict[str, Tensor]:
    """What mixing changes in a batch: `image`, and `mix` for the loss.

    Args:
        images: (b, V, 3, H, W) floating-point, b even, on any device; not changed.
        chosen: of the step, the same on all ranks.
    """
    share = torch.full((len(images),), chosen.share, dtype=torch.float32, device=images.device)
    if chosen.box is None:
        return {"image": blended(images, share[:1]), KEY: share}
    top, bottom, left, right = chosen.box
    pasted, others = images.clone(), swapped(images)
    pasted[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return {"image": pasted, KEY: share}


def blended(rows: Tensor, share: Tensor) -> Tensor:
    """Of each row its share, and the rest of its neighbour; a share of 1 changes nothing.

    Args:
        rows: (b, ...) floating-point, b even. share: (1,), on the same device, without gradient.

    Returns:
        (b, ...) of the type of `rows`, computed in float32 or, if that is wider, in their type.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return torch.lerp(swapped(rows).to(dtype), rows.to(dtype), share.to(dtype)).to(rows.dtype)


def swapped(rows: Tensor) -> Tensor:
    """(b, ...) with rows 0 and 1, 2 and 3, … in each other's place; b is even."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
