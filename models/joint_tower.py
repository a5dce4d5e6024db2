"""One tower for images, texts and both at once: a ViT whose blocks also read words (OneR).

Source: Jang et al., "Unifying Vision-Language Representation Space with Single-Tower Transformer"
(AAAI 2023, arXiv 2211.11153). Patch tokens come from a timm ViT, word tokens from an embedding of
the tokenizer's ids with positions of their own; either sequence, or the one behind the other, goes
through the ViT's blocks, and the mean over all tokens that are not padding through a projection.

Ours, because the paper's details were not available to us: no class or register token (those of
the ViT are left out), no embedding that says which kind a token is, the final norm before the mean,
and attention in both directions among all tokens, the start and the end of a text included.
"""

from __future__ import annotations

import copy

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from loaders.errors import ConfigError
from models.base import Model
from models.config import ModelConfig, TextConfig
from models.image_timm import create_trunk, lift_zero_dim
from models.text_transformer import CLIP_END_ID, INIT_STD, end_positions


def _vit(cfg: ModelConfig) -> VisionTransformer:
    """The trunk of the configuration, if words can go through its blocks as patches do."""
    trunk = create_trunk(cfg.image)
    lift_zero_dim(trunk)
    if not isinstance(trunk, VisionTransformer):
        raise ConfigError(
            f"model.image.name={cfg.image.name}: model.kind=one_tower sends words through a ViT's "
            "blocks, and this is no VisionTransformer of timm; give a name such as vit_base_patch16"
        )
    missing = {
        "timm's plain blocks": not all(isinstance(block, Block) for block in trunk.blocks),
        "learnt positions": trunk.pos_embed is None,
        "a fixed image size": trunk.dynamic_img_size,
        "all of its patches": not isinstance(trunk.patch_drop, nn.Identity),
        "a norm behind its blocks": isinstance(trunk.norm, nn.Identity),
    }
    if needed := [name for name, lacks in missing.items() if lacks]:
        raise ConfigError(
            f"model.image.name={cfg.image.name} with kwargs {dict(cfg.image.kwargs)}: model.kind="
            f"one_tower needs {', '.join(needed)}; give another name, or leave the argument out"
        )
    heads = trunk.blocks[0].attn.num_heads
    sizes = {"width": trunk.embed_dim, "layers": len(trunk.blocks), "heads": heads}
    for name, value in sizes.items():
        if getattr(cfg.text, name) != value:
            raise ConfigError(
                f"model.text.{name}={getattr(cfg.text, name)}: in one tower words go through the "
                f"blocks of model.image={cfg.image.name}; give model.text.{name}={value}, theirs"
            )
    return trunk


class PatchTokens(nn.Module):
    """Patch embedding and positions of a ViT: (b, 3, H, W) -> (b, N, W)."""

    def __init__(self, trunk: VisionTransformer) -> None:
        super().__init__()
        self.embed = trunk.patch_embed
        others = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
        self.positions = nn.Parameter(trunk.pos_embed[:, others:].detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(images.to(self.positions.dtype)) + self.positions


class WordTokens(nn.Module):
    """Embedding and positions of token ids: (b, L) int64 -> (b, L, W)."""

    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.width)
        self.positions = nn.Embedding(cfg.context_length, cfg.width)
        for table in (self.embed, self.positions):
            nn.init.trunc_normal_(table.weight, std=INIT_STD)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.embed(input_ids) + self.positions(places)


class Transformer(nn.Module):
    """Blocks of a ViT and what is around them, for tokens of any kind."""

    def __init__(self, trunk: VisionTransformer) -> None:
        super().__init__()
        self.drop, self.norm_pre = trunk.pos_drop, trunk.norm_pre
        self.blocks, self.norm = trunk.blocks, trunk.norm
        self.grad_checkpointing = False

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """States after the final norm.

        Args:
            tokens: (b, N, W). mask: (b, N) bool, True where a token may be looked at; or
                (b, N, N), of each token (rows) what it may look at (columns). None: all.

        Returns:
            (b, N, W).
        """
        if mask is not None:
            mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        states = self.norm_pre(self.drop(tokens))
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                states = checkpoint(block, states, mask, use_reentrant=False)
            else:
                states = block(states, attn_mask=mask)
        return self.norm(states)

    @property
    def has_dropout(self) -> bool:
        """Whether equal tokens have different states in training."""
        rates = [module.p for module in self.modules() if isinstance(module, nn.Dropout)]
        rates += [module.drop_prob for module in self.modules() if isinstance(module, DropPath)]
        return any(rate > 0 for rate in rates)


