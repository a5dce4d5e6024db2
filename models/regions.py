"""Features of the objects in a picture, through the last blocks of its tower (PyramidCLIP, 2022).

A detector has found up to R regions of an image and given each W numbers. They are projected to the
width of the trunk, the trunk's class token goes before them, and after a LayerNorm they pass its
last blocks and its final LayerNorm; the class token's state is pooled as an image's is. Positions
are not added: boxes are among the W numbers. Source: arXiv 2204.14095 and the released model of
Yuting-Gao/PyramidCLIP. There regions that are missing take part as rows of zeros; here no token
attends to them. Whether the first LayerNorm is the tower's own is not said; here it is another one.
"""

from __future__ import annotations

from types import MethodType

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from loaders.errors import ConfigError
from models.config import ModelConfig
from models.text_transformer import INIT_STD

UNTRAINED = 1e-4  # a class token below it is as timm's VisionTransformer starts it, at 1e-6


class RegionPath(nn.Module):
    """What regions need beside the trunk: their projection and LayerNorm.

    Changes what a call of the trunk takes (`_features`), because ZeRO-3 gathers the class token
    only there.

    Raises:
        ConfigError: the trunk is not a plain ViT of timm with a class token, or has fewer blocks.
    """

    def __init__(self, cfg: ModelConfig, trunk: nn.Module) -> None:
        super().__init__()
        _require_plain(cfg, trunk)
        self.depth = cfg.regions.blocks
        self.projection = nn.Linear(cfg.regions.width, trunk.embed_dim, bias=False)
        self.norm = nn.LayerNorm(trunk.embed_dim)
        nn.init.trunc_normal_(self.projection.weight, std=INIT_STD)
        if trunk.cls_token.abs().max() < UNTRAINED:
            # timm starts it at nothing, since a position is added to it. Here none is, and the
            # LayerNorms would multiply its gradient by thousands. As OpenAI's CLIP starts it.
            nn.init.normal_(trunk.cls_token, std=trunk.embed_dim**-0.5)
        trunk.forward = MethodType(_features, trunk)

    def forward(self, trunk: nn.Module, regions: Tensor, mask: Tensor) -> Tensor:
        """Pooled features.

        Args:
            trunk: the one that this path was made for.
            regions: (b, R, W) floats; cast to the weights' type.
            mask: (b, R) bool, True where there is a region.

        Returns:
            (b, width); of an image without any region a constant.
        """
        tokens = self.projection(regions.to(self.projection.weight.dtype))
        states = trunk(regions=tokens, mask=mask, norm=self.norm, depth=self.depth)
        return trunk.forward_head(states, pre_logits=True)


def _features(
    trunk: nn.Module,
    images: Tensor | None = None,
    regions: Tensor | None = None,
    mask: Tensor | None = None,
    norm: nn.Module | None = None,
    depth: int = 0,
) -> Tensor:
    """`forward_features` of images, or the states (b, 1 + R, width) of projected regions."""
    if regions is None:
        return trunk.forward_features(images)
    tokens = norm(torch.cat([trunk.cls_token.expand(len(regions), -1, -1), regions], 1))
    seen = torch.nn.functional.pad(mask, (1, 0), value=True)[:, None, None]
    # As numbers: timm adds a mask to the scores where its fused attention is switched off.
    added = torch.zeros_like(seen, dtype=tokens.dtype).masked_fill(~seen, float("-inf"))
    for block in trunk.blocks[-depth:]:
        tokens = block(tokens, attn_mask=added)
    return trunk.norm(tokens)


def _require_plain(cfg: ModelConfig, trunk: nn.Module) -> None:
    plain = (
        type(trunk) is VisionTransformer
        and trunk.cls_token is not None
        and trunk.global_pool == "token"
        and trunk.attn_pool is None
        and all(type(block) is Block for block in trunk.blocks)
    )
    if not plain:
        raise ConfigError(
            f"model.regions goes through the last blocks of a ViT with a class token, which image "
            f"tower '{cfg.image.name}' is not; there are vit_base_patch16, and of timm for example "
            "vit_base_patch32_clip_224 and vit_small_patch16_224; or set model.regions=null"
        )
    if cfg.regions.blocks > len(trunk.blocks):
        raise ConfigError(
            f"model.regions.blocks={cfg.regions.blocks}: image tower '{cfg.image.name}' has "
            f"{len(trunk.blocks)} blocks"
        )
