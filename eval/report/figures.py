"""The pictures. Every function draws one file from plain data and returns nothing."""

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
from matplotlib.ticker import EngFormatter, MaxNLocator

CHANCE = "guessing"
RIGHT, WRONG = "#1a7f37", "#cf222e"
COLORS = plt.get_cmap("tab10").colors


def new_figure(rows: int, columns: int, inches: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """Figure and its axes as an array (rows, columns)."""
    return plt.subplots(rows, columns, figsize=inches, squeeze=False, layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG and free it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


@functools.cache
def _glyphs() -> frozenset[int]:
    path = font_manager.findfont("DejaVu Sans")
    return frozenset(ft2font.FT2Font(path).get_charmap())


def printable(text: str) -> str:
    """`text` on one line, without the characters that the font lacks (emoji) and with the dollar
    sign escaped, which would start a formula."""
    kept = "".join(c for c in " ".join(text.split()) if ord(c) in _glyphs())
    return kept.replace("$", r"\$").strip()


def wrapped(text: str, width: int, lines: int) -> str:
    """`printable(text)` broken at `width` characters, at most `lines` lines."""
    return textwrap.fill(printable(text), width, max_lines=lines, placeholder=" …")


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a fiftieth of the points; it narrows towards both ends, so that
    a rising curve is not bent there."""
    half = len(values) // 100
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(half, np.minimum(place, len(values) - 1 - place))
    return (total[place + reach + 1] - total[place - reach]) / (2 * reach + 1)


def _series(records: list[dict], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(r[x], r[y]) for r in records if r.get(y) is not None and r.get(x) is not None]
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def curves(logs: dict[str, list[dict]], path: Path) -> None:
    """Training curves of runs (name -> lines of metrics.jsonl): loss with its floor, mean number of
    positives per row, and temperature multiplier; a panel without any data is left out."""
    panels = [
        ("loss", "loss (dashed: floor, the entropy of the targets)"),
        ("mean_positives", "positives per row, mean over the global batch"),
        ("scale", "scale (multiplier of the cosine)"),
    ]
    panels = [p for p in panels if any(p[0] in r for log in logs.values() for r in log)]
    everywhere = all("samples" in r for log in logs.values() for r in log)
    x = "samples" if everywhere else "step"
    figure, axes = new_figure(1, max(1, len(panels)), (5.2 * max(1, len(panels)), 4))
    for axis, (key, title) in zip(axes[0], panels, strict=False):
        for color, (name, log) in zip(COLORS, logs.items(), strict=False):
            steps, values = _series(log, x, key)
            axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            axis.plot(steps, _smooth(values), color=color, label=printable(name), linewidth=1.6)
            if key == "loss":
                steps, floor = _series(log, x, "floor")
                axis.plot(steps, _smooth(floor), color=color, linestyle="--", linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("samples seen" if x == "samples" else "step")
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
    # One legend below: inside a panel it would hide a curve.
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=10)
    save(figure, path)


def bars(
    groups: list[str],
    lines: dict[str, list[dict | None]],
    chance: list[float],
    title: str,
    path: Path,
) -> None:
    """Bars with 95 % intervals. `lines`: run -> one result row (or None) per group; `chance`: the
    level of guessing per group, percent, drawn as a dashed line across the group."""
    figure, axes = new_figure(1, 1, (max(6.0, 2.2 * len(groups) + 1.5), 4.5))
    axis = axes[0, 0]
    width = 0.8 / len(lines)
    for i, (color, (name, results)) in enumerate(zip(COLORS, lines.items(), strict=False)):
        place = np.arange(len(groups)) - 0.4 + (i + 0.5) * width
        value = np.array([row["value"] if row else np.nan for row in results])
        low, high = np.array([row["ci95"] if row else [np.nan] * 2 for row in results]).T
        axis.bar(place, value, width * 0.92, color=color, label=printable(name))
        spread = [np.maximum(value - low, 0), np.maximum(high - value, 0)]
        axis.errorbar(place, value, spread, fmt="none", ecolor="#333", capsize=3, linewidth=1)
        for x, row in zip(place, results, strict=True):
            text, top = (f"{row['value']:.1f}", row["ci95"][1]) if row else ("—", 0)
            style = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 8}
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
            axis.annotate(text, (x, top), (0, 3), bbox=ground, zorder=4, **style)
    for g, level in enumerate(chance):
        label = None if g else CHANCE
        axis.plot([g - 0.45, g + 0.45], [level] * 2, color="k", linestyle="--", label=label)
    axis.set_xticks(range(len(groups)), [printable_lines(group) for group in groups], fontsize=9)
    axis.set_ylabel("percent, with 95 % interval")
    axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    axis.set_title(title, fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] == CHANCE)
    handles, labels = [handles[i] for i in order], [labels[i] for i in order]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    save(figure, path)


def printable_lines(text: str) -> str:
    """`printable` for each line of a text with line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def confusion(panels: list[tuple[str, list[str], np.ndarray]], path: Path) -> None:
    """Confusion matrices: (title, K class names, counts (K, K) with the truth in rows), shown as
    percent of each row, one below the other."""
    side = [0.26 * len(names) + 2.2 for _, names, _ in panels]
    figure, axes = new_figure(len(panels), 1, (max(side), sum(side)))
    for axis, (title, names, counts) in zip(axes[:, 0], panels, strict=True):
        share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
        labels = [printable(name) for name in names]
        totals = counts.sum(axis=1)
        axis.set_xticks(range(len(names)), labels, rotation=90, fontsize=8)
        rows = [f"{label} ({total})" for label, total in zip(labels, totals, strict=True)]
        axis.set_yticks(range(len(names)), rows, fontsize=8)
        for i, j in zip(*np.nonzero(share >= 10), strict=True):
            color = "white" if share[i, j] > 55 else "black"
            axis.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", fontsize=6, color=color)
        axis.set_xlabel("predicted")
        axis.set_ylabel("true (number of samples)")
        axis.set_title(title, fontsize=11)
    save(figure, path)


def _picture(axis: Axes, image, color: str | None = None) -> None:
    axis.imshow(image)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(color=color or "#bbb", linewidth=4 if color else 1)


def retrieval_grid(
    by_text: list[tuple[str, list[tuple]]],
    by_image: list[tuple[object, list[tuple[str, bool]]]],
    title: str,
    path: Path,
) -> None:
    """Top: caption -> best images, (image, is a positive) each. Bottom: image -> best captions,
    (caption, is a positive) each. Right answers are green and ticked, wrong ones red and crossed.
    """
    best = len(by_text[0][1])
    rows = len(by_text) + len(by_image)
    figure, axes = new_figure(rows, best + 1, (2.0 * (best + 1.5), 1.9 * rows))
    for line, (caption, found) in zip(axes, by_text, strict=False):
        line[0].axis("off")
        line[0].text(0.5, 0.5, wrapped(caption, 20, 6), ha="center", va="center", fontsize=10)
        for axis, (image, right) in zip(line[1:], found, strict=True):
            _picture(axis, image, RIGHT if right else WRONG)
            axis.set_xlabel("✓" if right else "✗", color=RIGHT if right else WRONG, fontsize=12)
    for line, (image, found) in zip(axes[len(by_text) :], by_image, strict=True):
        _picture(line[0], image)
        for axis in line[1:]:
            axis.axis("off")
        for i, (caption, right) in enumerate(found):
            line[1].text(
                0.05,
                0.9 - 0.2 * i,
                f"{'✓' if right else '✗'} {wrapped(caption, 85, 1)}",
                color=RIGHT if right else WRONG,
                fontsize=10,
                va="center",
                transform=line[1].transAxes,
                in_layout=False,  # it reaches over the empty cells to its right
            )
    figure.suptitle(title, fontsize=11)
    save(figure, path)
