"""Draws the glyphs that ship in loaders/glyphs anew: python -m tests.loaders.glyphs FILE.hex.gz

DejaVu Sans comes with matplotlib; Pillow draws it, at 12 pixels an em, in black and white.
"""

import gzip
import importlib.util
import sys
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont  # comes with matplotlib
from PIL import Image, ImageDraw, ImageFont

SIZE, BASELINE, CELL = 12, 12, 16  # pixels; of the baseline: rows above it
MARGIN = 40  # for what stands left of its own origin (accents)


def font_file() -> Path:
    """DejaVu Sans within matplotlib."""
    package = Path(importlib.util.find_spec("matplotlib").origin).parent
    return package / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"


def code_points() -> list[int]:
    """Those that the font has, ascending."""
    return sorted(TTFont(font_file(), lazy=True).getBestCmap())


def cell(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """A glyph in its (16, 16) cell, bool: ink from column 1 on, cut where the cell ends."""
    image = Image.new("1", (3 * MARGIN, CELL))
    ImageDraw.Draw(image).text((MARGIN, BASELINE), character, fill=1, font=font, anchor="ls")
    pixels = np.array(image)
    columns = np.flatnonzero(pixels.any(axis=0))
    found = np.zeros((CELL, CELL), dtype=bool)
    if len(columns):
        ink = pixels[:, columns[0] : columns[-1] + 1][:, : CELL - 1]
        found[:, 1 : 1 + ink.shape[1]] = ink
    return found


def lines(points: list[int]) -> list[str]:
    """Lines of the format of GNU Unifont, of the code points that have ink."""
    font = ImageFont.truetype(str(font_file()), SIZE, layout_engine=ImageFont.Layout.BASIC)
    made = []
    for point in points:
        pixels = cell(font, chr(point))
        if pixels.any():
            narrow = not pixels[:, 8:].any()
            bits = np.packbits(pixels[:, :8] if narrow else pixels, axis=1)
            made.append(f"{point:04X}:{bits.tobytes().hex().upper()}")
    return made


if __name__ == "__main__":
    text = "\n".join([*lines(code_points()), ""])
    Path(sys.argv[1]).write_bytes(gzip.compress(text.encode("ascii"), 9, mtime=0))
