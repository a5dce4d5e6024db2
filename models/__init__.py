"""Image and text towers. `models.build(cfg)` is the way in; the package itself loads no torch."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.base import Model
    from models.config import ModelConfig


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
