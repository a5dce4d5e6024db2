"""Two towers into one space: an image trunk, a text encoder, two projections, one temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import ModelConfig
from models.image_timm import TimmTower, lift_zero_dim
from models.text_hf import HuggingFaceTower
from models.text_transformer import INIT_STD, TransformerTower

TEXT_TOWERS = {"transformer": TransformerTower, "hf": HuggingFaceTower}


class _Bounded(torch.autograd.Function):
    """Clamp whose gradient vanishes only where a step of descent would lead further outside.

    torch's clamp has no gradient outside at all: a temperature that once overshot would stay.
    """

    @staticmethod
    def forward(ctx, values: Tensor, low: float | None, high: float | None) -> Tensor:
        ctx.save_for_backward(values)
        ctx.bounds = (-math.inf if low is None else low, math.inf if high is None else high)
        return values.clamp(*ctx.bounds)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (values,) = ctx.saved_tensors
        low, high = ctx.bounds
        outwards = ((values > high) & (gradient < 0)) | ((values < low) & (gradient > 0))
        return gradient.masked_fill(outwards, 0.0), None, None


class TwoTower(nn.Module):
    """Image and text encoders with bias-free linear projections to a shared unit sphere.

    Source: microsoft/UniCL, model/model.py. Every parameter but `logit_scale` belongs to a
    submodule that is called, so that ZeRO-3 can gather it. No parameter or buffer is 0-D:
    DeepSpeed's first broadcast refuses those.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.image = TimmTower(cfg.image)
        self.text = TEXT_TOWERS[cfg.text.name](cfg.text)
        lift_zero_dim(self.text)
        self.image_width: int = self.image.width
        self.text_width: int = self.text.width
        self.embed_dim: int = cfg.embed_dim
        self.image_projection = nn.Linear(self.image_width, cfg.embed_dim, bias=False)
        self.text_projection = nn.Linear(self.text_width, cfg.embed_dim, bias=False)
        nn.init.trunc_normal_(self.image_projection.weight, std=INIT_STD)
        nn.init.trunc_normal_(self.text_projection.weight, std=INIT_STD)
        self.logit_scale = nn.Parameter(torch.full((1,), float(cfg.logit_scale_init)))

    def encode_image(self, images: Tensor) -> dict[str, Tensor]:
        """Encode normalised images.

        Args:
            images: (b, 3, H, W) float; cast to the weights' type.

        Returns:
            feature: (b, D) float32 of unit length; projected: (b, D) float32 before that;
            pooled: (b, image_width) before the projection; tokens: (b, N, W) before pooling.
        """
        pooled, tokens = self.image(images.to(self.image_projection.weight.dtype))
        projected = self.image_projection(pooled).float()
        return {
            "feature": F.normalize(projected, dim=-1),
            "projected": projected,
            "pooled": pooled,
            "tokens": tokens,
        }

    def encode_text(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Encode token ids.

        Args:
            input_ids: (b, L) int64.

        Returns:
            feature: (b, D) float32 of unit length; projected: (b, D) float32 before that;
            pooled: (b, text_width) before the projection; tokens: (b, L', text_width), where L'
            is L in training, and else the longest text of the batch; mask: (b, L') bool, True
            where a token is text, up to and with its end token.
        """
        pooled, tokens = self.text(input_ids)
        projected = self.text_projection(pooled).float()
        return {
            "feature": F.normalize(projected, dim=-1),
            "projected": projected,
            "pooled": pooled,
            "tokens": tokens,
            "mask": self.text.mask(input_ids[:, : tokens.shape[1]]),
        }

    def scale(self) -> Tensor:
        """The multiplier exp(logit_scale), shape (1,), float32, within `logit_scale_min` and
        `logit_scale_max`.

        The bounds are applied here and not to the stored value: an optimizer with float32 master
        weights would undo an in-place clamp. Beyond a bound the gradient is that of the bound
        where it leads back inside, and zero where it leads further out.
        """
        bounds = (self.cfg.logit_scale_min, self.cfg.logit_scale_max)
        low, high = (None if bound is None else math.log(bound) for bound in bounds)
        return _Bounded.apply(self.logit_scale.float(), low, high).exp()

    def forward(self, images: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-length image features (b, D), text features (b, D) and the multiplier (1,)."""
        image, text = self.encode_image(images), self.encode_text(input_ids)
        return image["feature"], text["feature"], self.scale()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in both towers: activations are recomputed in the backward."""
        self.image.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more axes, or the temperature, that must not decay.

        One-dimensional parameters (biases, norms) are left to the optimizer's rule. Returned are
        `logit_scale` and what timm names for the trunk: Swin's relative position tables, class
        tokens and positions of ViT.

        The UniCL release means to exempt the text positions and token embedding as well, but
        lists them under `lang_encoder.` while its module is `text_encoder`, and one of them
        without `.weight`: they do decay there, and so they do here. It also never passes Swin's
        list of keywords on, so whether its tables decayed depends on an optimizer that was not
        released; Swin's own recipe, and this method, exempt them.
        """
        names = {"logit_scale"}
        names |= {f"image.{name}" for name in self.image.no_weight_decay()}
        return names | {f"text.{name}" for name in self.text.no_weight_decay()}
