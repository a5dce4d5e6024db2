"""Two towers into one space: an image trunk, a text encoder, two projections, one temperature."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn import functional as F

from loaders.errors import ConfigError
from models.augmentation import AugmentationHead
from models.base import Model
from models.config import ModelConfig
from models.image_timm import TimmTower, lift_zero_dim
from models.regions import RegionPath
from models.text_hf import HuggingFaceTower
from models.text_transformer import INIT_STD, TransformerTower

TEXT_TOWERS = {"transformer": TransformerTower, "hf": HuggingFaceTower}


class ImageEncoder(nn.Module):
    """An image tower and its projection, copied: (b, 3, H, W) -> (b, D) before unit length.

    Between them the head that is told what was done to an image, if there is one: nothing was.
    """

    def __init__(
        self, image: TimmTower, projection: nn.Linear, told: AugmentationHead | None = None
    ) -> None:
        super().__init__()
        self.image, self.projection = copy.deepcopy(image), copy.deepcopy(projection)
        self.told = copy.deepcopy(told)
        # The copy's trunk must run its own method, not the one bound to the original.
        self.image.trunk.forward = self.image.trunk.forward_features

    def forward(self, images: Tensor) -> Tensor:
        pooled, _ = self.image(images)
        return self.projection(pooled if self.told is None else self.told(pooled, None))

    def no_weight_decay(self) -> set[str]:
        """Names that do not decay, beside norms and biases."""
        return {f"image.{name}" for name in self.image.no_weight_decay()}


class TwoTower(Model):
    """Image and text encoders with bias-free linear projections to a shared unit sphere.

    Source: microsoft/UniCL, model/model.py.

    With `model.similarity=late` two more of them project every token to `token_dim` numbers
    (FILIP, arXiv 2111.07783), and these features are what is trained and compared.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.image = TimmTower(cfg.image)
        self.text = TEXT_TOWERS[cfg.text.name](cfg.text)
        lift_zero_dim(self.text)
        self.image_width = self.image.width
        self.text_width = self.text.width
        self.image_projection = nn.Linear(self.image_width, cfg.embed_dim, bias=False)
        self.text_projection = nn.Linear(self.text_width, cfg.embed_dim, bias=False)
        nn.init.trunc_normal_(self.image_projection.weight, std=INIT_STD)
        nn.init.trunc_normal_(self.text_projection.weight, std=INIT_STD)
        self.regions = RegionPath(cfg, self.image.trunk) if cfg.regions else None
        self.augmentation = None
        if cfg.augmentation is not None:
            self.augmentation = AugmentationHead(cfg.augmentation, self.image_width)
        self.late = cfg.similarity == "late"
        if self.late:
            _check_prefix(self.image, cfg.image.name)
            self.image_token_projection = nn.Linear(self.image_width, cfg.token_dim, bias=False)
            self.text_token_projection = nn.Linear(self.text_width, cfg.token_dim, bias=False)
            nn.init.trunc_normal_(self.image_token_projection.weight, std=INIT_STD)
            nn.init.trunc_normal_(self.text_token_projection.weight, std=INIT_STD)

    def encode_image(self, images: Tensor, augmentation: Tensor | None = None) -> dict[str, Tensor]:
        """As `Model.encode_image`; pooled and tokens are those of the trunk, which is not told what
        was done to an image. Class and register tokens take no part in late interaction.

        Raises:
            ValueError: `augmentation` is given to a model without `model.augmentation`.
        """
        pooled, tokens = self.pool(images.to(self.image_projection.weight.dtype))
        if self.augmentation is not None:
            told = self.augmentation(pooled, augmentation)
        elif augmentation is None:
            told = pooled
        else:
            raise ValueError(
                "this model cannot be told what was done to an image: it has no model.augmentation"
            )
        projected = self.image_projection(told).float()
        out = {
            "feature": F.normalize(projected, dim=-1),
            "projected": projected,
            "pooled": pooled,
            "tokens": tokens,
        }
        if self.late:
            places = tokens[:, self.image.prefix_tokens :]
            out["token_features"] = _units(self.image_token_projection, places)
        return out

    def encode_regions(self, objects: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Encode objects of images, where the configuration has `model.regions`.

        Args:
            objects: (b, R, W) features of regions. mask: (b, R) bool, True where there is one.

        Returns:
            feature: (b, D) float32 of unit length; pooled: (b, image_width) before the projection
            of images.
        """
        pooled = self.regions(self.image.trunk, objects, mask)
        return {
            "feature": F.normalize(self.image_projection(pooled).float(), dim=-1),
            "pooled": pooled,
        }

    def pool(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`pooled` and `tokens` of `encode_image`."""
        return self.image(images)

    def encode_text(self, input_ids: Tensor) -> dict[str, Tensor]:
        """As `Model.encode_text`."""
        pooled, tokens = self.text(input_ids)
        projected = self.text_projection(pooled).float()
        mask = self.text_mask(input_ids[:, : tokens.shape[1]])
        out = {
            "feature": F.normalize(projected, dim=-1),
            "projected": projected,
            "pooled": pooled,
            "tokens": tokens,
            "mask": mask,
        }
        if self.late:
            missing = self.cfg.text.context_length - tokens.shape[1]
            features = _units(self.text_token_projection, tokens)
            out["token_features"] = F.pad(features, (0, 0, 0, missing))
            out["token_mask"] = F.pad(mask, (0, missing))
        return out

    @property
    def text_has_dropout(self) -> bool:
        """As `Model.text_has_dropout`."""
        return self.text.has_dropout

    def text_mask(self, input_ids: Tensor) -> Tensor:
        """As `Model.text_mask`."""
        return self.text.mask(input_ids)

    def towers(self) -> dict[str, nn.Module]:
        """As `Model.towers`."""
        return {"image tower": self.image, "text tower": self.text}

    def graphs(self) -> list[tuple[nn.Module, bool]]:
        """As `Model.graphs`. Of the text tower the encoder alone: outside of training the tower
        reads the longest length from the device."""
        return [(self.image, False), (self.text.encoder, True)]

    def image_encoder(self) -> nn.Module:
        """As `Model.image_encoder`."""
        return ImageEncoder(self.image, self.image_projection, self.augmentation)

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
        names = super().no_weight_decay()
        names |= {f"image.{name}" for name in self.image.no_weight_decay()}
        return names | {f"text.{name}" for name in self.text.no_weight_decay()}


def _units(projection: nn.Linear, tokens: Tensor) -> Tensor:
    """Tokens (b, N, W), projected, float32 and of unit length (b, N, d)."""
    return F.normalize(projection(tokens).float(), dim=-1)


def _check_prefix(tower: TimmTower, name: str) -> None:
    """Refuse a trunk whose class token cannot be told from the places of the image."""
    silent = not hasattr(tower.trunk, "num_prefix_tokens")
    if silent and any("cls_token" in key for key, _ in tower.trunk.named_parameters()):
        raise ConfigError(
            f"model.similarity=late: timm does not say which tokens of '{name}' are class tokens; "
            "use a ViT, or a trunk without them such as Swin or ResNet"
        )
