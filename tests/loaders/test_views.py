"""Decoding guards, and views against PIL, torchvision's functions and the formula."""

import contextlib
import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import v2

from loaders.choices import AUGMENTATIONS
from loaders.crops import TimmCrop
from loaders.errors import ConfigError
from loaders.views import (
    MAX_PIXELS,
    BadImage,
    build_eval,
    build_train,
    decode,
    normalize,
    stack,
)
from tests.loaders.conftest import encoded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(seed=0, size=(50, 37)):
    return Image.open(io.BytesIO(encoded(seed, size, "PNG"))).convert("RGB")


def saved(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_header(width, height):
    """A PNG that states a size and holds no pixels."""
    data = b"\x89PNG\r\n\x1a\n"
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data += struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return data + struct.pack(">I", 10) + b"IDAT" + bytes(14)


def pixels(image):
    return np.asarray(image)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_decode_equals_pillow(form):
    data = encoded(3, (31, 17), form)
    np.testing.assert_array_equal(
        pixels(decode(data)), pixels(Image.open(io.BytesIO(data)).convert("RGB"))
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero_bytes"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
        (encoded(0)[:5], "not_an_image"),
        (encoded(0, (200, 200))[:-200], "truncated"),
        (png_header(20_000, 20_000), "too_large"),  # over twice Pillow's limit: it raises
        (png_header(10_000, 10_000), "too_large"),  # between once and twice: it warns
        (saved(Image.new("F", (4, 4)), "TIFF"), "unsupported_mode"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("error")
def test_bad_images(data, reason):
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert caught.value.reason == reason


def test_damaged_pixels_are_bad_whatever_the_plug_in_raises():
    rng = np.random.default_rng(0)
    for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        good = bytearray(encoded(1, form=form))
        for _ in range(60):
            bad = bytearray(good)
            for place in rng.integers(0, len(bad), 8):
                bad[place] = rng.integers(256)
            with contextlib.suppress(BadImage):  # any other exception fails the test
                assert decode(bytes(bad)).mode == "RGB"


def test_limit_is_pillows():
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def test_transparency_lies_on_white():
    alpha = np.zeros((2, 2, 4), np.uint8)
    alpha[..., 0] = 200
    alpha[..., 3] = [[0, 255], [51, 102]]
    expected = np.rint(alpha[..., :3] * (alpha[..., 3:] / 255) + 255 - alpha[..., 3:])
    got = pixels(decode(saved(Image.fromarray(alpha)))).astype(float)
    np.testing.assert_allclose(got, expected, atol=1)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    data = saved(palette, transparency=0)
    assert pixels(decode(data)).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    grey = saved(Image.fromarray(np.array([[0, 9]], np.uint8)), transparency=0)
    assert pixels(decode(grey)).tolist() == [[[255] * 3, [9] * 3]]


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(decode(data)) == (255, 0, 0)).all()


def test_sixteen_bit_grey_keeps_its_shades():
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    got = pixels(decode(saved(Image.fromarray(values))))
    assert got.tolist() == [[[int(v) // 256] * 3 for v in values[0]]]


def test_cmyk():
    got = pixels(decode(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")))
    np.testing.assert_allclose(got, np.broadcast_to([255, 0, 0], got.shape), atol=3)


@pytest.mark.parametrize(("tag", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation(tag, turns):
    exif = Image.Exif()
    exif[0x0112] = tag
    plain = pixels(picture(size=(9, 5)))
    got = pixels(decode(saved(Image.fromarray(plain), exif=exif)))
    np.testing.assert_array_equal(got, np.rot90(plain, turns))


@pytest.mark.filterwarnings("error")
def test_damaged_exif_does_not_cost_the_image():
    data = saved(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    assert decode(data).size == (50, 37)


@pytest.mark.parametrize("recipe", AUGMENTATIONS)
def test_recipes_give_uint8_and_follow_the_seed(recipe):
    view, image = build_train(recipe, 24, MEAN, STD), picture(size=(150, 150))

    def draw(seed):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        return stack([view(image)])["image"][0]

    draws = [draw(seed) for seed in range(30)]
    assert all(d.shape == (3, 24, 24) and d.dtype == torch.uint8 for d in draws)
    assert all(torch.equal(d, draw(seed)) for seed, d in enumerate(draws))
    different = len({d.numpy().tobytes() for d in draws})
    assert different == 1 if recipe == "none" else different >= 10


@pytest.mark.parametrize(
    ("recipe", "scale", "flip"), [("clip", (0.9, 1), False), ("paper", (0.08, 1), True)]
)
def test_crops_are_near_an_independent_reference(recipe, scale, flip):
    view, image = build_train(recipe, 24, MEAN, STD), picture()
    for seed in range(10):
        torch.manual_seed(seed)
        got = view(image)
        torch.manual_seed(seed)
        crop = v2.RandomResizedCrop(24, scale=scale)  # only to draw the box
        box = crop.make_params([image])
        left, top = box["left"], box["top"]
        expected = image.crop((left, top, left + box["width"], top + box["height"]))
        expected = expected.resize((24, 24), Image.Resampling.BICUBIC)
        if flip and torch.rand(1) < 0.5:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        distance = np.abs(got.permute(1, 2, 0).numpy().astype(int) - pixels(expected))
        assert distance.max() <= 2  # tests/loaders/test_crops.py has larger pictures


def test_release_recipe_equals_timm_in_uint8_where_nothing_is_erased():
    """Against timm's transform made to return plain pixels (mean 0, std 1, no erasing), after the
    same crop: RandAugment may make many levels of one that the crops differ by."""
    settings = {"is_training": True, "auto_augment": "rand-m9-mstd0.5-inc1"}
    settings |= {"interpolation": "bicubic", "mean": MEAN, "normalize": False}
    view, image = build_train("unicl_release", 24, MEAN, STD), picture()
    plain = create_transform(24, re_prob=0.0, **settings)
    plain.transforms[0] = TimmCrop(plain.transforms[0])
    equal = 0
    for seed in range(40):
        results = []
        for transform in (view, plain):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)
            results.append(transform(image))
        expected = results[1]
        equal += torch.equal(results[0], expected)
        assert (results[0] == expected).float().mean() > 0.6  # at most a third is erased
    assert 20 <= equal <= 38  # erasing hits a quarter


@pytest.mark.parametrize(("resize", "crop"), [(30, 24), (24, 24), (31, 24), (37, 36)])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_evaluation_view_equals_torchvision(resize, crop, mode):
    steps = [v2.Resize(resize, v2.InterpolationMode(mode)), v2.CenterCrop(crop), v2.PILToTensor()]
    for size in ((50, 37), (20, 64), (24, 24), (24, 51), (31, 24), (67, 37), (1, 300)):
        image = picture(size=size)
        assert torch.equal(build_eval(resize, crop, mode)(image), v2.Compose(steps)(image)), size


def test_elongated_image_is_refused_before_it_fills_the_memory():
    with pytest.raises(BadImage, match="too_elongated"):
        build_eval(224, 224)(Image.new("RGB", (1, 100_000)))
    assert build_train("clip", 24, MEAN, STD)(Image.new("RGB", (1, 100_000))).shape == (3, 24, 24)


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5), (2, 1, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalize_equals_the_formula(shape, dtype):
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (MEAN, STD))
    expected = (images.numpy().astype(np.float64) / 255 - mean) / std
    got = normalize(images, MEAN, STD, dtype)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_unknown_settings():
    with pytest.raises(ConfigError, match="unicl_release, paper"):
        build_train("strong", 24, MEAN, STD)
    for wrong in ((24, 30, "bicubic"), (24, 24, "cubic")):
        with pytest.raises(ConfigError, match="evaluation views"):
            build_eval(*wrong)


def test_release_recipe_survives_its_strongest_posterisation():
    """timm asks Pillow for 0 bits in one image of some hundreds, which Pillow 13 refuses."""
    view = build_train("unicl_release", 24, MEAN, STD)
    augment = next(s for s in view._transform.transforms if hasattr(s, "ops"))
    operation = next(o for o in augment.ops if o.name == "PosterizeIncreasing")
    operation.prob, operation.magnitude, operation.magnitude_std = 1.0, 10, 0
    assert not pixels(operation(picture())).any()
    operation.magnitude = 0
    np.testing.assert_array_equal(pixels(operation(picture())), pixels(picture()) & 0xF0)
