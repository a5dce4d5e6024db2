"""Confusion matrices, with their scale and what the marks mean."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from eval.report import palette
from eval.report.figures import CHARACTER, LINE, Sheet, printable, wrapped

MOST = 28  # classes that one picture has room for
NAME = 14  # characters
NUMBERS = 8  # classes up to which a cell has room for its number
# Inches: of a cell, with and without a number; of what stands around a matrix.
LARGE, CELL = 0.36, 1.12 * palette.SMALL / 72
LEFT, ABOVE, BELOW = (NAME + 5) * CHARACTER + 0.28, 2.4 * LINE, NAME * CHARACTER + 2.6 * LINE
SCALE = 5 * LINE  # inches of the scale and the legend above all
# Few in a hundred are what one looks for: the root of the share gives them a shade that is seen.
SHADES, COLORS = PowerNorm(0.5, vmin=0, vmax=100), "Blues"
TICKS = (0, 2, 10, 25, 50, 100)
RIGHT, EMPTY = "right: predicted is true", "class without a sample"

Panel = tuple[str, list[str], np.ndarray]


def most_confused(counts: np.ndarray, most: int = MOST) -> np.ndarray:
    """Numbers of the `most` classes with the most errors, theirs or taken for them, ascending.

    Args:
        counts: (K, K), the truth in rows.
    """
    wrong = counts - np.diag(np.diag(counts))
    errors = wrong.sum(0) + wrong.sum(1)
    return np.sort(np.argsort(-errors, kind="stable")[:most])


def confusion(panels: list[Panel]) -> Figure:
    """Confusion matrices one below the other: (title, K class names, counts (K, K) with the truth
    in rows), shown as percent of each row. Of more than MOST classes those with the most errors."""
    shown = [_cut(panel) for panel in panels]
    sides = [len(names) * (LARGE if len(names) <= NUMBERS else CELL) for _, names, *_ in shown]
    around = ABOVE + LINE + BELOW
    sheet = Sheet(max(palette.WIDTH, LEFT + max(sides)), SCALE + sum(sides) + around * len(sides))
    _scale(sheet, any((totals == 0).any() for *_, totals in shown))
    for (title, names, share, totals), side in zip(shown, sides, strict=True):
        sheet.text(0, 0, title, fontsize=palette.HEAD, weight="bold")
        sheet.top += ABOVE + LINE * title.count("\n")
        axis = sheet.axes(LEFT, 0, side, side)
        axis.imshow(share, cmap=COLORS, norm=SHADES)
        _name(axis, names, totals)
        _mark(axis, share, totals)
        sheet.top += side + BELOW + LINE * (1 - title.count("\n"))
    return sheet.figure


def _scale(sheet: Sheet, empty: bool) -> None:
    """The colour scale of all matrices and what the marks in them mean."""
    axis = sheet.axes(0.1, 1.2 * LINE, 0.48 * sheet.width, LINE)
    colors = ScalarMappable(SHADES, COLORS)
    sheet.figure.colorbar(colors, cax=axis, orientation="horizontal", ticks=TICKS)
    sheet.text(0, 0, "percent of the true class")
    handles = [Patch(facecolor="none", edgecolor=palette.VERMILION, linewidth=1.2)]
    labels = [RIGHT]
    if empty:
        handles.append(Patch(facecolor="white", edgecolor=palette.GREY, hatch="////"))
        labels.append(EMPTY)
    sheet.figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0.54, 1), frameon=False,
        borderaxespad=0, borderpad=0,
    )  # fmt: skip
    sheet.top += SCALE


def _cut(panel: Panel) -> tuple[str, list[str], np.ndarray, np.ndarray]:
    """Title, names, percent of the true class and number of samples of the classes shown."""
    title, names, counts = panel
    totals = counts.sum(axis=1)
    share = 100 * counts / np.maximum(totals, 1)[:, None]
    kept = most_confused(counts)
    title = wrapped(title, 54, 1)
    if len(kept) < len(names):
        title += f"\n{len(kept)} of {len(names)} classes, those with the most errors"
    return title, [names[i] for i in kept], share[np.ix_(kept, kept)], totals[kept]


def _name_of(name: str) -> str:
    """A class name of NAME characters at most. What is left out stands in the middle, because names
    of one set often begin, or end, alike."""
    name = printable(name)
    half = NAME // 2
    return name if len(name) <= NAME else f"{name[: NAME - 1 - half]}…{name[-half:]}"


def _name(axis: Axes, names: list[str], totals: np.ndarray) -> None:
    places = range(len(names))
    axis.set_xticks(places, [_name_of(name) for name in names], rotation=90)
    rows = [f"{_name_of(n)} ({t})" for n, t in zip(names, totals, strict=True)]
    axis.set_yticks(places, rows)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class (number of samples)")
    axis.spines[:].set_visible(True)


def _mark(axis: Axes, share: np.ndarray, totals: np.ndarray) -> None:
    """A frame around each right answer, hatching where nothing was asked, numbers if they fit."""
    for i, total in enumerate(totals):
        if not total:
            row = Rectangle(
                (-0.5, i - 0.5), len(totals), 1, fill=False, hatch="////", edgecolor=palette.GREY,
                linewidth=0,
            )  # fmt: skip
            axis.add_patch(row)
            continue
        frame = (i - 0.5, i - 0.5), 1, 1
        axis.add_patch(
            Rectangle(*frame, fill=False, edgecolor=palette.VERMILION, linewidth=0.9, zorder=3)
        )
    if len(totals) > NUMBERS:
        return
    for i, j in zip(*np.nonzero(share >= 0.5), strict=True):
        color = "white" if share[i, j] > 30 else "black"
        axis.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", color=color)
