"""Images and captions that are small in the file and large in memory, time, or on a terminal."""

import io
import json
import struct
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.checks.verify_shard import _image_faults
from data_prep.sets import set_folder as data_folder
from eval.sources.shards import ShardSource
from loaders import decoders, manifest, tokenizers, views
from loaders.batch import TripletDataset
from loaders.errors import DataError, run_cli
from loaders.labels import LabelSpace
from loaders.manifest import open_shards
from loaders.printable import MAX_CHARACTERS, printable
from loaders.texts import TextOptions
from tests.hostile.parts import png, png_chunk, png_header
from tests.loaders.conftest import encoded, sample, write_tar

ROOT = Path(__file__).parents[2]


def jpeg_with_sides(width: int, height: int) -> bytes:
    """A small JPEG whose frame header states other sides."""
    data = bytearray(encoded(1))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated: each takes as long as a whole image."""
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + data[-2:]


def gif(frames: int, side: int) -> bytes:
    file = io.BytesIO()
    pictures = [Image.new("L", (side, side), i % 256) for i in range(frames)]
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:])
    return file.getvalue()


def text_bomb() -> bytes:
    """A PNG with 100 MB of compressed text before the picture."""
    data = png(8, 8)
    text = b"Comment\0\0" + zlib.compress(bytes(100 << 20), 9)
    end = 8 + 25  # signature and IHDR
    return data[:end] + png_chunk(b"zTXt", text) + data[end:]


BOMBS = {
    "png 50,000 x 50,000": (lambda: png_header(50_000, 50_000), "too_large"),
    "png 2^31 x 2^31": (lambda: png_header(2**31 - 1, 2**31 - 1), "too_large|not_an_image"),
    "png just above": (lambda: png_header(9460, 9459), "too_large"),
    "jpeg 65,500 x 65,500": (lambda: jpeg_with_sides(65_500, 65_500), "too_large"),
    "jpeg of 200 scans": (lambda: many_scans(3000, 200), "too_large"),
    "png cut": (lambda: png(1000, 1000)[:-300], "truncated|undecodable"),
    "png text": (text_bomb, "not_an_image"),
    "gif sides": (lambda: b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(99), "too|not"),
}  # fmt: skip


@cache
def bomb(what: str) -> bytes:
    """Content of an image."""
    return BOMBS[what][0]()


@pytest.mark.parametrize("what", BOMBS)
def test_bombs_are_bad_images_in_training_and_faults_in_verify(what):
    data = bomb(what)
    for decode in (views.decode, views.decoder()):
        with pytest.raises(views.BadImage, match=BOMBS[what][1]):
            decode(data)
    if "scans" not in what:  # verify decodes as often as there are images, and bounds no scans
        assert list(_image_faults(memoryview(data), True)), what


def test_large_images_that_are_allowed_stay_within_the_memory_that_is_stated():
    """16 million pixels of every kind fit into three times 4 bytes a pixel."""
    code = """
import sys
from loaders import views
from tests.hostile.parts import limit_memory, png
makes = {"rgb": (3, 8), "rgba": (4, 8), "grey alpha": (2, 8), "grey 16": (2, 16)}
data = {name: png(4000, 4000, *sizes) for name, sizes in makes.items()}
views.decode(png(8, 8))
limit_memory(12 * 4000**2 + (28 << 20))
for name, content in data.items():
    print(name, views.decode(content).size)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(4000, 4000)") == 4


def test_only_the_first_of_many_frames_is_decoded():
    data = gif(500, 64)
    assert views.decode(data).getpixel((0, 0)) == (0, 0, 0)
    assert views.decode(many_scans(300, 200)).size == (300, 300)  # many, but small
    assert views.decode(many_scans(1000, 9)).size == (1000, 1000)


