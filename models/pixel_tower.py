"""One tower for photographs and for texts that are drawn as pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.base import Model
from models.config import ModelConfig
from models.image_timm import TimmTower
from models.text_transformer import INIT_STD
from models.two_tower import ImageEncoder

PROBE = "attn_pool.latent"  # timm's name for the query of attention pooling


class PixelTower(Model):
    """One image trunk and one linear projection encode both, in two passes with the same weights.

    There is no tokenizer, no mark that tells texts from photographs, and no weight for texts alone.
    Source: CLIPPO (arXiv 2212.08045; google-research/big_vision, models/proj/clippo/one_tower.py),
    where the trunk is a ViT without a class token, pooled by attention, and the projection has a
    bias.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.image = TimmTower(cfg.image)
        self.image_width = self.text_width = self.image.width
        self.projection = nn.Linear(self.image.width, cfg.embed_dim)
        nn.init.trunc_normal_(self.projection.weight, std=INIT_STD)
        nn.init.zeros_(self.projection.bias)

    def encode_image(self, images: Tensor) -> dict[str, Tensor]:
        """As `Model.encode_image`; tokens are those of the trunk."""
        pooled, tokens = self.image(images.to(self.projection.weight.dtype))
        projected = self.projection(pooled).float()
        return {
            "feature": F.normalize(projected, dim=-1),
            "projected": projected,
            "pooled": pooled,
            "tokens": tokens,
        }

    def encode_text(self, input_ids: Tensor) -> dict[str, Tensor]:
        """As `Model.encode_text`, of pictures of texts; every token counts as text."""
        encoded = self.encode_image(self.normalized(input_ids))
        return {**encoded, "mask": self.text_mask(input_ids)}

    def normalized(self, pictures: Tensor) -> Tensor:
        """Pictures of texts as the images of a batch are: (b, 1, H, W) uint8 -> (b, 3, H, W).

        Float32, from -1 to nearly 0 where the image statistics are 0.5.
        """
        # Numbers, not tensors, which would have to travel to the device in every step.
        values, image = pictures.float() / 255, self.cfg.image
        channels = [(values - m) / s for m, s in zip(image.mean, image.std, strict=True)]
        return torch.cat(channels, dim=1)

    def text_mask(self, input_ids: Tensor) -> Tensor:
        """(b, N) bool, True for every token of the trunk: a picture has no padding."""
        shape = len(input_ids), self.image.length
        return torch.ones(shape, dtype=torch.bool, device=input_ids.device)

    def towers(self) -> dict[str, nn.Module]:
        """As `Model.towers`."""
        return {"image and text tower": self.image}

    def graphs(self) -> list[tuple[nn.Module, bool]]:
        """As `Model.graphs`."""
        return [(self.image, False)]

    def image_encoder(self) -> nn.Module:
        """As `Model.image_encoder`."""
        return ImageEncoder(self.image, self.projection)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `Model.set_grad_checkpointing`."""
        self.image.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """As `Model.no_weight_decay`: `logit_scale`, what timm names for the trunk (positions),
        and the query of attention pooling, since CLIPPO decays kernels alone."""
        names = {*self.image.no_weight_decay()}
        names |= {name for name, _ in self.image.named_parameters() if name.endswith(PROBE)}
        return super().no_weight_decay() | {f"image.{name}" for name in names}
