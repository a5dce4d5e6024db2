"""Images: bytes to RGB, training views and evaluation views.

Views are uint8 tensors (3, size, size), a quarter of the float bytes to move between processes
and to the device; `normalize` runs there. All randomness comes from the global generators of
`random`, numpy and torch, which `loaders.batch` seeds for each sample.
"""

import io
import itertools
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from loaders.crops import RandomCrop, TimmCrop, resizer, to_tensor
from loaders.errors import ConfigError

MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: 256 MiB of RGB
# A progressive JPEG may repeat a scan of a few bytes a thousand times, and each takes as long as
# the whole image (0.25 s at MAX_PIXELS). Real ones have about ten, hardly any are that large.
MAX_SCANNED_PIXELS = 16 * MAX_PIXELS
# No others: Pillow would start an external program for some (EPS) that may hide behind `.jpg`.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_TILE = 2048  # pixels
RECIPES = ("unicl_release", "paper", "clip", "clipart", "none")

View = Callable[[Image.Image], Tensor]


class BadImage(Exception):
    """An image that cannot be used; `reason` is one short word for the counts."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(f"{reason}: {detail}" if str(detail) else reason)
        self.reason = reason


def decode(data: bytes, upright: bool = True) -> Image.Image:
    """Decode an image to RGB, first frame, transparency composited on white.

    `upright`: turned as its EXIF data says; False for annotations of the pixels as stored.
    Raises `BadImage` with reason `zero_bytes`, `not_an_image`, `too_large` (more than
    MAX_PIXELS or MAX_SCANNED_PIXELS; found before decoding), `truncated`, `undecodable` or
    `unsupported_mode`.
    """
    if not data:
        raise BadImage("zero_bytes")
    with warnings.catch_warnings():
        # Pillow warns of large images, refused below, and of damaged meta data, of no use here.
        warnings.simplefilter("ignore")
        return _decode(data, upright)


def build_train(
    recipe: str,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    decode: str = "reference",
) -> View:
    """A random view: PIL RGB image -> uint8 (3, size, size).

    `decode`: `reference`, all resizing by Pillow as in torchvision and timm, or `fast`, by torch
    (`loaders.crops`): the same boxes and random numbers, nearly the same pixels.

    Recipes:
        unicl_release: the settings in the configuration file that microsoft/UniCL ships
            (inherited from Swin), through timm: random resized crop bicubic 0.08-1, flip,
            rand-m9-mstd0.5-inc1, random erasing 0.25 in pixel mode. Its colour jitter 0.4 has
            no effect beside RandAugment, there as here. Its MixUp and CutMix are left out:
            the read-me says that the released models were trained without them.
        paper: random resized crop bicubic 0.08-1 and flip. The training section of the paper
            was not available to us; this is the minimal standard recipe, not a claim.
        clip: random resized crop bicubic 0.9-1 only (open_clip's default).
        clipart: for small drawings on white: random resized crop bicubic 0.6-1, flip, mild
            colour jitter.
        none: resize of the shorter side and centre crop.
    Raises `ConfigError` for another name.
    """
    resizer(decode)  # refuses another word
    if recipe == "unicl_release":
        return _ReleaseView(size, mean, std, decode)
    if recipe == "none":
        return _EvalView(size, size, v2.InterpolationMode.BICUBIC, decode)
    if recipe == "paper":
        return _CropView(RandomCrop(size, (0.08, 1.0), decode), flip=True)
    if recipe == "clip":
        return _CropView(RandomCrop(size, (0.9, 1.0), decode), flip=False)
    if recipe == "clipart":
        jitter = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)
        return _CropView(RandomCrop(size, (0.6, 1.0), decode), True, jitter)
    raise ConfigError(f"image views {recipe!r} are unknown; there are {', '.join(RECIPES)}")


def build_eval(resize: int, crop: int, interpolation: str = "bicubic") -> View:
    """Resize the shorter side, then centre crop: PIL RGB image -> uint8 (3, crop, crop).

    Calling it raises `BadImage` (`too_elongated`) if the resized image would exceed MAX_PIXELS.
    """
    modes = {mode.value: mode for mode in v2.InterpolationMode}
    if crop > resize or interpolation not in modes:
        raise ConfigError(
            f"evaluation views: crop {crop} must not exceed resize {resize}, and interpolation "
            f"{interpolation!r} must be one of {', '.join(modes)}"
        )
    return _EvalView(resize, crop, modes[interpolation])


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """(images / 255 - mean) / std: uint8 (..., 3, H, W) -> dtype, same shape and device.

    Computed in float32 also for 16-bit results.
    """
    shift = torch.tensor(mean, dtype=torch.float32, device=images.device).view(3, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32, device=images.device).view(3, 1, 1)
    return ((images.float() / 255 - shift) / scale).to(dtype)


class _CropView:
    """Crop, flip half of the images, and `then` another step on the PIL image.

    The same random numbers as the v2 transforms, without their inspection of every argument.
    """

    def __init__(
        self, crop: RandomCrop, flip: bool, then: Callable[[Image.Image], Image.Image] | None = None
    ) -> None:
        self._crop, self._flip, self._then = crop, flip, then

    def __call__(self, image: Image.Image) -> Tensor:
        view = self._crop(image)
        if self._flip and torch.rand(1).item() < 0.5:
            view = view.flip(-1)
        return to_tensor(self._then(to_pil_image(view))) if self._then else view


class _ReleaseView:
    """timm's training transform, whose normalised result is turned back into uint8.

    Erasing draws its noise after normalisation; what lies outside 0-255 is clipped.
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float], decode: str) -> None:
        self._transform = create_transform(
            size,
            is_training=True,
            color_jitter=0.4,
            auto_augment="rand-m9-mstd0.5-inc1",
            interpolation="bicubic",
            re_prob=0.25,
            re_mode="pixel",
            re_count=1,
            mean=tuple(mean),
            std=tuple(std),
        )
        if decode == "fast":
            first, *rest = self._transform.transforms
            self._transform = v2.Compose([TimmCrop(first), *rest])
        self._mean = torch.tensor(mean).view(3, 1, 1)
        self._std = torch.tensor(std).view(3, 1, 1)

    def __call__(self, image: Image.Image) -> Tensor:
        scaled = self._transform(image) * self._std + self._mean
        return (scaled * 255).round().clamp(0, 255).to(torch.uint8)


