"""What every kind of model offers: to methods, to evaluation, to the engine."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from loaders.errors import ConfigError
from models.config import ModelConfig


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


class Model(nn.Module):
    """Base of the model kinds (`model.kind`): two encoders into one space, and a temperature.

    Whatever evaluation needs lives in the model, never in a method. Every parameter but
    `logit_scale` belongs to a submodule that is called, so that ZeRO-3 can gather it. No parameter
    or buffer is 0-D: DeepSpeed's first broadcast refuses those.

    Attributes:
        cfg: the configuration it was built from.
        image_width, text_width: width of `pooled` of the two encoders.
        embed_dim: width of `feature`.
    """

    image_width: int
    text_width: int

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_dim: int = cfg.embed_dim
        self.logit_scale = nn.Parameter(torch.full((1,), float(cfg.logit_scale_init)))

    def encode_image(self, images: Tensor, augmentation: Tensor | None = None) -> dict[str, Tensor]:
        """Encode normalised images.

        Args:
            images: (b, 3, H, W) float; cast to the weights' type.
            augmentation: (b, P) float, what was done to each image, for a model that has
                `model.augmentation`; None: nothing, as in every evaluation.

        Returns:
            feature: (b, D) float32 of unit length; projected: (b, D) float32 before that;
            pooled: (b, image_width) before the projection; tokens: (b, N, W) before pooling.
            With `model.similarity=late` also token_features: (b, N', d) float32, each of unit
            length, of the tokens that are places of the image; `feature` is then not trained.
        """
        raise NotImplementedError

    def encode_text(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Encode what the tokenizer of the model's configuration made of texts.

        Args:
            input_ids: (b, L) int64; of a renderer, (b, 1, H, W) uint8.

        Returns:
            feature: (b, D) float32 of unit length; projected: (b, D) float32 before that;
            pooled: (b, text_width) before the projection; tokens: (b, L', W), where L' is L in
            training, and else may be the longest text of the batch; mask: (b, L') bool, True
            where a token is text, up to and with its end token. With `model.similarity=late` also
            token_features: (b, context, d) float32, each of unit length and zeros behind the
            batch's longest text, and token_mask: (b, context) bool, the mask of these, so that all
            batches have one length; `feature` is then not trained.
        """
        raise NotImplementedError

    @property
    def text_has_dropout(self) -> bool:
        """Whether equal texts have different features in training."""
        return False

    def text_mask(self, input_ids: Tensor) -> Tensor:
        """(b, L) bool: the text of each row of token ids, up to and with its end token."""
        raise NotImplementedError

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
        """Unit-length image features (b, D), text features (b, D) and the multiplier (1,).

        Raises:
            ConfigError: `model.similarity=late`, which trains no vector of a whole image or text.
        """
        if self.cfg.similarity == "late":
            raise ConfigError(
                "model.similarity=late compares tokens, and no vector of a whole image or text is "
                "trained: use token_features of encode_image and encode_text, as "
                "eval.tasks.scores does"
            )
        image, text = self.encode_image(images), self.encode_text(input_ids)
        return image["feature"], text["feature"], self.scale()

    def towers(self) -> dict[str, nn.Module]:
        """Its encoders, by the names under which a plan says how large they are; what reads images
        comes first."""
        raise NotImplementedError

    def graphs(self) -> list[tuple[nn.Module, bool]]:
        """Modules that torch.compile takes whole, and of each whether its inputs change in shape
        from batch to batch."""
        raise NotImplementedError

    def image_encoder(self) -> nn.Module:
        """A copy of what encodes images, to be trained by itself: (b, 3, H, W) -> `projected`.

        Every parameter of it takes part; its `no_weight_decay()` names those that do not decay,
        beside norms and biases.
        """
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: activations are recomputed in the backward pass."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more axes, or the temperature, that must not decay.

        One-dimensional parameters (biases, norms) are left to the optimizer's rule.
        """
        return {"logit_scale"}
