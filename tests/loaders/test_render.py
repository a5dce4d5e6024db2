"""Texts as pictures: the published rules, their worked numbers, and the font that ships."""

import gzip
import hashlib
import pickle

import numpy as np
import pytest
import torch

from loaders import render, tokenizers
from loaders.batch import collate
from loaders.errors import ConfigError
from tests.loaders import glyphs

PRINTABLE = "".join(map(chr, range(33, 127)))


@pytest.fixture(scope="module")
def draw():
    return tokenizers.build("rendered", image_size=224)


def inked(picture):
    """(H, W) bool of one picture."""
    return (picture[0] == 0).numpy()


@pytest.mark.parametrize(
    ("columns", "width"),
    [(range(1, 7), 7), ([0], 4), ([7], 4), ([14, 15], 3), (range(16), 16), ([], 4)],
)
def test_widths_of_glyphs_are_the_published_ones(columns, width):
    cell = np.zeros((16, 16), dtype=bool)
    cell[5, list(columns)] = True
    kept = render.trimmed(cell)
    assert kept.shape == (16, width)
    assert kept.sum() == len(columns)
    if len(columns) and columns[0]:
        assert not kept[:, 0].any()  # one blank column on the left


@pytest.mark.parametrize(
    ("widths", "size", "rows"),
    [
        ([7] * 20, 32, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 5, 5, 5]),
        ([5] * 14, 30, [0] * 4 + [1] * 5 + [2] * 5),
        ([16, 4, 4], 32, [1, 1, 1]),  # the first one ends in the second row
    ],
)
def test_rows_are_the_published_ones(widths, size, rows):
    assert render.rows_of(widths, size).tolist() == rows


def test_a_long_text_is_cut_at_the_bottom():
    """768 letters of width 7 on 224 pixels: 25 rows, 14 of which are on the picture."""
    rows = render.rows_of([7] * 768, 224)
    assert rows.max() + 1 == 25
    assert (rows < 14).sum() == 433


def test_a_row_is_never_wider_than_the_picture():
    draws = np.random.default_rng(0).integers(3, 17, size=(200, 60))
    for widths in draws:
        rows = render.rows_of(widths, 48)
        for row in np.unique(rows):
            assert widths[rows == row].sum() <= 48


@pytest.mark.parametrize(
    ("text", "size"),
    [("A photo of a cat.", 96), ("W" * 100, 40), ("i l . ' \u00ef\u0416\u222b" * 9, 70)],
)
def test_a_picture_is_what_the_rules_say_glyph_by_glyph(text, size):
    """Put down letter by letter, from the cells of the font as Pillow draws them here."""
    font = glyphs.ImageFont.truetype(str(glyphs.font_file()), 12, layout_engine=0)
    expected = np.zeros((1000, size), dtype=bool)
    letters = [c.lower() if c.isascii() else c for c in text]
    kept = []
    for letter in letters:
        cell = glyphs.cell(font, letter)
        columns = [x for x in range(16) if cell[:, x].any()]
        left, right = (max(columns[0] - 1, 0), columns[-1] + 1) if columns else (0, 0)
        kept.append(cell[:, left : max(right, left + 4)])
    widest, total, places = max(k.shape[1] for k in kept), 0, {}
    for glyph in kept:
        total += glyph.shape[1]
        row = int(np.floor(np.float32(total) / np.float32(size - widest)))
        left = places.get(row, 0)
        expected[16 * row : 16 * row + 16, left : left + glyph.shape[1]] = glyph
        places[row] = left + glyph.shape[1]
    found = inked(render.Renderer(size)([text])[0])
    assert np.array_equal(found, expected[:size])
    assert found[size // 16 * 16 :].any() == (size % 16 > 0)  # a part of a row


def test_shape_values_case_and_length(draw):
    texts = ["A Photo of a CAT", "a photo of a cat", "", " \n\t", "\U0001f408\u4e2d", PRINTABLE]
    pictures = draw(texts)
    assert pictures.shape == (6, 1, 224, 224)
    assert pictures.dtype == torch.uint8
    assert pictures.unique().tolist() == [0, 127]
    assert torch.equal(pictures[0], pictures[1])
    for blank in (2, 3, 4):  # nothing, spaces, and glyphs that the font does not have
        assert (pictures[blank] == 127).all()
    assert torch.equal(pictures, torch.cat([draw([text]) for text in texts]))
    assert draw([]).shape == (0, 1, 224, 224)
    # Small letters are ASCII's alone, as published.
    assert not torch.equal(draw(["\u00c9"]), draw(["\u00e9"]))
    # As published, 768 code points are read of a text. 770 of the narrowest would have a place.
    dots, longer, other = draw(["." * 768, "." * 768 + "l" * 9, "." * 767 + "l"])
    assert torch.equal(dots, longer)
    assert not torch.equal(dots, other)


def test_pictures_that_are_too_small_are_refused():
    with pytest.raises(ConfigError, match=r"model\.image\.size=31: .*at least 32"):
        tokenizers.build("rendered", image_size=31)


def test_it_stands_in_for_a_tokenizer(draw):
    again = pickle.loads(pickle.dumps(draw))
    assert torch.equal(again(["a cat"]), draw(["a cat"]))
    assert again.digest == draw.digest
    assert len(draw.digest) == 64
    assert draw.digest != tokenizers.build("rendered", image_size=96).digest
    for wrong in ("a cat", ["a cat", None]):
        with pytest.raises(TypeError, match="list of strings"):
            draw(wrong)
    texts = draw(["a cat", "a dog"])
    facts = dict.fromkeys(("label", "uid", "source", "seed", "step_seed", "step"), 1)
    samples = [{"text": text[None], "bad": [], **facts} for text in texts]
    batch = collate(samples, draw)
    assert torch.equal(batch["text"], texts[:, None])  # (b, T, 1, H, W)
    assert "distinct_text" not in batch


def test_digest_changes_with_glyphs_and_rules(draw, monkeypatch, tmp_path):
    monkeypatch.setattr(render, "RULES_VERSION", "other")
    assert render.Renderer(224).digest != draw.digest
    monkeypatch.undo()
    other = tmp_path / "other.hex.gz"
    other.write_bytes(gzip.compress(b"0041:" + b"F" * 32 + b"\n"))
    monkeypatch.setattr(render, "FONT_FILE", other)
    assert render.Renderer(224).digest != draw.digest


def test_glyphs_are_those_that_the_read_me_states():
    """Drawn again: of ASCII all, of the others every eighth."""
    packed = render.FONT_FILE.read_bytes()
    read_me = (render.FONT_FILE.parent / "README.md").read_text()
    assert hashlib.sha256(packed).hexdigest() in read_me
    assert hashlib.sha256(glyphs.font_file().read_bytes()).hexdigest() in read_me
    lines = gzip.decompress(packed).decode().splitlines()
    assert f"{len(lines):,} code points" in read_me
    points = glyphs.code_points()
    chosen = {point for point in points if point < 127} | {*points[::8]}
    stored = [line for line in lines if int(line.split(":")[0], 16) in chosen]
    assert stored == glyphs.lines(sorted(chosen))
