"""Image and text towers. `models.build(cfg)` is the way in; the package itself loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.two_tower import TwoTower


def build(cfg: ModelConfig | Mapping[str, Any]) -> TwoTower:
    """Build an initialised two-tower model from the `model:` section of a run's configuration.

    Args:
        cfg: a `ModelConfig`, or a nested mapping with the same keys.

    Raises:
        ConfigError: an unknown key or image tower, a bad value, or a tower that cannot take
            the configured image size.
    """
    from models.config import ModelConfig
    from models.two_tower import TwoTower

    return TwoTower(cfg if isinstance(cfg, ModelConfig) else ModelConfig.from_dict(cfg))
