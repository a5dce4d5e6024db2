"""Image recipes of the family as data, and the one view that carries them out.

A picture is cropped and resized by `loaders.crops`, as in every training view; all that follows is
torchvision's, on uint8 pixels: flip, colour jitter, grey, blur, solarisation, AutoAugment. The
published programs flip last and resize bilinearly with Pillow; a flip commutes with the rest, and
we resize bicubically everywhere.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional import get_size

from loaders.crops import RATIO, Box, Picture, random_box, resize, window_box

# What a view that reports its parameters says of a picture that nothing was done to: the box (left,
# top, width, height as shares of the picture's sides), flipped, jittered, brightness - 1,
# contrast - 1, saturation - 1, hue, grey, blurred, sigma / 2. A centre crop has its own box.
IDENTITY_PARAMETERS = (0.0, 0.0, 1.0, 1.0, *[0.0] * 9)


@dataclass(frozen=True)
class Recipe:
    """One random view. Probabilities are those of a picture; 0 leaves a step out.

    Args:
        scale: smallest and largest share of the area of the crop. ratio: of its width to height.
        window: instead of these, the share of each side that the crop has, at any place.
        square: the window is a square, its side a share of the shorter side.
        flip: probability of a horizontal flip.
        jitter: strengths of brightness, contrast, saturation, hue, as of torchvision's
            ColorJitter, applied with probability `jittered`.
        grey, blur, solarize: probabilities. sigma: of the blur, in pixels, drawn uniformly.
        policy: AutoAugment's ImageNet policy after all of these.
        reported: the view returns its parameters, as IDENTITY_PARAMETERS describes them. So that
            they say everything, the four colour steps then keep that order, which is random else.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = RATIO
    window: float | None = None
    square: bool = False
    flip: float = 0.0
    jitter: tuple[float, float, float, float] | None = None
    jittered: float = 0.8
    grey: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    policy: bool = False
    reported: bool = False


_SLIP = {"flip": 0.5, "jitter": (0.4, 0.4, 0.4, 0.1), "grey": 0.2, "blur": 0.5}
_CLIP_ART = {"scale": (0.3, 1.0), "flip": 0.5, "jitter": (0.4, 0.4, 0.4, 0.1), "grey": 0.2}
_SUPCON = {"scale": (0.2, 1.0), "flip": 0.5}
_MOCO_V3 = {"flip": 0.5, "jitter": (0.4, 0.4, 0.2, 0.1), "grey": 0.2}

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        # SLIP (facebookresearch/SLIP, main.py): the crop of the image that meets the text; LaCLIP's
        # too, and of its area PyramidCLIP's local view.
        "slip_weak": Recipe(scale=(0.5, 1.0)),
        # The two views of SLIP's self-supervision (main.py, datasets.py).
        "slip_strong": Recipe(**_SLIP),
        # SimCLR (arXiv 2002.05709, appendix A) at colour strength 1.
        "simclr": Recipe(flip=0.5, jitter=(0.8, 0.8, 0.8, 0.2), grey=0.2, blur=0.5),
        # MoCo v3 (facebookresearch/moco-v3, main_moco.py): two views that differ in blur and
        # solarisation; the smallest area is the one for ViT (0.2 for ResNet-50).
        "moco_v3_first": Recipe(**_MOCO_V3, blur=1.0),
        "moco_v3_second": Recipe(**_MOCO_V3, blur=0.1, solarize=0.2),
        # Both views of DeCLIP (Sense-GVT/DeCLIP, imagenet_dataloader.py), which are MoCo v2's.
        "declip": Recipe(scale=(0.2, 1.0), **_SLIP),
        # SupCon on CIFAR (HobbitLong/SupContrast, main_supcon.py), and the view of cross-entropy
        # beside it and of linear classifiers (main_ce.py): the same crop without the colours.
        "supcon": Recipe(**_SUPCON, jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2),
        "supcon_weak": Recipe(**_SUPCON),
        # UniCLIP (arXiv 2209.13430) tells the model what was done; its strengths could not be
        # read, so these are SLIP's and the recipe is ours.
        "uniclip": Recipe(**_SLIP, reported=True),
        # ALIGN (arXiv 2102.05918, section 5.1): resized to 346 x 346 whatever the shape, a random
        # crop of 289 x 289, flip. Quoted from memory.
        "align": Recipe(window=289 / 346, flip=0.5),
        # ALIP (deepglint/ALIP, dali.py).
        "alip": Recipe(scale=(0.7, 1.0), ratio=(0.8, 1.25), flip=0.5),
        # OTTER (facebookresearch/OTTER): shorter side 256, random crop of 224.
        "otter": Recipe(window=224 / 256, square=True),
        # AutoAugment's ImageNet policy after the crop of ZeroVL's code. FILIP (arXiv 2111.07783)
        # names the policy and no crop.
        "autoaugment": Recipe(scale=(0.6, 1.0), policy=True),
        # For small drawings on white, ours: a crop that leaves something of the drawing in it, and
        # no blur, since a drawing of 64 pixels has no detail that a blur could spare.
        "clipart_strong": Recipe(**_CLIP_ART),
        "clipart_uniclip": Recipe(**_CLIP_ART, reported=True),
    }
)