def test_tiles_of_transparent_images_meet(monkeypatch):
    """Against the whole image at once, for every way a PNG states transparency."""
    pixels = np.random.default_rng(0).integers(0, 256, (150, 131, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    monkeypatch.setattr(decoders, "_TILE", 64)
    ways = [
        (picture, {}), (picture.convert("LA"), {}),
        (picture.convert("RGB"), {"transparency": tuple(pixels[0, 0, :3].tolist())}),
        (picture.convert("P"), {"transparency": bytes(range(256))}),
    ]  # fmt: skip
    for image, options in ways:
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1, **options)
        whole = Image.open(file).convert("RGBA")
        white = Image.new("RGBA", whole.size, "white")
        expected = Image.alpha_composite(white, whole).convert("RGB")
        assert np.array_equal(np.asarray(views.decode(file.getvalue())), np.asarray(expected))


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.build("clip", 77)


def test_training_replaces_bombs_and_evaluation_names_them(tmp_path, tokenizer):
    bombs = [bomb(what) for what in BOMBS]
    members = [m for i, data in enumerate(bombs) for m in sample(f"bomb{i}", jpg=data, txt=b"b")]
    members += [m for i in range(9) for m in sample(f"good{i}", i, txt=b"good")]
    shards = open_shards(write_tar(tmp_path / "set" / "0.tar", members))
    options, view = TextOptions(["a {}"]), views.build_eval(16, 16)
    dataset = TripletDataset(
        [shards], LabelSpace([shards]), [view], options, tokenizer, seed=0, decode=views.decoder()
    )
    for i in range(len(bombs)):
        found = dataset[0, i, i]
        assert found["uid"] >= len(bombs)
        assert found["bad"][0].key == f"bomb{i}"
    source = ShardSource(tmp_path / "set")
    for i in range(len(bombs)):
        with pytest.raises(views.BadImage):
            source.image(i)
    assert source.image(len(bombs)).size == (40, 32)


ESCAPES = {
    "red": "\x1b[31mred\x1b[0m", "title": "\x1b]0;owned\x07", "clear": "\x1b[2J\x1b[1;1H",
    "8-bit": "\x9b31m", "overwrite": "good\rbad", "backspace": "a\b\b", "backwards": "a\u202egpj",
    "hidden": "a\u200bb", "separator": "a\u2028b", "half": "\ud800", "bytes": "\udcff",
    "zero": "\0", "delete": "\x7f",
}  # fmt: skip


@pytest.mark.parametrize("what", ESCAPES)
def test_nothing_but_text_reaches_a_terminal(what):
    text = printable(f"error: größe 🙂 {ESCAPES[what]}\n\tnext")
    assert "error: größe 🙂" in text
    assert "\n\tnext" in text
    assert all(c.isprintable() or c in "\n\t" for c in text)
    assert "\\" in text
    assert len(printable("x" * 10**6)) < MAX_CHARACTERS + 100
    text.encode()


def test_errors_are_printed_without_control_characters(capsys):
    """The one place where a command prints its error."""

    def main() -> None:
        raise DataError("/d/\x1b[2J.tar: " + "".join(ESCAPES.values()))

    with pytest.raises(SystemExit):
        run_cli(main)
    printed = capsys.readouterr().err
    assert "\\x1b[2J.tar" in printed
    assert all(c.isprintable() or c == "\n" for c in printed)


MEGABYTES = {
    "one letter": "a" * 10**6, "line feeds": "a\n" * 500_000, "entities": "&" + "amp;" * 250_000,
    "mojibake": "&" + "amp;" * 125_000 + "Ã©" * 250_000, "combining": "a" + "\u0301" * 10**6,
    "characters": "漢" * 10**6, "digits": "1" * 10**6, "escapes": "\x1b[31m" * 200_000,
    "words": "a photo of a cat " * 60_000,
}  # fmt: skip


@pytest.mark.parametrize("what", MEGABYTES)
def test_captions_of_a_megabyte_become_the_tokens_of_their_start(tmp_path, tokenizer, what):
    """Without a limit, cleaning them takes from half a minute to days."""
    text = MEGABYTES[what]
    members = sample("k", txt=text.encode(), json=json.dumps({"c": text}).encode())
    shards = open_shards(write_tar(tmp_path / "0.tar", members))
    view = views.build_eval(16, 16)
    for source in ("txt", "json.c"):
        options = TextOptions(["a {}"], source)
        dataset = TripletDataset([shards], LabelSpace([shards]), [view], options, tokenizer, seed=0)
        ids = dataset[0, 0, 0]["text"]
        assert ids.shape == (1, 77)
        assert not dataset[0, 0, 0]["bad"]
        assert (ids == tokenizer([text[: tokenizers.MAX_CHARACTERS]])).all()


def test_half_a_character_in_json_is_a_bad_caption(tmp_path, tokenizer):
    r"""JSON may state `\ud800` alone; no tokenizer, hash or file name takes it."""
    members = sample("bad", json=b'{"c": "a \\ud800 b"}') + sample(
        "pair", json=b'{"c": "\\ud83d\\ude00"}'
    )
    shards = open_shards(write_tar(tmp_path / "0.tar", members))
    options, view = TextOptions(["a {}"], "json.c"), views.build_eval(16, 16)
    dataset = TripletDataset(
        [shards], LabelSpace([shards]), [view], options, tokenizer, seed=0, caption_labels="by_text"
    )
    found = dataset[0, 0, 0]
    assert (found["bad"][0].key, found["bad"][0].reason) == ("bad", "caption_not_text")
    assert found["uid"] == 1


def test_class_names_of_half_a_character_are_refused(tmp_path):
    write_tar(tmp_path / "shards" / "0.tar", sample("a", cls=b"0"))
    row = {"file": "shards/0.tar", "samples": 1, "bytes": 1}
    content = {"name": "s", "kind": "image_label", "shards": [row]}
    content["classes"] = [{"id": 0, "synset": None, "names": ["\ud800"]}]
    (tmp_path / manifest.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"manifest\.json: class 0 has no name"):
        open_shards(tmp_path)
    assert data_folder.SHARDS == "shards"
