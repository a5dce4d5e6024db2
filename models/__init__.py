"""Image and text towers. `models.build(cfg)` is the way in; the package itself loads no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.base import Model
    from models.config import ModelConfig

# (`model.kind`, `model.text.name`) -> where the class is, which is loaded when it is built. None:
# any text that `models.config.KINDS` lists for the kind.
KINDS = {
    ("two_tower", None): ("models.two_tower", "TwoTower"),
    ("one_tower", "transformer"): ("models.joint_tower", "JointTower"),
    ("one_tower", "pixels"): ("models.pixel_tower", "PixelTower"),
    ("reference", None): ("models.reference", "ReferenceModel"),
}


def build(cfg: ModelConfig | Mapping[str, Any]) -> Model:
    """Build an initialised model from the `model:` section of a run's configuration.

    Args:
        cfg: a `ModelConfig`, or a nested mapping with the same keys.

    Raises:
        ConfigError: an unknown key or image tower, a bad value, or a tower that cannot take
            the configured image size.
    """
    from models.config import ModelConfig

    cfg = cfg if isinstance(cfg, ModelConfig) else ModelConfig.from_dict(cfg)
    module, name = KINDS.get((cfg.kind, cfg.text.name)) or KINDS[cfg.kind, None]
    return getattr(importlib.import_module(module), name)(cfg)
