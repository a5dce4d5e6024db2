"""Image and text towers: `models.build(cfg)` makes a model, `models.load(path)` opens one.

The package itself loads no torch.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from loaders.tokenizers import Renderer, Tokenizer
    from models.base import Model
    from models.config import ModelConfig
    from models.transform import Transform


def build(cfg: ModelConfig | Mapping[str, Any]) -> Model:
    """Build an initialised model from the `model:` section of a run's configuration.

    Args:
        cfg: a `ModelConfig`, or a nested mapping with the same keys.

    Raises:
        ConfigError: an unknown key or image tower, a bad value, or a tower that cannot take
            the configured image size.
    """
    from models.config import KINDS, ModelConfig

    cfg = cfg if isinstance(cfg, ModelConfig) else ModelConfig.from_dict(cfg)
    return pkgutil.resolve_name(KINDS[cfg.kind][cfg.text.name])(cfg)


def load(path: str | Path) -> tuple[Model, Transform, Tokenizer | Renderer]:
    """Open a model to use it.

        model, transform, tokenizer = models.load("runs/mine")
        image = transform(PIL.Image.open("cat.jpg"))[None]
        image, text, scale = model(image, tokenizer(["a cat", "a dog"]))
        (scale * image @ text.T).softmax(-1)

    Args:
        path: a run or checkpoint folder, an export, a weights file with its configuration beside
            it, or another project's file; `models.weights.load` says which.

    Returns:
        The model (`models.base.Model`) in evaluation mode, float32, on the CPU; its evaluation
        transform: PIL image -> (3, size, size) float32; its tokenizer: list of texts -> (n, L)
        int64, of a model that reads drawn texts (n, 1, H, W) uint8.

    Raises:
        DataError: as `models.weights.load`. ConfigError: a tokenizer that cannot be had.
    """
    # By name: what it reads builds models, and so imports this package.
    return pkgutil.resolve_name("models.loading:load")(path)
