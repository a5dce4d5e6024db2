"""Image recipes against torchvision's own transforms, and the published values written again."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from loaders import crops, recipes, views
from loaders.choices import AUGMENTATIONS, REPORTING
from loaders.recipes import IDENTITY_PARAMETERS, RECIPES, Recipe, RecipeView
from tests.loaders.test_crops import textured

DRAWS = 300
NONE = (0.0, 0.0, 0.0, 0.0)
# crop, flip, jitter, share that is jittered, grey, blurred, solarized, as published.
PUBLISHED = {
    "slip_weak": ((0.5, 1), 0, NONE, 0, 0, 0, 0),
    "slip_strong": ((0.08, 1), 0.5, (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5, 0),
    "simclr": ((0.08, 1), 0.5, (0.8, 0.8, 0.8, 0.2), 0.8, 0.2, 0.5, 0),
    "moco_v3_first": ((0.08, 1), 0.5, (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 1.0, 0),
    "moco_v3_second": ((0.08, 1), 0.5, (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 0.1, 0.2),
    "declip": ((0.2, 1), 0.5, (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5, 0),
    "supcon": ((0.2, 1), 0.5, (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0, 0),
    "supcon_weak": ((0.2, 1), 0.5, NONE, 0, 0, 0, 0),
    "alip": ((0.7, 1), 0.5, NONE, 0, 0, 0, 0),
}
SIZE = (120, 90)


@functools.cache
def draws(recipe, count=DRAWS, size=SIZE):
    """(pixels, parameters) of that many draws of a recipe that is made to report."""
    view, picture = RecipeView(dataclasses.replace(recipe, reported=True), 8), textured(0, size)
    pixels = crops.to_pixels(picture)
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(view(pixels))
    return made


def share_is(found, expected):
    """Whether a share of DRAWS may have this probability."""
    return abs(float(np.mean(found)) - expected) <= 5 * (expected * (1 - expected) / DRAWS) ** 0.5


@pytest.mark.parametrize("name", PUBLISHED)
def test_probabilities_and_strengths_are_the_published_ones(name):
    scale, flip, jitter, jittered, grey, blur, _ = PUBLISHED[name]
    reported = torch.stack([parameters for _, parameters in draws(RECIPES[name])]).numpy()
    assert reported.shape == (DRAWS, len(IDENTITY_PARAMETERS)) == (DRAWS, 13)
    assert share_is(reported[:, 4], flip)
    assert share_is(reported[:, 5], jittered)
    assert share_is(reported[:, 10], grey)
    assert share_is(reported[:, 11], blur)
    areas = reported[:, 2] * reported[:, 3]
    assert scale[0] * 0.95 <= areas.min() <= scale[0] + 0.1
    assert 0.9 <= areas.max() <= scale[1]
    for column, strength in zip(range(6, 10), jitter, strict=True):
        values = reported[reported[:, 5] == 1, column]
        assert np.abs(reported[reported[:, 5] == 0, column]).max(initial=0) == 0
        if strength:
            assert np.abs(values).max() <= strength
            assert values.max() > 0.9 * strength
            assert values.min() < -0.9 * strength
            assert abs(values.mean()) < 5 * strength / (3 * len(values)) ** 0.5
    sigmas = 2 * reported[reported[:, 11] == 1, 12]
    if blur:
        assert 0.1 <= sigmas.min() < 0.5
        assert 1.6 < sigmas.max() <= 2
        assert abs(sigmas.mean() - 1.05) < 5 * 1.9 / (12 * len(sigmas)) ** 0.5


@pytest.mark.parametrize(
    "name",
    [
        "slip_strong",
        *(pytest.param(n, marks=pytest.mark.soak) for n in ("slip_weak", "moco_v3_second")),
    ],
)
def test_views_have_the_statistics_of_torchvision_s_transforms(name):
    scale, flip, jitter, jittered, grey, blur, solarized = PUBLISHED[name]
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(24, scale=scale, interpolation=3),
            v2.RandomApply([v2.ColorJitter(*jitter)], p=jittered),
            v2.RandomGrayscale(p=grey),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=blur),
            v2.RandomSolarize(128, p=solarized),
            v2.RandomHorizontalFlip(p=flip),
        ]
    )
    picture = crops.to_pixels(textured(3, SIZE))
    ours, found = RecipeView(RECIPES[name], 24), ([], [])
    for side, view in enumerate((ours, theirs)):
        torch.manual_seed(side)
        for _ in range(DRAWS):
            made = view(picture).double()
            edges = (made[..., 1:] - made[..., :-1]).abs().mean()
            tilt = made[..., 12:].mean() - made[..., :12].mean()
            numbers = [made.mean(), made.std(), edges, tilt, (made[0] - made[2]).abs().mean()]
            found[side].append([float(number) for number in numbers])
    one, other = (np.array(side) for side in found)
    for power in (1, 2):
        a, b = one**power, other**power
        error = np.sqrt((a.var(0) + b.var(0)) / DRAWS)
        assert (np.abs(a.mean(0) - b.mean(0)) < 5 * error).all()


@pytest.mark.parametrize("name", ["slip_strong", "alip", "autoaugment", "clipart_strong"])
def test_boxes_are_torchvision_s(name):
    recipe = RECIPES[name]
    theirs = v2.RandomResizedCrop(16, scale=recipe.scale, ratio=recipe.ratio)
    for size in ((120, 90), (40, 300)):
        for seed, (_, reported) in enumerate(draws(recipe, 30, size)):
            torch.manual_seed(seed)
            box = theirs.make_params([Image.new("L", size)])
            expected = [box["left"], box["top"], box["width"], box["height"]]
            found = reported[:4] * tensor([*size, *size])
            assert found.round().int().tolist() == expected


@pytest.mark.parametrize(
    ("name", "resized", "cut"), [("align", (346, 346), 289), ("otter", (341, 256), 224)]
)
def test_windows_are_those_of_a_resize_and_a_random_crop(name, resized, cut):
    """A picture of 120 x 90 is resized, and a square is cut from it."""
    expected = [cut / side for side in resized]
    boxes = torch.stack([reported[:4] for _, reported in draws(RECIPES[name])]).numpy()
    assert np.abs(boxes[:, 2:] - expected).max() < 0.5 / 90
    for axis in (0, 1):
        room = 1 - boxes[0, 2 + axis]
        assert boxes[:, axis].min() == 0
        assert boxes[:, axis].max() == pytest.approx(room, abs=1e-6)
        assert abs(boxes[:, axis].mean() - room / 2) < 5 * room / (12 * DRAWS) ** 0.5


def replay(picture, reported, size):
    """The view (3, size, size) that parameters describe, of pixels (3, H, W)."""
    height, width = picture.shape[1:]
    sides = tensor([width, height, width, height])
    x, y, w, h = (reported[:4].double() * sides).round().int().tolist()
    view = crops.resize(picture, (x, y, x + w, y + h), size)
    flip, jittered, brightness, contrast, saturation, hue, grey, blurred, sigma = reported[
        4:
    ].tolist()
    view = view.flip(-1) if flip else view
    if jittered:
        view = F.adjust_brightness(view, 1 + brightness)
        view = F.adjust_contrast(view, 1 + contrast)
        view = F.adjust_hue(F.adjust_saturation(view, 1 + saturation), hue)
    view = F.rgb_to_grayscale(view, 3) if grey else view
    return F.gaussian_blur(view, [13, 13], [2 * sigma] * 2) if blurred else view


@pytest.mark.parametrize("name", ["uniclip", "clipart_uniclip"])
def test_reported_parameters_make_the_view_again(name):
    view, done = RecipeView(RECIPES[name], 32), []
    for seed in range(48):
        picture = crops.to_pixels(textured(seed % 4, [SIZE, (50, 130)][seed % 2]))
        torch.manual_seed(seed)
        pixels, reported = view(picture)
        again = replay(picture, reported, 32)
        # The parameters are float32, as which a factor may round to the next level.
        assert (again.int() - pixels.int()).abs().max() <= 2
        if not reported[11]:
            assert (again != pixels).float().mean() < 0.01
        done.append(reported)
    assert (torch.stack(done)[:, 4:11] != 0).any(0).all()


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 128)])
def test_the_identity_makes_the_view_of_evaluation(size):
    """Of a square picture; of another one the centre crop, which has a box of its own."""
    picture, sides = textured(5, size), tensor([*size, *size])
    reported = tensor(IDENTITY_PARAMETERS)
    margins = [(side - 64) / 2 for side in size]
    reported[:4] = tensor([*margins, 64, 64]) / sides
    assert torch.equal(reported, tensor(IDENTITY_PARAMETERS)) == (size == (64, 64))
    again = replay(crops.to_pixels(picture), reported, 32)
    evaluated = views.build_eval(32, 32)(picture)
    # What lies beyond the edge of a crop is seen by a resize before it, and by none after it.
    inside = slice(None) if size == (64, 64) else slice(2, -2)
    difference = (again.int() - evaluated.int()).abs()[:, inside, inside]
    assert difference.max() <= 2


def test_nothing_done_reports_the_identity():
    whole = Recipe(scale=(1.0, 1.0), ratio=(1.0, 1.0), reported=True)
    pixels, reported = RecipeView(whole, 40)(textured(0, (40, 40)))
    assert torch.equal(reported, tensor(IDENTITY_PARAMETERS))
    assert torch.equal(pixels, crops.to_pixels(textured(0, (40, 40))))


def test_a_fifth_is_solarized():
    recipe = dataclasses.replace(RECIPES["moco_v3_second"], jitter=None, blur=0.0, grey=0.0)
    view, picture = RecipeView(recipe, 8), torch.full((3, 9, 9), 200, dtype=torch.uint8)
    torch.manual_seed(0)
    values = [int(view(picture)[0, 0, 0]) for _ in range(DRAWS)]
    assert set(values) == {200, 55}
    assert share_is([value == 55 for value in values], 0.2)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_is_torchvision_s_and_near_pillow_s(sigma):
    picture = textured(2, (64, 48))
    pixels = crops.to_pixels(picture).contiguous()
    found = recipes.gaussian_blur(pixels, sigma).int()
    assert (found - F.gaussian_blur(pixels, [25, 25], [sigma, sigma]).int()).abs().max() <= 2
    theirs = crops.to_pixels(picture.filter(ImageFilter.GaussianBlur(sigma))).int()
    inside = (found - theirs)[:, 8:-8, 8:-8].abs()
    assert inside.float().mean() < 2
    assert recipes.gaussian_blur(pixels[:, :2, :2], 2.0).shape == (3, 2, 2)


def test_autoaugment_is_torchvision_s():
    view, theirs = RecipeView(RECIPES["autoaugment"], 32), v2.AutoAugment()
    picture = crops.to_pixels(textured(4, SIZE))
    for seed in range(20):
        torch.manual_seed(seed)
        found = view(picture)
        torch.manual_seed(seed)
        box = crops.random_box(*SIZE, (0.6, 1.0))
        assert torch.equal(found, theirs(crops.resize(picture, box, 32)))


def test_every_recipe_has_its_word_and_so_have_those_that_report():
    assert set(AUGMENTATIONS) == {"unicl_release", "paper", "clip", "clipart", "none", *RECIPES}
    assert {name for name, recipe in RECIPES.items() if recipe.reported} == set(REPORTING)