def mean(states: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens, those of `mask` (b, N) bool alone if given: (b, N, W) -> (b, W)."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    weights = torch.ones_like(wide[..., :1]) if mask is None else mask[..., None].to(wide.dtype)
    return ((wide * weights).sum(1) / weights.sum(1)).to(states.dtype)


class ImageEncoder(nn.Module):
    """What of the tower encodes images, by itself: (b, 3, H, W) -> (b, D) before unit length."""

    def __init__(self, patches: nn.Module, transformer: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.patches, self.transformer, self.projection = patches, transformer, projection

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(mean(self.transformer(self.patches(images))))

    def no_weight_decay(self) -> set[str]:
        """Names that do not decay, beside norms and biases."""
        return {"patches.positions"}


class JointTower(Model):
    """`model.kind: one_tower` with `model.text.name: transformer`.

    `image_width` and `text_width` are both the width of the ViT. With `two_projections` images and
    texts have a projection each (the row "two heads" of the paper's ablation), and in an image with
    a text each token goes through that of its kind.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        trunk = _vit(cfg)
        self.image_width = self.text_width = trunk.embed_dim
        self.patches = PatchTokens(trunk)
        self.words = WordTokens(cfg.text)
        self.transformer = Transformer(trunk)
        for side in ("image_", "text_") if cfg.two_projections else ("",):
            projection = nn.Linear(trunk.embed_dim, cfg.embed_dim, bias=False)
            nn.init.trunc_normal_(projection.weight, std=INIT_STD)
            self.add_module(f"{side}projection", projection)

    def _side(self, name: str) -> nn.Linear:
        """The projection of the side `image` or `text`."""
        return getattr(self, f"{name}_projection" if self.cfg.two_projections else "projection")

    def encode_image(self, images: Tensor) -> dict[str, Tensor]:
        """As `Model.encode_image`; tokens are the states of the patches."""
        return self._encoded(self.transformer(self.patches(images)), None, "image")

    def encode_text(self, input_ids: Tensor) -> dict[str, Tensor]:
        """As `Model.encode_text`: L' is L in training, else the longest text of the batch."""
        mask = self.text_mask(input_ids)
        if not self.training:
            longest = int(mask.sum(1).max())
            input_ids, mask = input_ids[:, :longest], mask[:, :longest]
        tokens = self.transformer(self.words(input_ids), mask)
        return {**self._encoded(tokens, mask, "text"), "mask": mask}

    def _encoded(self, tokens: Tensor, mask: Tensor | None, side: str) -> dict[str, Tensor]:
        pooled = mean(tokens, mask)
        projected = self._side(side)(pooled).float()
        return {
            "feature": F.normalize(projected, dim=-1),
            "projected": projected,
            "pooled": pooled,
            "tokens": tokens,
        }

    def encode_pair(self, images: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        """Encode each image together with a text, which see each other.

        Args:
            images: (b, 3, H, W) float. input_ids: (b, L) int64.

        Returns:
            image: F(I|T), the mean over the image's tokens; text: F(T|I), over the text's; both:
            F(I,T|I,T), over all; each projected, (b, D) float32 of unit length.
            image_tokens (b, N, W), text_tokens (b, L, W): their states; mask: (b, L) bool, where
            a token is text.
        """
        patches, mask = self.patches(images), self.text_mask(input_ids)
        seen = F.pad(mask, (patches.shape[1], 0), value=True)
        states = self.transformer(torch.cat([patches, self.words(input_ids)], 1), seen)
        of_image, of_text = states.split([patches.shape[1], mask.shape[1]], 1)
        image = self._encoded(of_image, None, "image")["projected"]
        text = self._encoded(of_text, mask, "text")["projected"]
        # The projection is linear: of the mean over all tokens it is the mean by their numbers.
        words = mask.sum(1, keepdim=True).to(text.dtype)
        both = (of_image.shape[1] * image + words * text) / (of_image.shape[1] + words)
        tokens = {"image_tokens": of_image, "text_tokens": of_text, "mask": mask}
        projected = {"image": image, "text": text, "both": both}
        return {name: F.normalize(x, dim=-1) for name, x in projected.items()} | tokens

    @property
    def text_has_dropout(self) -> bool:
        """As `Model.text_has_dropout`."""
        return self.transformer.has_dropout

    def text_mask(self, input_ids: Tensor) -> Tensor:
        """As `Model.text_mask`."""
        ends = end_positions(input_ids, CLIP_END_ID)
        return torch.arange(input_ids.shape[1], device=ends.device) <= ends[:, None]

    def towers(self) -> dict[str, nn.Module]:
        """As `Model.towers`."""
        return {"patches": self.patches, "words": self.words, "their tower": self.transformer}

    def graphs(self) -> list[tuple[nn.Module, bool]]:
        """As `Model.graphs`."""
        return [(self.transformer, True)]

    def image_encoder(self) -> nn.Module:
        """As `Model.image_encoder`."""
        parts = (self.patches, self.transformer, self._side("image"))
        return ImageEncoder(*copy.deepcopy(parts))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `Model.set_grad_checkpointing`, of the blocks."""
        self.transformer.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """As `Model.no_weight_decay`: the positions of patches, as timm has it, and of words."""
        return {*super().no_weight_decay(), "patches.positions", "words.positions.weight"}
