"""Random resized crops of training images: torchvision's boxes, resized by torch.

The resize is bicubic with antialiasing, Pillow's kernel (a = -0.5), by torch's code for uint8,
whose weights are rounded to 16 bits. Beside `torchvision.transforms.v2.RandomResizedCrop` on a PIL
image, one value in some hundreds is a level (of 255) away and none more than two. Only where Pillow
(since 13) resizes columns before rows, which is where they lose more than twice as many pixels
(about one crop in 60), sharp edges are up to ten levels away and values a quarter of a level on
average, since the two round in between. tests/loaders/test_crops.py holds all of this. Evaluation
resizes with Pillow itself (`loaders.views.build_eval`).

A picture is a PIL RGB image or a tensor uint8 (3, H, W).
"""

import math
import warnings
from functools import cache

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import get_size, to_pil_image

Picture = Image.Image | Tensor
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels

RATIO = (3 / 4, 4 / 3)  # of width to height, torchvision's default


class RandomCrop:
    """Random box of a share `scale` of the area, resized: picture -> uint8 (3, size, size).

    Args:
        size: side of the square result in pixels.
        scale: smallest and largest share of the area.
    """

    def __init__(self, size: int, scale: tuple[float, float]) -> None:
        self._size, self._scale = size, scale

    def __call__(self, picture: Picture) -> Tensor:
        height, width = get_size(picture)
        return resize(picture, random_box(width, height, self._scale), self._size)


class TimmCrop:
    """timm's random resized crop, with its boxes, bicubic: picture -> PIL RGB image."""

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self._crop = crop

    def __call__(self, picture: Picture) -> Image.Image:
        crop = self._crop
        top, left, height, width = crop.get_params(picture, crop.scale, crop.ratio)
        # timm draws sides of 0 in pictures of a few pixels, and a corner on the far edge with them.
        all_rows, all_columns = get_size(picture)
        height, width = max(height, 1), max(width, 1)
        top, left = min(top, all_rows - height), min(left, all_columns - width)
        box = left, top, left + width, top + height
        return to_pil_image(resize(picture, box, crop.size[0]))


def random_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float] = RATIO
) -> Box:
    """A box as torchvision 0.29's RandomResizedCrop draws it, and from the same random numbers.

    Its share of the area is in `scale`, its width to height in `ratio`. The numbers come from
    torch's global generator. Written again because a crop needs a dozen numbers, and that class
    takes as long to draw them as torch takes to resize.
    """
    number, logarithms = torch.empty(1), _logarithms(ratio)
    for _ in range(10):
        area = width * height * number.uniform_(*scale).item()
        drawn = number.uniform_(*logarithms).exp_().item()
        w, h = round(math.sqrt(area * drawn)), round(math.sqrt(area / drawn))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, (1,)).item()
            left = torch.randint(0, width - w + 1, (1,)).item()
            return left, top, left + w, top + h
    # The image is too thin or too flat for its share: the largest centred box of that ratio.
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def window_box(width: int, height: int, share: float, square: bool) -> Box:
    """A box at a place drawn uniformly, whose sides are a share of the picture's.

    It shows what a picture shows that is resized and then cut at random: of each side, or with
    `square` of the shorter side, as where the resize keeps the shape.
    """
    sides = (min(width, height),) * 2 if square else (width, height)
    w, h = (max(1, round(share * side)) for side in sides)
    top = torch.randint(0, height - h + 1, (1,)).item()
    left = torch.randint(0, width - w + 1, (1,)).item()
    return left, top, left + w, top + h


@cache
def _logarithms(ratio: tuple[float, float]) -> list[float]:
    return torch.log(torch.tensor(ratio)).tolist()


def resize(picture: Picture, box: Box, size: int) -> Tensor:
    """What is in the box of a picture: uint8 (3, size, size), contiguous."""
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
