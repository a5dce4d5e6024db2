"""Images: training views and evaluation views (`loaders.decoders` makes pixels of bytes).

Views are uint8 tensors (3, size, size), a quarter of the float bytes to move between processes
and to the device; `normalize` runs there. All randomness comes from the global generators of
`random`, numpy and torch, which `loaders.batch` seeds for each sample.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment, posterize
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_modes_mapping
from torchvision.transforms.v2.functional import get_size, to_pil_image

from loaders.choices import AUGMENTATIONS, MIXED, REPORTING
from loaders.crops import Picture, RandomCrop, TimmCrop, to_pixels, to_tensor
from loaders.decoders import FORMATS as FORMATS
from loaders.decoders import MAX_PIXELS, BadImage
from loaders.decoders import decode as decode
from loaders.decoders import decoder as decoder
from loaders.errors import ConfigError
from loaders.recipes import IDENTITY_PARAMETERS as IDENTITY_PARAMETERS
from loaders.recipes import RECIPES, RecipeView

# A view may report what it did: it has an attribute `parameters` (their number P), and returns
# (pixels, (P,) float32).
View = Callable[[Picture], Tensor | tuple[Tensor, Tensor]]


def build_train(recipe: str, size: int, mean: Sequence[float], std: Sequence[float]) -> View:
    """A random view: picture (`loaders.crops`) -> uint8 (3, size, size).

    Boxes and random numbers are those of torchvision and timm, pixels nearly those that they give
    on Pillow (`loaders.crops` says how near).

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
        mixup_cutmix: as unicl_release; the trainer blends images and targets afterwards.
        Those of `loaders.recipes.RECIPES`, with values and sources there.
    Raises `ConfigError` for another name.
    """
    if recipe in ("unicl_release", MIXED):
        return _ReleaseView(size, mean, std)
    if recipe == "none":
        return _CentreView(size)
    if recipe == "paper":
        return _CropView(RandomCrop(size, (0.08, 1.0)), flip=True)
    if recipe == "clip":
        return _CropView(RandomCrop(size, (0.9, 1.0)), flip=False)
    if recipe == "clipart":
        jitter = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)
        return _CropView(RandomCrop(size, (0.6, 1.0)), True, jitter)
    if recipe in RECIPES:
        return RecipeView(RECIPES[recipe], size)
    raise ConfigError(f"image views {recipe!r} are unknown; there are {', '.join(AUGMENTATIONS)}")


def build_eval(resize: int, crop: int, interpolation: str = "bicubic") -> View:
    """Resize the shorter side, then centre crop: picture -> uint8 (3, crop, crop).

    Calling it raises `BadImage` (`too_elongated`) if the resized image would exceed MAX_PIXELS.
    """
    modes = {mode.value: mode for mode in v2.InterpolationMode}
    if crop > resize or interpolation not in modes:
        raise ConfigError(
            f"evaluation views: crop {crop} must not exceed resize {resize}, and interpolation "
            f"{interpolation!r} must be one of {', '.join(modes)}"
        )
    return _EvalView(resize, crop, modes[interpolation])


def check_parameters(views: Sequence[View]) -> None:
    """Raise `ConfigError` where some views of a sample report their parameters and others not."""
    if len({getattr(view, "parameters", 0) for view in views}) > 1:
        raise ConfigError(
            "data.augmentation: some image views report their parameters and others do not, so "
            "there would be none to give to the model; use recipes of one kind; those that report "
            f"are {', '.join(REPORTING)}"
        )


def stack(made: Sequence[Tensor | tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What V views returned, as `image` (V, 3, H, W) and, if reported, `augmentation` (V, P)."""
    if isinstance(made[0], tuple):
        images, parameters = zip(*made, strict=True)
        return {"image": torch.stack(images), "augmentation": torch.stack(parameters)}
    return {"image": torch.stack(list(made)) if len(made) > 1 else made[0][None]}


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """(images / 255 - mean) / std: uint8 (..., 3, H, W) -> dtype, same shape and device.

    Computed in float32 also for 16-bit results.
    """
    shift, scale = (_channels(tuple(values), images.device) for values in (mean, std))
    return ((images.float() / 255 - shift) / scale).to(dtype)


@functools.cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, 1, 1); made once, because the host waits for numbers that it copies to a device."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


class _CropView:
    """Crop, flip half of the images, and `then` another step on the PIL image.

    The same random numbers as the v2 transforms, without their inspection of every argument.
    """

    def __init__(
        self, crop: RandomCrop, flip: bool, then: Callable[[Image.Image], Image.Image] | None = None
    ) -> None:
        self._crop, self._flip, self._then = crop, flip, then

    def __call__(self, picture: Picture) -> Tensor:
        view = self._crop(picture)
        if self._flip and torch.rand(1).item() < 0.5:
            view = view.flip(-1)
        return to_tensor(self._then(to_pil_image(view))) if self._then else view


class _ReleaseView:
    """timm's training transform, whose normalised result is turned back into uint8.

    Erasing draws its noise after normalisation; what lies outside 0-255 is clipped.
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
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
        for step in self._transform.transforms:
            for operation in step.ops if isinstance(step, RandAugment) else []:
                if operation.aug_fn is posterize:
                    operation.aug_fn = _posterize
        first, *rest = self._transform.transforms
        self._transform = v2.Compose([TimmCrop(first), *rest])
        self._mean = torch.tensor(mean).view(3, 1, 1)
        self._std = torch.tensor(std).view(3, 1, 1)

    def __call__(self, picture: Picture) -> Tensor:
        scaled = self._transform(picture) * self._std + self._mean
        return (scaled * 255).round().clamp(0, 255).to(torch.uint8)


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """timm's step, which may ask for 0 bits: black, as in Pillow before it came to refuse that."""
    return posterize(image, bits_to_keep) if bits_to_keep else Image.new("RGB", image.size)


class _EvalView:
    """torchvision's Resize and CenterCrop without their dispatch: as long as a small drawing."""

    def __init__(self, resize: int, crop: int, mode: v2.InterpolationMode) -> None:
        self._resize, self._crop = resize, crop
        self._mode = pil_modes_mapping[mode]

    def __call__(self, picture: Picture) -> Tensor:
        image = picture if isinstance(picture, Image.Image) else to_pil_image(picture)
        width, height = _resized(image, self._resize)
        if (width, height) != image.size:
            image = image.resize((width, height), self._mode)
        left, top = (round((side - self._crop) / 2) for side in (width, height))
        return to_tensor(image.crop((left, top, left + self._crop, top + self._crop)))


class _CentreView:
    """The training view without random numbers: shorter side to `size`, centre crop, by torch."""

    def __init__(self, size: int) -> None:
        self._size = size
        resize = v2.Resize(size, v2.InterpolationMode.BICUBIC)
        self._transform = v2.Compose([to_pixels, resize, v2.CenterCrop(size)])

    def __call__(self, picture: Picture) -> Tensor:
        _resized(picture, self._size)  # refuses what would become too large
        return self._transform(picture)


def _resized(picture: Picture, resize: int) -> tuple[int, int]:
    """Width and height when the shorter side is `resize`, rounded down as torchvision does."""
    height, width = get_size(picture)
    shorter = min(width, height)
    sides = int(resize * width / shorter), int(resize * height / shorter)
    # A strip of 1 x 100,000 pixels is small, but not once its short side is resized.
    if sides[0] * sides[1] > MAX_PIXELS:
        raise BadImage("too_elongated", f"{width} x {height} pixels")
    return sides
