"""Random resized crops: torchvision's boxes, and two ways to resize what is in them.

Both are bicubic with antialiasing, Pillow's kernel, a = -0.5. `reference` gives Pillow's pixels, so
those of `torchvision.transforms.v2.RandomResizedCrop` on a PIL image, to the bit, by the code of
`loaders.resample`. `fast` is torch's code for uint8, with weights rounded to 16 bits: in most crops
one value in some hundreds is a level (of 255) away, in a few crops that hardly change the size one
in ten, never more than two levels.

A picture is a PIL RGB image or a tensor uint8 (3, H, W).
"""

import functools
import math
import warnings
from collections.abc import Callable

import numpy as np
import PIL
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import get_size, to_pil_image

from loaders.errors import ConfigError

DECODES = ("reference", "fast")
Picture = Image.Image | Tensor
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
Resizer = Callable[[Picture, Box, int], Tensor]

_LOG_RATIO = torch.log(torch.tensor((3 / 4, 4 / 3))).tolist()


class RandomCrop:
    """Random box of a share `scale` of the area, resized: picture -> uint8 (3, size, size).

    Args:
        size: side of the square result in pixels.
        scale: smallest and largest share of the area.
        decode: `reference` or `fast`.
    """

    def __init__(self, size: int, scale: tuple[float, float], decode: str) -> None:
        self._size, self._scale, self._resize = size, scale, resizer(decode)

    def __call__(self, picture: Picture) -> Tensor:
        height, width = get_size(picture)
        return self._resize(picture, random_box(width, height, self._scale), self._size)


class TimmCrop:
    """timm's random resized crop, with its boxes, bicubic: picture -> PIL RGB image."""

    def __init__(self, crop: RandomResizedCropAndInterpolation, decode: str) -> None:
        self._crop, self._resize = crop, resizer(decode)

    def __call__(self, picture: Picture) -> Image.Image:
        crop = self._crop
        top, left, height, width = crop.get_params(picture, crop.scale, crop.ratio)
        box = left, top, left + width, top + height
        return to_pil_image(self._resize(picture, box, crop.size[0]))


def check_decode(decode: str) -> None:
    """`ConfigError` for a word that is not a choice."""
    if decode not in DECODES:
        raise ConfigError(f"data.decode={decode!r} is not one of {', '.join(DECODES)}")


def resizer(decode: str) -> Resizer:
    """The function of a choice; raises as `check_decode`."""
    check_decode(decode)
    return _reference() if decode == "reference" else resize_by_torch


@functools.cache
def _reference() -> Resizer:
    """`resize_exactly`; Pillow itself, with a warning, if the installed one has other pixels."""
    rng = np.random.default_rng(0)
    for width, height in ((96, 61), (50, 190), (190, 50), (21, 17)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        box = (1, 2, width - 3, height - 1)
        if not torch.equal(resize_exactly(image, box, 32), resize_by_pillow(image, box, 32)):
            warnings.warn(
                f"Pillow {PIL.__version__} resizes otherwise than the version in requirements.txt; "
                "its own code is used for data.decode=reference, which is four times as slow",
                stacklevel=2,
            )
            return resize_by_pillow
    return resize_exactly


def random_box(width: int, height: int, scale: tuple[float, float]) -> Box:
    """A box as torchvision 0.29's RandomResizedCrop draws it, and from the same random numbers.

    Its sides have a ratio of 3/4 to 4/3. The numbers come from torch's global generator.
    Written again because a crop needs a dozen numbers, and that class takes as long to draw
    them as torch takes to resize.
    """
    number = torch.empty(1)
    for _ in range(10):
        area = width * height * number.uniform_(*scale).item()
        ratio = number.uniform_(*_LOG_RATIO).exp_().item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, (1,)).item()
            left = torch.randint(0, width - w + 1, (1,)).item()
            return left, top, left + w, top + h
    # The image is too thin or too flat for its share: the largest centred box of that ratio.
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resize_exactly(picture: Picture, box: Box, size: int) -> Tensor:
    """What is in the box of a picture, resized as by Pillow: uint8 (3, size, size), contiguous."""
    from loaders import resample  # here: compiled when imported, and not all need it

    if isinstance(picture, Image.Image):
        # A copy: an array on Pillow's own memory cannot be written to, another type for the code.
        pixels, box = np.array(picture.crop(box)), (0, 0, box[2] - box[0], box[3] - box[1])
    else:
        pixels = np.ascontiguousarray(picture.permute(1, 2, 0).numpy())
    return torch.from_numpy(resample.resize(pixels, box, size, size))


def resize_by_pillow(picture: Picture, box: Box, size: int) -> Tensor:
    """As `resize_exactly`, by Pillow."""
    image = picture if isinstance(picture, Image.Image) else to_pil_image(picture)
    # Not `resize(box=…)`, which would blend in pixels from outside of the box.
    return to_tensor(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))


def resize_by_torch(picture: Picture, box: Box, size: int) -> Tensor:
    """As `resize_exactly`, by torch and nearly the same."""
    left, top, right, bottom = box
    if isinstance(picture, Image.Image):
        pixels = to_pixels(picture.crop(box))
    else:
        pixels = picture[:, top:bottom, left:right]
    square = (size, size)
    return interpolate(pixels[None], size=square, mode="bicubic", antialias=True)[0].contiguous()


def to_pixels(picture: Picture) -> Tensor:
    """uint8 (3, H, W) of a picture, with the memory layout of the PIL image."""
    if isinstance(picture, Tensor):
        return picture
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the array cannot be written to, and nobody does
        return torch.from_numpy(np.asarray(picture)).permute(2, 0, 1)


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB image -> uint8 (3, H, W), contiguous.

    Pillow takes the channels apart faster than numpy or torch turn (H, W, 3) round.
    """
    channels = bytearray().join(image.tobytes("raw", channel) for channel in "RGB")
    return torch.frombuffer(channels, dtype=torch.uint8).view(3, image.height, image.width)
