"""A model to use: with the transform of its images and the tokenizer of its texts (`models.load`).

The three of CLIP_benchmark (clip_benchmark/models/__init__.py) and of open_clip, in their order.
Transform and tokenizer are those of every evaluation here.
"""

from __future__ import annotations

from pathlib import Path

from loaders import tokenizers
from loaders.tokenizers import Renderer, Tokenizer
from models import weights
from models.base import Model
from models.config import ModelConfig
from models.transform import Transform


def load(path: str | Path) -> tuple[Model, Transform, Tokenizer | Renderer]:
    """`models.load`."""
    model = weights.load(path).model
    return model, Transform.of(model.cfg), tokenizer(model.cfg)


def tokenizer(cfg: ModelConfig) -> Tokenizer | Renderer:
    """The tokenizer of a configuration: a list of texts -> (n, L) int64, of a model that reads
    drawn texts (n, 1, H, W) uint8. Raises ConfigError as `loaders.tokenizers.build`."""
    return tokenizers.build(cfg.text.tokenizer, cfg.text.context_length, cfg.image.size)