class _EvalView:
    def __init__(
        self, resize: int, crop: int, mode: v2.InterpolationMode, decode: str = "reference"
    ) -> None:
        self._resize = resize
        steps = [v2.Resize(resize, mode), v2.CenterCrop(crop)]
        # Before or after: on tensors torchvision resizes by torch, on PIL images by Pillow.
        steps.insert(0 if decode == "fast" else 2, v2.PILToTensor())
        self._transform = v2.Compose(steps)

    def __call__(self, image: Image.Image) -> Tensor:
        # A strip of 1 x 100,000 pixels is small, but not once its short side is resized.
        longer = max(image.size) * self._resize // min(image.size)
        if longer * self._resize > MAX_PIXELS:
            raise BadImage("too_elongated", f"{image.width} x {image.height} pixels")
        return self._transform(image)


def _decode(data: bytes, upright: bool) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage("too_large", error) from None
    except Exception as error:  # plug-ins raise anything on made-up headers
        raise BadImage("not_an_image", error) from None
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("too_large", f"{image.width} x {image.height} pixels")
    # In a scan, two bytes FF DA can only begin another: data bytes FF are followed by a zero.
    scans = data.count(b"\xff\xda") if image.info.get("progressive") else 1
    if scans * image.width * image.height > MAX_SCANNED_PIXELS:
        raise BadImage("too_large", f"{scans} scans of {image.width} x {image.height} pixels")
    try:
        image.load()
        return _to_rgb(_upright(image) if upright else image)
    except BadImage:
        raise
    except Exception as error:
        reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise BadImage(reason, error) from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # damaged EXIF data states no orientation; the pixels are good
        return image
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("unsupported_mode", "floating-point pixels have no known range")
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips at 255 and so turns nearly all to white.
        values = np.array(image)  # in place from here: the largest images fill a gigabyte
        np.right_shift(values, 8, out=values)
        np.clip(values, 0, 255, out=values)
        image = Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """RGB without transparency; in tiles, so that the copies on the way are small."""
    result = Image.new("RGB", image.size)
    starts = itertools.product(range(0, image.width, _TILE), range(0, image.height, _TILE))
    for left, top in starts:
        corner = min(left + _TILE, image.width), min(top + _TILE, image.height)
        tile = image.crop((left, top, *corner)).convert("RGBA")
        white = Image.new("RGBA", tile.size, "white")
        result.paste(Image.alpha_composite(white, tile).convert("RGB"), (left, top))
    return result
