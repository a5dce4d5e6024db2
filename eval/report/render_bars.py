"""A published table beside our numbers, as a picture: grouped bars, one panel per measure."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from eval.report import render_paper
from eval.report.palette import BLUE, GREYS
from eval.report.paper_tables import Cell, Column, PaperTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PER_LINE = 4
OURS, PUBLISHED = "ours", "published"


def png(table: PaperTable, path: Path) -> None:
    """Write the picture: rows of the table as groups of bars, our bar above the published ones.

    Several published values of one cell are several bars with the letters of their sources.
    """
    # Here and not above: text formats should not wait for matplotlib.
    from eval.report.figures import new_figure, printable, save, wrapped

    lines = math.ceil(len(table.columns) / PER_LINE)
    columns = math.ceil(len(table.columns) / lines)
    names = [wrapped(row.name, 34, 2) for row in table.rows]
    height = lines * (0.52 * len(names) + 0.9) + 1.2
    figure, axes = new_figure(lines, columns, (3.0 * columns + 2.6, height))
    for i, axis in enumerate(axes.flat):
        if i >= len(table.columns):
            axis.axis("off")
            continue
        _panel(axis, table, table.columns[i], [row.cells[i] for row in table.rows])
        axis.set_yticks(range(len(names)), names if i % columns == 0 else [])
    handles: dict[str, object] = {}
    for axis in axes.flat:
        found, labels = axis.get_legend_handles_labels()
        handles = dict(zip(labels, found, strict=True)) | handles
    order = sorted(handles, key=lambda label: label != OURS)
    figure.legend([handles[label] for label in order], order, loc="outside lower center", ncols=4)
    notes = render_paper.signs(table)
    title = [wrapped(table.title, 30 * columns + 20, 2)]
    title += [wrapped(printable(line), 36 * columns + 24, 3) for line in notes]
    figure.suptitle("\n".join(title))
    save(figure, path)


def _panel(axis: "Axes", table: PaperTable, column: Column, cells: list[Cell]) -> None:
    """One measure: bars from 0, each with its number; a dash where there is none."""
    places = render_paper.decimals(table, column)
    slots = int(table.joined) + max([1, *(len(cell.published) for cell in cells)])
    height = 0.8 / slots
    for row, cell in enumerate(cells):
        mine = [(OURS, BLUE, cell.ours, render_paper.ours(cell, places))] if table.joined else []
        bars = mine + [
            (PUBLISHED, GREYS[min(k, 2)], p.value, render_paper.published_one(table, p, places))
            for k, p in enumerate(cell.published)
        ]
        bars = bars or [(PUBLISHED, "none", None, render_paper.published(table, cell, places))]
        top = row - height * (len(bars) - 1) / 2
        for k, (kind, color, value, text) in enumerate(bars):
            if value is None and kind == OURS and cell.applies:
                text += " ours: no result yet"
            if value is not None:
                axis.barh(top + k * height, value, height * 0.9, color=color, label=kind)
            axis.annotate(
                text, (value or 0, top + k * height), (3, 0), textcoords="offset points",
                va="center", fontweight="bold" if kind == OURS else "normal",
            )  # fmt: skip
    axis.set_ylim(len(cells) - 0.5, -0.5)
    axis.set_xlim(0, 1.25 * axis.get_xlim()[1])
    axis.set_title(column.title, loc="left")
    axis.set_xticks([])  # every bar has its number
    axis.spines["bottom"].set_visible(False)
