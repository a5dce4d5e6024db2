"""What all pictures share, and bars. A function that draws returns the figure; `save` writes it."""

import functools
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager, ft2font
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.report import palette

CHANCE = "guessing"
# Of a line of text, at the size SMALL.
LINE = 1.25 * palette.SMALL / 72  # inches
CHARACTER = 0.56 * palette.SMALL / 72  # inches, on average and a little more
STYLE = {
    "font.size": palette.SMALL,
    "axes.labelsize": palette.SMALL,
    "axes.titlesize": palette.HEAD,
    "figure.titlesize": palette.HEAD,
    "xtick.labelsize": palette.SMALL,
    "ytick.labelsize": palette.SMALL,
    "legend.fontsize": palette.SMALL,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
}
plt.rcParams.update(STYLE)


def new_figure(rows: int, columns: int, inches: tuple[float, float], **options) -> tuple:
    """Figure and its axes as an array (rows, columns); `options` as for `plt.subplots`."""
    made = {"figsize": inches, "squeeze": False, "layout": "constrained", **options}
    return plt.subplots(rows, columns, **made)


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG and free it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dots = palette.DOTS * palette.DENSITY
    figure.savefig(path, dpi=dots, bbox_inches="tight", pad_inches=0.03)
    plt.close(figure)


class Sheet:
    """A figure that is filled from the top, in inches: places are from the left edge, and below
    `top`, which whoever fills it moves on."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure: Figure = plt.figure(figsize=(width, height))
        self.top = 0.0

    def text(self, x: float, below: float, text: str, **style) -> None:
        """Text whose upper left corner is there."""
        style = {"va": "top", "linespacing": 1.2, **style}
        self.figure.text(x / self.width, 1 - (self.top + below) / self.height, text, **style)

    def axes(self, x: float, below: float, width: float, height: float) -> Axes:
        """Axes of that size whose upper left corner is there."""
        bottom = self.height - self.top - below - height
        inches = (x / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(inches)


@functools.cache
def _font() -> ft2font.FT2Font:
    return ft2font.FT2Font(font_manager.findfont("DejaVu Sans"))


@functools.cache
def _glyphs() -> frozenset[int]:
    return frozenset(_font().get_charmap())


def printable(text: str) -> str:
    """`text` on one line, without the characters that the font lacks (emoji) and with the dollar
    sign escaped, which would start a formula."""
    kept = "".join(c for c in " ".join(text.split()) if ord(c) in _glyphs())
    return kept.replace("$", r"\$").strip()


def wrapped(text: str, width: int, lines: int) -> str:
    """`printable(text)` broken at `width` characters, at most `lines` lines."""
    return textwrap.fill(printable(text), width, max_lines=lines, placeholder=" …")


def short(text: str, length: int) -> str:
    """`printable(text)` cut to `length` characters, the last one an ellipsis."""
    text = printable(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def length(text: str) -> float:
    """Inches of the longest line of `text` at the size SMALL."""
    font = _font()
    font.set_size(palette.SMALL, 72)
    widths = []
    for line in text.replace(r"\$", "$").split("\n"):
        font.set_text(line)
        widths.append(font.get_width_height()[0] / 64 / 72)
    return max(widths)


def fitted(text: str, inches: float, lines: int = 1) -> str:
    """`printable(text)` in at most `lines` lines that are not longer than `inches`."""
    for width in range(int(2 * inches / CHARACTER), 3, -1):
        part = short(text, width) if lines == 1 else wrapped(text, width, lines)
        if length(part) <= inches:
            return part
    return "…"


def legend_below(figure: Figure, handles: list, labels: list[str]) -> None:
    """One legend under the axes, as many entries side by side as there is room for."""
    longest = max(map(len, labels), default=1)
    room = int(figure.get_figwidth() / ((longest + 6) * CHARACTER))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=max(1, min(room, len(labels))),
        frameon=False, handlelength=1.6, columnspacing=1.2,
    )  # fmt: skip


def bars(
    groups: list[str], lines: dict[str, list[dict | None]], chance: list[float], title: str
) -> Figure:
    """Bars with 95 % intervals, one block for each group, one bar in it for each run.

    Args:
        groups: head of each block. lines: run -> one result row, or None, for each group.
        chance: the level of guessing of each group, percent, a dashed line across its bars.
    """
    each, gap = 1.5 * LINE, 3.2 * LINE  # inches of a bar, and of a head with what is around it
    height = len(groups) * (len(lines) * each + gap) + 6 * LINE
    figure, axes = new_figure(1, 1, (palette.WIDTH, height))
    axis, place, ticks = axes[0, 0], 0.0, []
    for g, (group, level) in enumerate(zip(groups, chance, strict=True)):
        place += gap / each
        _head(axis, group, place - 0.62)
        top = place - 0.5
        for i, (name, results) in enumerate(lines.items()):
            if results[g] is None:
                style = {"textcoords": "offset points", "va": "center"}
                axis.annotate("— not evaluated", (level, place), (4, 0), **style)
            else:
                _bar(axis, results[g], place, palette.look(i)[0])
            ticks.append((place, short(name, 18)))
            place += 1
        axis.plot([level] * 2, [top, place - 0.5], color=palette.DARK, linestyle="--", label=CHANCE)
    axis.set_yticks(*zip(*ticks, strict=True))
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(place - 0.4, gap / each - 1.9)
    axis.set_xlim(0, 1.12 * axis.get_xlim()[1])
    axis.set_xlabel("percent, with 95 % interval")
    figure.suptitle(wrapped(title, 60, 2), fontweight="bold")
    legend_below(figure, axis.get_lines()[-1:], [CHANCE])
    return figure


def _head(axis: Axes, text: str, place: float) -> None:
    """What a block of bars measures, from its left edge on: the first line in bold."""
    name, _, rest = text.partition("\n")
    style = {"textcoords": "offset points", "annotation_clip": False, "va": "bottom"}
    edge = axis.get_yaxis_transform()
    axis.annotate(printable(name), (0, place), (3, 10), xycoords=edge, weight="bold", **style)
    axis.annotate(printable(rest), (0, place), (3, 0), xycoords=edge, **style)


def _bar(axis: Axes, row: dict, place: float, color: str) -> None:
    """One result, its interval where it has one, and its number."""
    value, (low, high) = row["value"], row["ci95"] or [row["value"]] * 2
    axis.barh(place, value, 0.8, color=color)
    if row["ci95"]:
        reach = np.maximum([[value - low], [high - value]], 0)
        axis.errorbar(value, place, xerr=reach, fmt="none", ecolor="#333", capsize=3, linewidth=1)
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
    axis.annotate(
        f"{value:.1f}", (max(value, high), place), (4, 0), textcoords="offset points",
        va="center", bbox=ground, zorder=4,
    )  # fmt: skip
