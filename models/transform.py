"""The evaluation transform of a model's images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from loaders import views
from loaders.decoders import rgb
from models.config import INTERPOLATION, ModelConfig

if TYPE_CHECKING:
    from PIL import Image

    from loaders.crops import Picture


@dataclass(frozen=True)
class Transform:
    """The evaluation transform: shorter side to `size` pixels, centre crop, normalised.

    `mean` and `std` are the channel statistics of RGB values in [0, 1].
    """

    size: int
    mean: Sequence[float]
    std: Sequence[float]

    @classmethod
    def of(cls, cfg: ModelConfig) -> Transform:
        """That of a configuration."""
        return cls(cfg.image.size, cfg.image.mean, cfg.image.std)

    def __post_init__(self) -> None:
        view = views.build_eval(self.size, self.size, INTERPOLATION)
        object.__setattr__(self, "_view", view)

    def __call__(self, image: Image.Image) -> Tensor:
        """An opened image of any mode as `encode_image` takes it, (3, size, size) float32.

        Turned as its EXIF data says, transparency on white, as in training and evaluation; `image`
        stays as it is. Raises `loaders.views.BadImage` for one that cannot be used.
        """
        return self.normalize(self.pixels(rgb(image)))

    def pixels(self, picture: Picture) -> Tensor:
        """Resized and cropped: an RGB picture (`loaders.crops`) -> uint8 (3, size, size).

        Raises `loaders.views.BadImage` for one that would become too large.
        """
        return self._view(picture)

    def normalize(self, pixels: Tensor) -> Tensor:
        """(pixels / 255 - mean) / std: uint8 (..., 3, H, W) -> float32 of the same shape."""
        return views.normalize(pixels, self.mean, self.std)