class RecipeView:
    """A random view: picture -> uint8 (3, size, size), and parameters (P,) float32 if reported.

    Args:
        recipe: what is done. size: side of the square result in pixels.

    Attributes:
        parameters: P, the number of reported ones; 0 for none, then pixels alone are returned.
    """

    def __init__(self, recipe: Recipe, size: int) -> None:
        self._recipe, self._size = recipe, size
        self._jitter = v2.ColorJitter(*recipe.jitter) if recipe.jitter else None
        self._policy = v2.AutoAugment() if recipe.policy else None
        self.parameters = len(IDENTITY_PARAMETERS) if recipe.reported else 0

    def __call__(self, picture: Picture) -> Tensor | tuple[Tensor, Tensor]:
        recipe = self._recipe
        height, width = get_size(picture)
        left, top, right, bottom = box = self._box(width, height)
        view = resize(picture, box, self._size)
        flipped = _happens(recipe.flip)
        if flipped:
            view = view.flip(-1)
        colours = [0.0] * 5
        if self._jitter and _happens(recipe.jittered):
            view, colours = self._jittered(view)
        grey = _happens(recipe.grey)
        if grey:
            view = F.rgb_to_grayscale(view, num_output_channels=3)
        sigma = 0.0
        if _happens(recipe.blur):
            sigma = torch.empty(1).uniform_(*recipe.sigma).item()
            view = gaussian_blur(view, sigma)
        if _happens(recipe.solarize):
            view = F.solarize(view, 128)
        if self._policy:
            view = self._policy(view)
        if not recipe.reported:
            return view
        shares = [left / width, top / height, (right - left) / width, (bottom - top) / height]
        done = [*shares, flipped, *colours, grey, sigma > 0, sigma / 2]
        return view, torch.tensor(done, dtype=torch.float32)

    def _box(self, width: int, height: int) -> Box:
        recipe = self._recipe
        if recipe.window is None:
            return random_box(width, height, recipe.scale, recipe.ratio)
        return window_box(width, height, recipe.window, recipe.square)

    def _jittered(self, view: Tensor) -> tuple[Tensor, list[float]]:
        """The view, and what was done: 1, brightness - 1, contrast - 1, saturation - 1, hue."""
        drawn = self._jitter.make_params([view])
        if self._recipe.reported:
            drawn["fn_idx"] = torch.arange(4)
        names = ("brightness_factor", "contrast_factor", "saturation_factor")
        # None stands for a strength of 0.
        factors = [0.0 if drawn[name] is None else drawn[name] - 1 for name in names]
        return self._jitter.transform(view, drawn), [1.0, *factors, drawn["hue_factor"] or 0.0]


def gaussian_blur(view: Tensor, sigma: float) -> Tensor:
    """uint8 (3, H, W), blurred by a Gaussian of `sigma` pixels that ends at three of them.

    Along one side and then the other, which is the same and takes less time; edges are mirrored.
    Pillow's filter, which
    the published programs use, is a box filter made to resemble it.
    """
    sides = [min(2 * math.ceil(3 * sigma) + 1, 2 * side - 1) for side in view.shape[-2:]]
    blurred = F.gaussian_blur(view.float(), [sides[1], 1], [sigma, sigma])
    blurred = F.gaussian_blur(blurred, [1, sides[0]], [sigma, sigma])
    return blurred.round().clamp(0, 255).to(torch.uint8)


def _happens(probability: float) -> bool:
    """Draws, unless the step is left out."""
    return probability > 0 and torch.rand(1).item() < probability
