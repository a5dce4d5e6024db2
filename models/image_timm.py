"""Image tower: any timm trunk without its classifier."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from loaders.errors import ConfigError
from models.config import ImageConfig

# Our name -> (timm name, arguments). Swin's depths, widths, heads and window are those of UniCL's
# configs/unicl_swin_{tiny,base}.yaml; the stochastic depth rates come from there too. FocalNet's
# variant (large receptive field) is our choice: UniCL ships the model file but no configuration.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin_tiny": ("swin_tiny_patch4_window7_224", {"drop_path_rate": 0.2}),
    "swin_base": ("swin_base_patch4_window7_224", {"drop_path_rate": 0.5}),
    "resnet50": ("resnet50", {}),
    "resnet101": ("resnet101", {}),
    "vit_base_patch16": ("vit_base_patch16_224", {}),
    "focalnet_base": ("focalnet_base_lrf", {}),
}


def create_trunk(cfg: ImageConfig) -> nn.Module:
    """The timm model of the configuration without its classifier; ConfigError if there is none."""
    name, defaults = PRESETS.get(cfg.name, (cfg.name, {}))
    if not timm.is_model(name):
        close = timm.list_models(f"*{cfg.name.split('_')[0]}*")[:8]
        raise ConfigError(
            f"model.image.name: '{cfg.name}' is neither one of our presets ({', '.join(PRESETS)}) "
            f"nor a model of timm {timm.__version__}; similar timm names: {close or 'none'}"
        )
    for key, setting in (("img_size", "model.image.size"), ("num_classes", "model.embed_dim")):
        if key in cfg.kwargs:
            raise ConfigError(f"model.image.kwargs.{key} is not allowed: set {setting} instead")
    kwargs = {**defaults, **cfg.kwargs}
    # timm's own rule: models with this mark take `img_size`, the others take any size as it comes.
    known = timm.get_pretrained_cfg(name)
    if known is not None and known.fixed_input_size:
        kwargs["img_size"] = cfg.size
    try:
        return timm.create_model(name, num_classes=0, **kwargs)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"timm.create_model('{name}', {kwargs}) failed: {error}. "
            "Check model.image.kwargs and model.image.size."
        ) from error


def lift_zero_dim(module: nn.Module) -> None:
    """Give every 0-D parameter and buffer of `module` the shape (1,), in place.

    DeepSpeed's first weight broadcast reads tensors as bytes, which torch refuses for 0-D ones.
    Batch norm's counter and the skip gains of NFNets are 0-D; both broadcast as (1,).
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                setattr(
                    part, name, nn.Parameter(parameter.data.reshape(1), parameter.requires_grad)
                )
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.ndim == 0:
                setattr(part, name, buffer.reshape(1))


class TimmTower(nn.Module):
    """A timm trunk that returns pooled features and the sequence before pooling.

    For Swin this is UniCL's image encoder: final LayerNorm, then the mean over tokens
    (microsoft/UniCL, model/image_encoder/swin_transformer.py). Weights keep timm's initialisation,
    which for Swin and ViT is the truncated normal with standard deviation 0.02 of the release.
    """

    def __init__(self, cfg: ImageConfig) -> None:
        super().__init__()
        self.trunk = create_trunk(cfg)
        lift_zero_dim(self.trunk)
        # Calling the trunk must run `forward_features`: ZeRO-3 gathers a module's own parameters
        # (class token, positions) in a hook on its call, which a plain method call would skip.
        self.trunk.forward = self.trunk.forward_features
        # Class and register tokens, which come first.
        self.prefix_tokens = getattr(self.trunk, "num_prefix_tokens", 0)
        self.channels_last = getattr(self.trunk, "output_fmt", "NCHW") == "NHWC"
        self.width, self.length = self._probe(cfg)

    def _probe(self, cfg: ImageConfig) -> tuple[int, int]:
        """Run once on the meta device (no arithmetic): the pooled width and the number of tokens,
        or why the size fails."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        on_meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
        images = torch.empty(2, 3, cfg.size, cfg.size, device="meta")
        training = self.training
        self.eval()  # batch norm must not see the probe
        try:
            with torch.no_grad():
                pooled, tokens = torch.func.functional_call(self, on_meta, (images,))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ConfigError(
                f"image tower '{cfg.name}' does not take {cfg.size} x {cfg.size} pixel images: "
                f"{error}. Choose another model.image.size, or model.image.kwargs of timm that "
                "allow this one."
            ) from error
        finally:
            self.train(training)
        if pooled.ndim != 2 or tokens.ndim != 3:
            raise ConfigError(
                f"image tower '{cfg.name}' gives pooled features of shape {tuple(pooled.shape)} "
                f"and tokens of shape {tuple(tokens.shape)}; needed are (b, W) and (b, N, W). "
                "A timm model without pooling (global_pool: '') cannot be used."
            )
        return pooled.shape[1], tokens.shape[1]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode normalised images.

        Args:
            images: (b, 3, H, W) float.

        Returns:
            pooled features (b, width) and the sequence before pooling (b, N, W). N counts class
            and register tokens where the trunk has them; feature maps are flattened row by row.
        """
        # Convolutions run a quarter to 40 % faster on this layout (ResNet on CPU).
        features = self.trunk(images.contiguous(memory_format=torch.channels_last))
        pooled = self.trunk.forward_head(features, pre_logits=True)
        if features.ndim == 4:
            last = features if self.channels_last else features.permute(0, 2, 3, 1)
            features = last.flatten(1, 2)
        return pooled, features

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute activations in the backward pass. Batch norm then updates twice per step."""
        self.trunk.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the trunk's parameters that timm exempts from weight decay."""
        names = getattr(self.trunk, "no_weight_decay", set)()
        return {f"trunk.{name}" for name, _ in self.trunk.named_parameters() if name in names}
