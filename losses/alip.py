"""ALIP: a raw and a synthetic caption, weighted by what agrees (Yang et al., arXiv 2308.08428).

Image x, caption t and synthetic caption c of a sample, of unit length, both texts from one tower.
Three cosines with a running mean H each, over all samples of all steps so far, with m the momentum:

    S_tc = t.c    S_xt = x.t    S_xc = x.c         H <- m H + (1 - m) mean(S), before H is used
    W^s = exp(g_s (S_tc - H_tc)) where S_tc < H_tc, else 1                        (language gate)
    W^t = exp(g_p (S_xt - H_xt)) where S_tc < H_tc, else 1;   W^c alike with S_xc (description gate)

With l_i(x, t) the half sum of both directions of CLIP's loss of sample i (`losses/clip.py`),

    L = 1/B sum_i W^s_i W^t_i l_i(x, t) + 1/B sum_i W^s_i W^c_i l_i(x, c)

Equations 1 to 6; the momentum, the start of all H at 1, the mean over B and the half are those of
deepglint/ALIP at c507915 (the paper adds both directions of all samples, 2 B times this value).
Weights carry no gradient and are not divided by their sum, so while H falls from 1, over the first
hundreds of steps, nearly all samples count little and the loss is small.

The released program builds the loss of the global batch on every rank with a gradient to its own
samples alone and then averages over ranks, so that its gradients, but for that of the multiplier,
are those of this loss divided by the number of ranks. It also forgets H when it is continued.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from losses._block import WALK, Walk
from losses._core import pair_losses
from losses._gather import Gather
from losses._method import CoreOptions, Features, text_features
from losses._method import Method as Base

# Equal texts have a cosine of 1 up to rounding, which is not below a mean of 1.
ROUNDING = 1e-6
GATES = ("texts", "caption", "synthetic")  # the cosines tc, xt and xc


def gate_weights(
    cosines: Tensor, histories: Tensor, language: float, description: float
) -> tuple[Tensor, Tensor]:
    """W^s W^t and W^s W^c of each sample, without gradient.

    Args:
        cosines: (3, b) of GATES. histories: (3,) their running means.
        language, description: g_s and g_p, how fast a weight falls with what is missing.

    Returns:
        (b,) and (b,), positive; 1 where the texts agree at least as well as they do on average.
    """
    lead = cosines.detach() - histories.detach()[:, None]
    # By S < H and not by W^s < 1: the same, but for g_s = 0, which leaves W^t and W^c alone.
    differ = lead[0] < -ROUNDING
    both = torch.where(differ, (language * lead[0]).exp(), 1.0)
    each = torch.where(differ, (description * lead[1:]).exp(), 1.0) * both
    return each[0], each[1]


def weighted_clip(
    image: Tensor,
    text: Tensor,
    weights: Tensor,
    scale: Tensor,
    gather: Gather,
    walk: Walk = WALK,
) -> tuple[Tensor, Tensor]:
    """1/B sum_i w_i l_i over the global batch, w constants.

    Args:
        image, text: (b, D) l2-normalised features of this rank. weights: (b,) of its samples.
        scale: (1,) or scalar multiplier of the cosines.
        gather: the ranks that share the batch. walk: memory, tiles and precision of the core.

    Returns:
        Scalar, the global loss, equal on every rank; w_i l_i (b,) without gradient. Gradients
        follow the convention of `losses._gather`.
    """
    each = weights * pair_losses(image, text, scale, gather, walk=walk)
    return gather.mean(each), each.detach()


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """(b,) of rows of unit length, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) * y.to(dtype)).sum(1)


@dataclass
class Config(CoreOptions):
    """Defaults: those of deepglint/ALIP; beside them the core's.

    language, description: g_s and g_p; with both 0 all weights are 1. momentum: of the means.
    """

    language: float = 2.0
    description: float = 2.0
    momentum: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"loss.momentum={self.momentum} is not in [0, 1)")


class Method(Base):
    """Pairs with two texts each; labels are not used. One image and two texts a sample."""

    Config = Config
    texts = ("caption", "synthetic")
    texts_differ = True
    needs_pairs = True

    def __init__(self, cfg: Any, dims: dict[str, int]):
        super().__init__(cfg, dims)
        for gate in GATES:
            self.register_buffer(f"history_{gate}", torch.ones(1))

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> Features:
        image = model.encode_image(batch["image"][:, 0])["feature"]
        texts = {name: text_features(model, batch, view) for view, name in enumerate(self.texts)}
        return {"image": image, **texts, "scale": model.scale().expand(len(image))}

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        image, caption, synthetic = (features[name] for name in ("image", *self.texts))
        pairs = ((caption, synthetic), (image, caption), (image, synthetic))
        cosines = torch.stack([_cosines(*pair) for pair in pairs])
        histories = self._remember(cosines, gather)
        weights = gate_weights(cosines, histories, self.cfg.language, self.cfg.description)
        walk, out = self.walk(), {"sample_loss": 0}
        for name, weight in zip(self.texts, weights, strict=True):
            scale = features["scale"][:1]
            loss, each = weighted_clip(image, features[name], weight, scale, gather, walk)
            out |= {f"{name}_loss": loss, f"{name}_weight": weight.sum() / max(len(weight), 1)}
            out["sample_loss"] = out["sample_loss"] + each
        return out

    @torch.no_grad()
    def _remember(self, cosines: Tensor, gather: Gather) -> Tensor:
        """Move the means by the (3, b) cosines of this step; returns them, (3,). Collective."""
        count = cosines.new_full((1,), cosines.shape[1])
        *sums, count = gather.sum_(torch.cat([cosines.sum(1), count])).unbind()
        histories = [getattr(self, f"history_{gate}") for gate in GATES]
        for history, total in zip(histories, sums, strict=True):
            history.lerp_((total / count.clamp(min=1)).to(history.dtype), 1 - self.cfg.momentum)
        return torch.cat(histories).to(cosines.dtype)
