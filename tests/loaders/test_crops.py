"""Training images: crops within bounds of torchvision's and timm's, plain JPEGs to the bit."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import v2

from loaders import crops, decoders, views
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


def near(found, expected):
    """At most 2 levels of 255 away but for one value in 50, 0.3 on average; returns the mean."""
    distance = (found.int() - expected.int()).abs()
    assert (distance > 2).float().mean() <= 0.02
    assert distance.max() <= 12
    assert distance.float().mean() <= 0.3
    return distance.float().mean().item()


def test_resized_boxes_are_near_pillow_s():
    """The bounds of `loaders.crops`; Pillow 13 resizes some columns first (its PR 9549)."""
    rows_first, columns_first = [], []
    for size in [(500, 375), (375, 500), (256, 256), (120, 90), (300, 700)]:
        picture = textured(0, size)
        for seed in range(80):
            torch.manual_seed(seed)
            box = crops.random_box(*size, (0.08, 1.0))
            width, height = box[2] - box[0], box[3] - box[1]
            pillow = picture.crop(box).resize((96, 96), Image.Resampling.BICUBIC)
            distance = (crops.resize(picture, box, 96).int() - crops.to_tensor(pillow).int()).abs()
            columns = height - 96 > max(0, 2 * (width - 96))
            found = columns_first if columns else rows_first
            found.append((distance.max().item(), distance.float().mean().item()))
    assert max(rows_first)[0] <= 2
    assert max(mean for _, mean in rows_first) <= 0.01
    assert 0 < len(columns_first) < len(rows_first) / 20
    assert max(columns_first)[0] <= 10
    assert max(mean for _, mean in columns_first) <= 0.3


@pytest.mark.parametrize(("recipe", "scale"), [("paper", (0.08, 1.0)), ("clip", (0.9, 1.0))])
def test_pixels_are_near_torchvision_s_on_pillow(recipe, scale):
    ours = views.build_train(recipe, 96, MEAN, STD)
    steps = [v2.RandomResizedCrop(96, scale=scale, interpolation=BICUBIC)]
    steps += [v2.RandomHorizontalFlip()] if recipe == "paper" else []
    theirs = v2.Compose([*steps, v2.PILToTensor()])
    means = []
    for size in SIZES:
        picture = textured(0, size)
        for seed in range(8):
            expected = draw(theirs, picture, seed)
            found = draw(ours, picture, seed)
            means.append(near(found, expected))
            assert torch.equal(draw(ours, crops.to_pixels(picture), seed), found)
    assert sorted(means)[len(means) // 2] <= 0.005


def test_pixels_are_near_timm_s_on_pillow():
    theirs = RandomResizedCropAndInterpolation(96, scale=(0.08, 1.0), interpolation="bicubic")
    ours = crops.TimmCrop(theirs)
    assert draw(ours, textured(1, (1, 1)), 0).size == (96, 96)  # where timm's own fails
    for size in SIZES[:-1]:
        picture = textured(1, size)
        for seed in range(8):
            expected = crops.to_pixels(draw(theirs, picture, seed))
            near(crops.to_pixels(draw(ours, picture, seed)), expected)
            near(crops.to_pixels(draw(ours, crops.to_pixels(picture), seed)), expected)


@pytest.mark.parametrize("size", [(500, 375), (640, 900), (90, 60)])
def test_view_without_random_numbers_is_near_pillow_s(size):
    near(
        views.build_train("none", 128, MEAN, STD)(textured(2, size)),
        views.build_eval(128, 128)(textured(2, size)),
    )


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
    assert taken > 50  # many damaged files are still decoded by simplejpeg


def headed_files():
    """Files of all layouts, good and damaged in their headers: name -> bytes."""
    picture, rng = textured(4, (40, 30)), np.random.default_rng(1)
    settings = [{}, {"comment": "a lake"}, {"optimize": True}, {"restart_marker_rows": 1}]
    settings += [{"progressive": True}, {"exif": b"Exif\0\0"}, {"dpi": (72, 72)}]
    good = [saved(picture.convert(m), "JPEG", **s) for m in ("RGB", "L", "CMYK") for s in settings]
    segments = [part for data in good for part in split(data)[1:-1]]
    for number, data in enumerate(good):
        parts = split(data)
        header = len(data) - len(parts[-1]) + 8
        for kind in range(20):
            bad, places = bytearray(data), rng.integers(0, header, rng.integers(1, 3))
            bad[places[0]] = rng.choice([0, 1, 2, 255, rng.integers(256)])
            bad[places[-1]] = rng.integers(256)
            yield f"{number}, bytes {places}", bytes(bad)
            other = parts.copy()
            place = rng.integers(1, len(parts))
            other[place : place + kind % 2] = [segments[rng.integers(len(segments))]]
            yield f"{number}, segment {place} of {kind}", b"".join(other)
        yield from ((f"{number}, cut at {end}", data[:end]) for end in range(0, header, 29))


def split(data):
    """The start mark, the segments of the header, and all from the pixels' on."""
    parts, place = [data[:2]], 2
    while data[place + 1] != 0xDA:
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        parts.append(data[place:end])
        place = end
    return [*parts, data[place:]]


def test_damaged_headers_give_the_same_as_the_reference(monkeypatch):
    taken, opened = 0, Image.open
    for name, data in headed_files():
        expected, found = outcome(views.decode, data), outcome(quick_decode, data)
        np.testing.assert_array_equal(found, expected, name)
        monkeypatch.setattr(decoders.Image, "open", refuse)
        taken += decoders.decode_plain(data) is not None
        monkeypatch.setattr(decoders.Image, "open", opened)
    assert taken > 100  # many of them without Pillow


def refuse(*_, **__):
    raise AssertionError("Pillow was asked")


def test_headers_of_common_writers_are_read_without_pillow(monkeypatch):
    picture = textured(5, (50, 40))
    common = [saved(picture, "JPEG"), saved(picture.convert("L"), "JPEG", optimize=True)]
    common.append(saved(picture, "JPEG", comment="a lake", restart_marker_rows=1))
    unusual = [saved(picture, "JPEG", progressive=True), saved(picture, "JPEG", exif=b"Exif\0\0")]
    monkeypatch.setattr(decoders.Image, "open", refuse)
    assert all(decoders.decode_plain(data) is not None for data in common)
    assert all(decoders.decode_plain(data) is None for data in unusual)
    monkeypatch.setattr(decoders, "MAX_PIXELS", 50 * 40 - 1)
    assert all(decoders.decode_plain(data) is None for data in common)


@pytest.mark.parametrize("wrong", [lambda data: None, lambda data: right_pixels(data) ^ 1])
def test_pillow_decodes_where_simplejpeg_has_other_pixels(monkeypatch, wrong):
    views.decoder.cache_clear()
    monkeypatch.setattr(decoders, "decode_plain", wrong)
    with pytest.warns(
        UserWarning,
        match=r"simplejpeg [\d.]+ and Pillow [\d.]+ decode the same JPEG to different pixels",
    ):
        assert views.decoder() is views.decode
    views.decoder.cache_clear()


def right_pixels(data):
    return crops.to_pixels(views.decode(data))
