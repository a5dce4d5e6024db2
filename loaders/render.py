"""Texts as pictures, for a model that reads pixels only (CLIPPO, arXiv 2212.08045).

The rules are those of its program (google-research/big_vision, pp/proj/clippo/pp_ops.py): ASCII
capitals become small; at most 768 code points are drawn, in rows of 16 pixels, black (0) on grey
(127); a glyph keeps one blank column on its left and at least four in all; lines break anywhere;
what does not fit is cut at the bottom; a missing glyph is blank. Of right-to-left and combined
scripts each code point is drawn by itself, from left to right.

Ours are the font, DejaVu Sans in place of GNU Unifont (loaders/glyphs/README.md), and the picture
of a text without any letter, which is all background.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loaders.errors import ConfigError

FONT_FILE = Path(__file__).parent / "glyphs" / "dejavu_sans_12.hex.gz"
MAX_CODE_POINTS = 768
ROW = 16  # pixels; a glyph is drawn in a cell of 16 x 16
SPACING, MIN_WIDTH = 1, 4
TEXT, BACKGROUND = 0, 127
# Part of the digest: raise it when a rule changes.
RULES_VERSION = "clippo-1"

_SMALL = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def trimmed(cell: np.ndarray) -> np.ndarray:
    """The columns of a glyph's cell that are drawn.

    Args:
        cell: (16, 16) bool, True where there is ink.

    Returns:
        (16, width): from one column before the first ink to the last ink, at least four columns
        unless the cell ends; of a blank cell its first four.
    """
    inked = np.flatnonzero(cell.any(axis=0))
    first, last = (inked[0], inked[-1]) if len(inked) else (0, 0)
    start = max(first - SPACING, 0)
    return cell[:, start : max(last + SPACING, start + MIN_WIDTH)]


def rows_of(widths: Sequence[int], size: int) -> np.ndarray:
    """Number of the row of each glyph on a picture of `size` pixels.

    A row is as long as the picture less the widest glyph of the text, and a glyph belongs to the
    row in which it ends; so nothing is cut at the right.

    Args:
        widths: (n,) in pixels, n at least 1.

    Returns:
        (n,) int64, not decreasing; a number may be left out.
    """
    return np.cumsum(widths) // (size - max(widths))


@functools.cache
def _glyphs() -> dict[int, np.ndarray]:
    """Code point -> pixels (16, width) uint8 of every glyph of the font, trimmed."""
    found = {}
    for line in gzip.decompress(FONT_FILE.read_bytes()).decode("ascii").splitlines():
        point, bits = line.split(":")
        half = np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8)).reshape(ROW, -1)
        cell = np.zeros((ROW, ROW), dtype=bool)
        cell[:, : half.shape[1]] = half
        found[int(point, 16)] = np.where(trimmed(cell), TEXT, BACKGROUND).astype(np.uint8)
    return found


class Renderer:
    """Callable from texts to pictures; takes the place of a `loaders.tokenizers.Tokenizer`.

    It has no padding, so `loaders.text_shapes` leaves its texts alone: equal ones are seldom, and
    every batch of pictures has one shape.

    Attributes:
        size: side of the pictures in pixels.
        context_length: code points that are drawn of a text at most.
        digest: SHA-256 over everything that decides the pixels: glyphs, rules and size.
    """

    context_length = MAX_CODE_POINTS

    def __init__(self, size: int) -> None:
        """Raises `ConfigError` for pictures on which two of the widest glyphs do not fit."""
        if size < 2 * ROW:
            raise ConfigError(
                f"model.image.size={size}: texts are drawn in rows of {ROW} pixels and need "
                f"pictures of at least {2 * ROW}"
            )
        self.size = size
        settings = f"{RULES_VERSION} {size}".encode()
        self.digest = hashlib.sha256(FONT_FILE.read_bytes() + b"\0" + settings).hexdigest()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Draw a list of texts.

        Returns:
            (n, 1, size, size) uint8 with two values, 0 and 127.

        Raises:
            TypeError: `texts` is one string, or holds something that is not a string.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"expected a list of strings, got {texts!r:.100}")
        pictures = np.full((len(texts), 1, self.size, self.size), BACKGROUND, dtype=np.uint8)
        for text, (picture,) in zip(texts, pictures, strict=True):
            self._draw(text, picture)
        return torch.from_numpy(pictures)

    def _draw(self, text: str, picture: np.ndarray) -> None:
        """Draw one text on a blank picture (size, size)."""
        blank = np.full((ROW, MIN_WIDTH), BACKGROUND, dtype=np.uint8)
        known = _glyphs()
        drawn = [known.get(ord(c), blank) for c in text[:MAX_CODE_POINTS].translate(_SMALL)]
        if not drawn:
            return
        rows = rows_of([glyph.shape[1] for glyph in drawn], self.size)
        tops = range(0, self.size, ROW)
        starts = np.searchsorted(rows, np.arange(len(tops) + 1))
        for top, start, end in zip(tops, starts[:-1], starts[1:], strict=True):
            if start < end:
                line = np.concatenate(drawn[start:end], axis=1)[: self.size - top]
                picture[top : top + ROW, : line.shape[1]] = line
