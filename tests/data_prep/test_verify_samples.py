"""verify.py: single bad samples in good tars, and labels."""

import io
import json
import re
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from data_prep.checks import verify_shard
from data_prep.sets.shard_writer import permutation
from data_prep.verify import verify
from loaders import views
from loaders.errors import DataError
from loaders.manifest import open_shards
from tests.data_prep.verify_parts import REPOSITORY, SIZE, begin, make, put
from tests.loaders.conftest import encoded, sample


@pytest.fixture
def made(tmp_path):
    return make(tmp_path / "D")


BOMB = b"P6 60000 60000 255\n"  # a header is enough
LARGE = b"P6 10000 10000 255\n"  # below the size that Pillow refuses by itself


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"jpg": encoded(5, (400, 300))[:-999]}, "image: image file is truncated"),
        ({"jpg": encoded(5)[:300]}, "image: Truncated File Read"),
        ({"jpg": encoded(5, form="PNG")[:-60]}, "image: .*truncated"),
        ({"jpg": b"<html>not found</html>"}, "image: cannot identify image file$"),
        ({"jpg": b""}, "image: zero bytes"),
        ({"jpg": BOMB}, r"image: Image size \(3600000000 pixels\) exceeds"),
        ({"jpg": LARGE}, "image: 10000 x 10000 pixels, more than"),
        ({"txt": "grün".encode("latin-1")}, "caption: not UTF-8 at byte 2"),
        ({"txt": b" \n"}, "caption: empty"),
        ({"json": b'{"a": 1'}, "json: "),
        ({"json": b"[1]"}, "json: list instead of an object"),
        ({"json": b"[" * 100_000}, "json: maximum recursion depth"),
        ({"jpg": b"x", "json": b"{"}, "image: cannot identify image file; json: "),
    ],
)
def test_a_bad_sample_is_listed_and_its_shard_stays(made, parts, reason):
    good = {"txt": b"a", "json": b"{}"}
    put(
        made,
        1,
        sample("000001000", 1, **good)
        + sample("000001001", 2, **good | parts)
        + sample("000001003", 3, **good),
    )
    assert verify(made).bad == 1
    line = (made / "bad_samples.tsv").read_text()
    key, why = line.rstrip("\n").split("\t")
    assert key == "00001/000001001"
    assert re.match(reason, why), why
    manifest = json.loads((made / "manifest.json").read_bytes())
    assert (manifest["bad_samples"], manifest["num_samples"]) == (1, 11)
    assert "0x" not in why  # an address would differ between runs
    put(made, 1, sample("000001000", 1, **good))
    assert verify(made).bad == 0
    assert not (made / "bad_samples.tsv").exists()


def test_samples_without_image_or_caption_are_bad(made):
    put(
        made,
        0,
        [*sample("000000000", txt=b"a"), ("000000001.txt", b"b"), ("000000002.jpg", encoded(1))],
    )
    assert verify(made).bad == 2
    lines = (made / "bad_samples.tsv").read_text().splitlines()
    assert lines == ["00000/000000001\timage: none", "00000/000000002\tcaption: none"]


def test_floating_point_image_is_bad_as_in_training(made):
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(file, "TIFF")
    put(made, 0, sample("000000000", jpg=file.getvalue(), txt=b"a"))
    assert verify(made).bad == 1
    assert "floating-point" in (made / "bad_samples.tsv").read_text()
    with pytest.raises(views.BadImage, match="unsupported_mode"):
        views.decode(file.getvalue())


def test_limits_are_those_of_training():
    assert (verify_shard.MAX_PIXELS, verify_shard.FORMATS) == (views.MAX_PIXELS, views.FORMATS)


def test_labels_outside_of_the_class_table_refuse_to_close(tmp_path):
    out = tmp_path / "D"
    begin(out, "image_label", shards=1)
    parts = [sample("000000000", 0, cls=b"1"), sample("000000001", 1, cls=b"2")]
    put(out, 0, [*chain(*parts), *sample("000000002", 2), *sample("000000003", 3, cls=b"-7")])
    with pytest.raises(DataError, match=r"3 samples .*00000/000000001: label: 2, outside 0\.\.1"):
        verify(out)
    assert (out / "bad_samples.tsv").read_text().splitlines() == [
        "00000/000000001\tlabel: 2, outside 0..1",
        "00000/000000002\tlabel: none",
        "00000/000000003\tlabel: -7, outside 0..1",
    ]
    assert not (out / "manifest.json").exists()
    put(out, 0, parts[0])
    assert verify(out).samples == 1
    assert open_shards(out).labels.tolist() == [1]


def test_sampled_decoding_is_seeded(made):
    """Of 4 images, the same 2 are decoded in every run, so the same damage is found."""
    chosen = permutation(SIZE, seed=2)[:2]
    assert set(chosen) != {0, 1}  # not simply the first ones
    for position in range(SIZE):
        parts = [sample(f"{2000 + i:06d}", i, txt=b"x") for i in range(SIZE)]
        parts[position][0] = (parts[position][0][0], encoded(0)[:300])
        put(made, 2, [*chain(*parts)])
        sampled, whole = verify(made, decode=2), verify(made)
        assert sampled.bad == (position in chosen)
        # What did not decode is not counted; the other shards were read in the first run.
        assert sampled.decoded == 2 * (3 if position == 0 else 1) - sampled.bad
        assert (whole.bad, whole.decoded % SIZE) == (1, SIZE - 1)
        assert json.loads((made / "manifest.json").read_bytes())["decoded_samples"] == 3 * SIZE - 1


def test_reshard_drops_what_is_listed(made, tmp_path):
    put(made, 1, [*sample("a/1", 1, txt=b"x"), *sample("a/2", 2, txt=b"\xff"), ("a/3.txt", b"y")])
    assert verify(made).bad == 2
    script = REPOSITORY / "data_prep" / "reshard.py"
    keys = made / "bad_samples.tsv"
    command = [sys.executable, script, made, "--keys", keys, "--drop", "--out", tmp_path / "NEW"]
    subprocess.run(command, check=True, capture_output=True)
    summary = verify(tmp_path / "NEW")
    assert (summary.samples, summary.bad) == (2 * SIZE + 1, 0)
