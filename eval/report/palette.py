"""Sizes and colours of every picture. Without matplotlib, so that texts can be written at once.

The colours are those of Okabe and Ito (2008), "Color Universal Design", less the yellow, which is
hardly seen on white: people with any of the usual colour blindnesses tell them apart.
"""

WIDTH = 4.4  # inches at most: 484 of the 500 pixels of a narrow page
DOTS = 110  # pixels of a page in an inch
DENSITY = 2  # dots of the file in such a pixel, for print and for fine screens
SMALL = 8  # points, the size of nearly all text; nothing is smaller
HEAD = 9

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = COLORS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000",
)  # fmt: skip
RIGHT, WRONG = BLUE, VERMILION
DARK, GREY, GREYS = "#24292f", "#6e7781", ("#8c959f", "#afb8c1", "#d0d7de")
MARKS = ("", "o", "s", "^", "D")


def look(place: int) -> tuple[str, str]:
    """Colour and mark of the series number `place`, counted from 0: colours first, and marks where
    the colours come again."""
    return COLORS[place % len(COLORS)], MARKS[place // len(COLORS) % len(MARKS)]
