"""Training crops: `reference` against torchvision to the bit, `fast` within bounds of it."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from loaders import crops, decoders, resample, views
from loaders.errors import ConfigError
from tests.loaders.conftest import encoded
from tests.loaders.test_views import png_header, saved

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BICUBIC = v2.InterpolationMode.BICUBIC
SIZES = [(500, 375), (375, 500), (1024, 768), (64, 48), (900, 60), (7, 400), (1, 1)]
quick_decode = views.decoder()


def textured(seed, size):
    """Noise whose amplitude falls with frequency, grain, and rectangles with sharp edges."""
    rng, (width, height) = np.random.default_rng(seed), size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
    pixels = np.fft.irfft2(spectrum / frequency, s=(height, width))
    pixels = 128 + 45 * pixels / (pixels.std() + 1e-9) + rng.normal(0, 8, pixels.shape)
    for _ in range(8):
        left, top = rng.integers(width), rng.integers(height)
        color = rng.integers(0, 256, (3, 1, 1))
        pixels[:, top : top + height // 4, left : left + width // 4] = color
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def draw(view, picture, seed):
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    return view(picture)


@pytest.mark.parametrize("size", SIZES)
def test_reference_equals_torchvision_to_the_bit(size):
    crop = [v2.RandomResizedCrop(96, scale=(0.08, 1), interpolation=BICUBIC)]
    theirs = v2.Compose([*crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    ours = views.build_train("paper", 96, MEAN, STD)
    picture = textured(0, size)
    for seed in range(12):
        expected = draw(theirs, picture, seed)
        for given in (picture, crops.to_pixels(picture)):
            assert torch.equal(draw(ours, given, seed), expected), seed


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_boxes_are_torchvision_s_and_leave_the_generator_where_it_leaves_it(size, scale):
    theirs = v2.RandomResizedCrop(96, scale=scale)
    for seed in range(40):
        torch.manual_seed(seed)
        found, after = crops.random_box(*size, scale), torch.rand(1)
        torch.manual_seed(seed)
        box = theirs.make_params([Image.new("L", size)])
        left, top = box["left"], box["top"]
        assert found == (left, top, left + box["width"], top + box["height"])
        assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("recipe", views.RECIPES)
@pytest.mark.parametrize("size", [(500, 375), (640, 900), (90, 60)])
def test_fast_pixels_are_near_the_reference(recipe, size):
    """Resizing alone: at most 2 levels of 255, 0.2 on average in any image, 0.02 in most.

    Colour jitter may double a difference; RandAugment may posterise or equalise, so that a level
    becomes many, but on few pixels.
    """
    reference = views.build_train(recipe, 128, MEAN, STD)
    fast = views.build_train(recipe, 128, MEAN, STD, "fast")
    highest, means = {"unicl_release": 255, "clipart": 4}.get(recipe, 2), []
    for seed in range(6):
        data = saved(textured(seed, size), "JPEG", quality=90)
        one = draw(reference, views.decode(data), seed).int()
        assert torch.equal(draw(reference, quick_decode(data), seed).int(), one)
        other = draw(fast, quick_decode(data), seed).int()
        difference = (one - other).abs()
        assert difference.max() <= highest
        means.append(difference.float().mean().item())
    assert max(means) <= 0.2
    assert sorted(means)[3] <= 0.02
    assert sum(means) > 0


def test_fast_draws_the_same_boxes(monkeypatch):
    boxes = {"reference": [], "fast": []}
    for decode, found in boxes.items():
        crop = crops.RandomCrop(32, (0.08, 1.0), decode)
        resize = crop._resize
        crop._resize = lambda p, b, s, found=found, resize=resize: (
            found.append(b),
            resize(p, b, s),
        )
        for seed in range(20):
            data = encoded(seed, (200, 150))
            draw(crop, quick_decode(data), seed)
    assert boxes["fast"] == boxes["reference"]
    assert len(set(boxes["fast"])) == 20


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_files_are_decoded_to_the_same_pixels(mode, subsampling):
    for seed, size in enumerate([(500, 375), (33, 17), (1, 1), (16, 200)]):
        picture = textured(seed, size).convert(mode)
        data = saved(picture, "JPEG", quality=85, subsampling=subsampling, restart_marker_rows=2)
        pixels = decoders.decode_plain(data)
        assert pixels is not None
        expected = np.asarray(views.decode(data)).transpose(2, 0, 1)
        np.testing.assert_array_equal(pixels.numpy(), expected)


def odd_files():
    picture = textured(3, (60, 40))
    orientation = Image.Exif()
    orientation[0x0112] = 6
    alpha = picture.convert("RGBA")
    alpha.putalpha(90)
    sixteen = Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27)
    plain = saved(picture, "JPEG", quality=90)
    return {
        "cmyk": saved(picture.convert("CMYK"), "JPEG"),
        "progressive": saved(picture, "JPEG", progressive=True),
        "turned by EXIF": saved(picture, "JPEG", exif=orientation.tobytes()),
        "damaged EXIF": saved(picture, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage"),
        "png": saved(picture),
        "transparent": saved(alpha),
        "palette": saved(picture.convert("P")),
        "sixteen bits": saved(sixteen),
        "gif": saved(picture, "GIF"),
        "webp": saved(picture, "WEBP"),
        "bomb": png_header(20_000, 20_000),
        "empty": b"",
        "a web page": b"<html>404</html>",
        "junk after the end": plain + b"junk",
        "no end mark": plain[:-2],
        **{f"cut at {n}": plain[: len(plain) * n // 8] for n in range(1, 8)},
        "cut, with an end mark": plain[: len(plain) // 2] + b"\xff\xd9",
    }


def outcome(decode, data):
    try:
        return np.asarray(crops.to_pixels(decode(data)))
    except views.BadImage as error:
        return error.reason


@pytest.mark.parametrize(("name", "data"), odd_files().items(), ids=odd_files())
def test_odd_files_give_the_same_as_the_reference(name, data):
    np.testing.assert_array_equal(outcome(quick_decode, data), outcome(views.decode, data))


def test_damaged_files_give_the_same_as_the_reference():
    rng, good, taken = np.random.default_rng(0), encoded(1, (90, 70)), 0
    for _ in range(400):
        bad = bytearray(good)
        for place in rng.integers(0, len(bad), rng.integers(1, 4)):
            bad[place] = rng.integers(256)
        np.testing.assert_array_equal(
            outcome(quick_decode, bytes(bad)), outcome(views.decode, bytes(bad))
        )
        taken += decoders.decode_plain(bytes(bad)) is not None
    assert taken > 50  # many damaged files are still decoded by torchvision


def test_another_word_is_refused():
    with pytest.raises(ConfigError, match=r"data\.decode='quick' is not one of reference, fast"):
        views.build_train("paper", 24, MEAN, STD, "quick")


def test_pillow_resizes_itself_where_it_has_other_pixels(monkeypatch):
    crops._reference.cache_clear()
    assert crops.resizer("reference") is crops.resize_exactly
    crops._reference.cache_clear()
    right = resample.resize
    monkeypatch.setattr(resample, "resize", lambda *a: right(*a) ^ (np.arange(32) == 5))
    with pytest.warns(UserWarning, match=r"Pillow [\d.]+ resizes otherwise"):
        assert crops.resizer("reference") is crops.resize_by_pillow
    picture = textured(1, (60, 50))
    boxed = crops.resize_by_pillow(crops.to_pixels(picture), (3, 2, 50, 40), 24)
    assert torch.equal(boxed, crops.resize_by_pillow(picture, (3, 2, 50, 40), 24))
    crops._reference.cache_clear()


@pytest.mark.parametrize("wrong", [lambda data: None, lambda data: right_pixels(data) ^ 1])
def test_pillow_decodes_where_torchvision_does_not_do_the_same(monkeypatch, wrong):
    views.decoder.cache_clear()
    monkeypatch.setattr(decoders, "decode_plain", wrong)
    with pytest.warns(UserWarning, match="torchvision does not decode JPEGs as Pillow does"):
        assert views.decoder() is views.decode
    views.decoder.cache_clear()


def right_pixels(data):
    return crops.to_pixels(views.decode(data))
