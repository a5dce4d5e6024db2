"""`loaders.resample` against Pillow, bit for bit."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders import resample

ROOT = Path(__file__).parents[2]
BICUBIC = Image.Resampling.BICUBIC


def pictures(rng, height, width):
    """Noise; black and white noise, whose sums leave 0 to 255; a smooth ramp."""
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3).astype(np.uint8)
    return noise, (noise > 127).astype(np.uint8) * 255, ramp


def same(pixels, box, width, height):
    image = Image.fromarray(pixels).crop(box).resize((width, height), BICUBIC)
    found = resample.resize(pixels, box, width, height)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, np.asarray(image).transpose(2, 0, 1))


# (H, W), (height, width): down, up, one of each; columns first, and just not; blocks of 64 rows and
# groups of 8 columns full and not; a side kept; single pixels.
SIZES = [
    ((375, 500), (224, 224)), ((500, 375), (224, 224)), ((60, 80), (224, 224)),
    ((700, 60), (33, 70)), ((60, 700), (70, 33)),
    ((300, 224), (224, 187)), ((300, 224), (224, 186)),
    ((64, 64), (32, 8)), ((65, 63), (31, 9)), ((128, 40), (128, 16)), ((40, 128), (16, 128)),
    ((50, 50), (50, 50)), ((1, 1), (9, 7)), ((1, 300), (5, 2)), ((300, 1), (2, 5)),
    ((2, 3), (1, 1)), ((1500, 1100), (3, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_pixels_are_pillow_s(source, target):
    height, width = source
    for pixels in pictures(np.random.default_rng(0), height, width):
        same(pixels, (0, 0, width, height), target[1], target[0])


def test_random_boxes_of_random_images():
    rng = np.random.default_rng(1)
    columns_first = 0
    for _ in range(150):
        height, width = rng.integers(1, 400, 2).tolist()
        left, top = int(rng.integers(width)), int(rng.integers(height))
        right, bottom = int(rng.integers(left, width)) + 1, int(rng.integers(top, height)) + 1
        out_width, out_height = rng.integers(1, 250, 2).tolist()
        lost = bottom - top - out_height
        columns_first += lost > max(0, 2 * (right - left - out_width))
        pixels = pictures(rng, height, width)[rng.integers(3)]
        same(pixels, (left, top, right, bottom), out_width, out_height)
    assert 10 < columns_first < 140


def test_code_is_kept_apart_for_each_kind_of_processor(monkeypatch):
    here = Path(resample.__file__).parent / "__pycache__"
    folder = resample._folder()
    assert folder.parent == here
    assert Path(resample._rows.stats.cache_path).is_relative_to(folder)
    monkeypatch.setattr(resample.binding, "get_host_cpu_name", lambda: "another")
    assert resample._folder() not in (folder, here)
    monkeypatch.setattr(resample.os, "access", lambda path, mode: False)
    assert not resample._folder().is_relative_to(here)


def test_works_where_nothing_can_be_kept():
    """No folder for compiled code, as for a user without a home on a shared installation."""
    code = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import numpy as np\n"
        "from loaders import resample\n"
        "grey = np.full((30, 20, 3), 7, np.uint8)\n"
        "assert (resample.resize(grey, (0, 0, 20, 30), 8, 9) == 7).all()\n"
        "assert not resample._rows.stats.cache_path\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
