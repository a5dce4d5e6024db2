"""The picture of report.py: a row per set with caption lengths, images per concept, and reasons."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import (
    EngFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    StrMethodFormatter,
)

_REASONS = 8
_BINS = 30
_COLORS = ("#4477aa", "#228833", "#cc6677")


def draw(sets: list[dict], path: Path) -> None:
    """Write the picture; `sets`: facts as `report_collect.collect` gives them, with `table_1`."""
    figure, axes = plt.subplots(
        len(sets), 3, figsize=(14, 3.7 * len(sets)), squeeze=False, layout="constrained"
    )
    for row, facts in zip(axes, sets, strict=True):
        _caption_lengths(row[0], facts)
        _concepts(row[1], facts)
        _reasons(row[2], facts)
        row[0].set_ylabel("captions" if facts["captions"] else "")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _title(axis: Axes, facts: dict, text: str) -> None:
    name = facts["name"] if len(facts["name"]) <= 32 else facts["name"][:31] + "…"
    axis.set_title(f"{name}: {text}".replace("$", r"\$"), fontsize=10)


def _nothing(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, color="#555")
    axis.set_axis_off()


def _caption_lengths(axis: Axes, facts: dict) -> None:
    _title(axis, facts, "caption length")
    counts = np.array(facts["caption_lengths"], dtype=np.int64)
    if not counts.sum():
        _nothing(axis, "no captions")
        return
    # A few very long captions must not squeeze the others: the last bar holds all that follow.
    last = min(len(counts) - 1, int(np.searchsorted(np.cumsum(counts), 0.995 * counts.sum())) + 1)
    shown = np.append(counts[:last], counts[last:].sum())
    axis.bar(np.arange(last + 1), shown, width=0.9, color=_COLORS[0])
    axis.set_xlabel(f"words (last bar: {last} and more)" if last < len(counts) - 1 else "words")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    _tidy(axis)


def _concepts(axis: Axes, facts: dict) -> None:
    labelled = facts["kind"] == "image_label"
    what = "class" if labelled else "concept"
    _title(axis, facts, f"images per {what}")
    counts = np.array(facts["table_1"]["counts"], dtype=np.int64)
    if not len(counts):
        need = "" if facts["model"] or not facts["captions"] else "\n(needs --captions-model)"
        _nothing(axis, f"no {what} counted{need}")
        return
    low, high = int(counts.min()), int(counts.max())
    if high > 20 * low:
        edges = np.unique(np.rint(np.geomspace(low, high + 1, _BINS)).astype(np.int64))
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        step = -(-(high - low + 1) // _BINS)
        edges = np.arange(low, high + step + 1, step) - 0.5
        axis.set_xlim(low - 2 * step, high + 2 * step)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.hist(counts, bins=edges, color=_COLORS[1], rwidth=0.9)
    axis.set_xlabel("images" if labelled else "occurrences in captions")
    axis.set_ylabel("classes" if labelled else "concepts")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _tidy(axis)


def _reasons(axis: Axes, facts: dict) -> None:
    attempted, reasons = facts["attempted"], list(facts["reasons"].items())
    lost = sum(n for _, n in reasons)
    _title(axis, facts, "not kept")
    if not lost:
        _nothing(axis, "every row was kept")
        return
    if len(reasons) > _REASONS:
        rest = sum(n for _, n in reasons[_REASONS - 1 :])
        reasons = [*reasons[: _REASONS - 1], ("all others", rest)]
    names = [name if len(name) <= 30 else name[:29] + "…" for name, _ in reasons]
    shares = [100 * n / attempted for _, n in reasons]
    place = -np.arange(len(reasons))
    axis.barh(place, shares, color=_COLORS[2], height=0.7)
    axis.set_yticks(place, [name.replace("$", r"\$") for name in names], fontsize=8)
    for y, share, (_, n) in zip(place, shares, reasons, strict=True):
        axis.annotate(
            f"{n:,}", (share, y), (3, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.set_ylim(-_REASONS + 0.4, 0.6)  # bars of one width in every row
    axis.set_xlim(0, 1.2 * max(shares))
    axis.set_xlabel(f"percent of {attempted:,} attempted; {100 * lost / attempted:.2f} % in all")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axis.spines[["top", "right"]].set_visible(False)


def _tidy(axis: Axes) -> None:
    axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
