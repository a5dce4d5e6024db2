"""What all sections of `model:` are read by, and those of parts that only some models have."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from loaders.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


class Section:
    """Shared reading of one configuration section; `where` names it in error messages."""

    where = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the section from a mapping.

        Raises:
            ConfigError: `values` is no mapping, or has a key that the section does not have.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.where}: expected a mapping of settings, got {values!r}")
        known = [item.name for item in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean '{nearest[0]}'?" if nearest else f"known keys: {known}"
                raise ConfigError(f"unknown key '{cls.where}.{key}': {hint}")
        return cls(**values)

    def require_positive(self, *names: str) -> None:
        """Raise `ConfigError` unless each of these settings is a positive whole number."""
        for name in names:
            value = getattr(self, name)
            ok = isinstance(value, int) and not isinstance(value, bool) and value > 0
            require(ok, f"{self.where}.{name} must be a positive integer, got {value!r}")


@dataclass(frozen=True)
class RegionsConfig(Section):
    """Objects of an image, through the last blocks of a ViT (`models.regions`); for training only.

    `width` is the length of a region's features, `count` the number of regions that an image is
    padded or cut to, `blocks` how many of the trunk's last blocks they pass. Defaults: PyramidCLIP.
    """

    width: int = 2052
    count: int = 10
    blocks: int = 3

    where = "model.regions"

    def __post_init__(self) -> None:
        self.require_positive("width", "count", "blocks")


@dataclass(frozen=True)
class ReferenceConfig(Section):
    """What a model of the kind `reference` looks up, and how (`models.reference`).

    `folder` is a reference folder, made by `eval.reference`; `neighbours` of its pairs are looked
    up for each image, and `heads` is the number of heads of the attention over them. `checksum` is
    the folder's: a run writes the one that it is trained with into its own configuration, and
    another folder is refused from then on. None takes the folder as it is.
    """

    folder: str
    neighbours: int = 64
    heads: int = 8
    checksum: str | None = None

    where = "model.reference"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """As `Section.from_dict`, and ConfigError without a folder."""
        if isinstance(values, Mapping):
            require(
                isinstance(values.get("folder"), str),
                f"{cls.where}.folder: give a reference folder, made by python -m eval.reference",
            )
        return super().from_dict(values)

    def __post_init__(self) -> None:
        self.require_positive("neighbours", "heads")


@dataclass(frozen=True)
class AugmentationConfig(Section):
    """The part that is told what was done to an image (`models.augmentation`).

    `width` is that of the encoder of an image view's parameters and of what it makes of them,
    `hidden` that of the hidden layer which joins this with the image.
    """

    width: int = 256
    hidden: int = 1024

    where = "model.augmentation"

    def __post_init__(self) -> None:
        self.require_positive("width", "hidden")
