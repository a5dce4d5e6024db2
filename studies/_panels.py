"""The pictures that a study states itself: arms in the order of the paper, its numbers beside."""

from dataclasses import dataclass
from pathlib import Path

from eval.report import figures, palette, paper_tables
from studies import _statistics, _study
from studies._tables import NONE, Report, measure_cell

ROW, HEAD = 0.19, 0.5  # inches of a bar with a name of one line, and of a panel's title and axis
NAME = 1.75  # inches for the names of bars


@dataclass
class Bar:
    """A line of a panel; `text` stands where there is no value."""

    name: str
    mean: float | None
    half: float | None = None
    values: tuple[float, ...] = ()
    text: str = ""


def draw(report: Report, name: str, path: Path) -> None:
    """Write `path`: the figure `name` of the study; readable at a width of 500 pixels."""
    figure = report.study.figures[name]
    over = _study.lines(report.study, figure)
    if all(arms == [arm] for arm, arms in over.items()):
        panels = [
            (_statistics.label(measure, report.measures[measure]), _ours(report, figure, measure))
            for measure in figure.measures
        ]
        _draw_bars(figure.title, panels, _published(figure.published), path)
    else:
        _draw_lines(report, figure, over, path)


def _ours(report: Report, figure: _study.Figure, measure: str) -> list[Bar]:
    bars = []
    for arm in figure.arms:
        mean = report.mean(arm, measure)
        if mean is not None:
            bars.append(Bar(report.label(arm), mean.mean, mean.half, mean.values))
            continue
        says = measure_cell(report, arm, measure)
        text = "sees no texts" if says == NONE else "not there yet"
        bars.append(Bar(report.label(arm), None, text=text))
    return bars


def _published(beside: _study.Published | None) -> list[tuple[str, list[Bar]]]:
    if beside is None:
        return []
    table = paper_tables.load(beside.paper, beside.table)
    rows = [next(row for row in table.rows if row.id == name) for name in beside.rows]
    shared = set.intersection(*(set(row.facts.items()) for row in rows))
    panels = []
    for place, column in enumerate(table.columns):
        if column.id not in beside.columns:
            continue
        bars = []
        for row in rows:
            name = ", ".join(
                value for fact, value in row.facts.items() if (fact, value) not in shared
            )
            cell = row.cells[place]
            value = cell.published[0].value if cell.published else None
            text = "no number known" if cell.applies else "not applicable"
            bars.append(Bar(name, value, text=text))
        panels.append((f"published, table {table.id}: {column.title}", bars))
    return panels


def _draw_bars(title: str, ours: list, published: list, path: Path) -> None:
    panels = [*ours, *published]
    rows = [_rows(bars) for _, bars in panels]
    heights = [row * len(bars) + HEAD for row, (_, bars) in zip(rows, panels, strict=True)]
    sheet = figures.Sheet(palette.WIDTH, sum(heights) + 0.5)
    sheet.text(0, 0, figures.fitted(title, palette.WIDTH, 2), fontsize=palette.HEAD, weight="bold")
    sheet.top += 0.3
    for number, ((head, bars), height) in enumerate(zip(panels, heights, strict=True)):
        sheet.text(0, 0, figures.fitted(head, palette.WIDTH))
        axis = sheet.axes(NAME, 0.17, palette.WIDTH - NAME - 0.75, height - HEAD)
        _panel(axis, bars, palette.BLUE if number < len(ours) else palette.GREYS[0])
        sheet.top += height
    said = "percent; dots: seeds, bar: 95 % interval of their mean"
    said += "; grey: as published, on the paper's own data" if published else ""
    sheet.text(0, 0, figures.fitted(said, palette.WIDTH, 2))
    figures.save(sheet.figure, path)


def _rows(bars: list[Bar]) -> float:
    """Inches of a bar: more where a name needs two lines."""
    return ROW if all(figures.length(bar.name) <= NAME - 0.15 for bar in bars) else 1.7 * ROW


def _panel(axis, bars: list[Bar], color: str) -> None:
    known = [bar for bar in bars if bar.mean is not None]
    top = max([max(bar.mean + (bar.half or 0), *bar.values, 0) for bar in known], default=1)
    for place, bar in enumerate(bars):
        said = bar.text
        if bar.mean is not None:
            axis.barh(place, bar.mean, 0.62, color=color, alpha=0.55 if bar.values else 1)
            said = f"{bar.mean:.1f}" + (f" ± {bar.half:.1f}" if bar.half is not None else "")
            if bar.half is not None:
                axis.errorbar(
                    bar.mean, place, xerr=bar.half, fmt="none", ecolor=palette.DARK,
                    elinewidth=1, capsize=2.5,
                )  # fmt: skip
            axis.plot(bar.values, [place] * len(bar.values), ".", color=palette.DARK, markersize=3)
        inside = bar.mean is None
        axis.annotate(
            said, (0 if inside else 1, place), (3, 0), ("axes fraction", "data"), "offset points",
            va="center", color=palette.GREY if inside else palette.DARK,
        )  # fmt: skip
    names = [figures.fitted(bar.name, NAME - 0.15, 2) for bar in bars]
    axis.set_yticks(range(len(bars)), names)
    axis.set_ylim(len(bars) - 0.5, -0.5)
    axis.set_xlim(0, top * 1.03)
    axis.tick_params(length=0, axis="y")
    axis.grid(axis="x")


def _draw_lines(
    report: Report, figure: _study.Figure, over: dict[str, list[str]], path: Path
) -> None:
    count = len(figure.measures)
    drawn, axes = figures.new_figure(count, 1, (palette.WIDTH, 2.1 * count + 0.7))
    labels = [variant.label or name for name, variant in report.study.variants.items()]
    handles = {}
    for axis, measure in zip(axes[:, 0], figure.measures, strict=True):
        for place, (name, arms) in enumerate(over.items()):
            means = [(x, report.mean(arm, measure)) for x, arm in enumerate(arms)]
            means = [(x, mean) for x, mean in means if mean is not None]
            if not means:
                continue
            x = [at + 0.06 * (place - (len(over) - 1) / 2) for at, _ in means]
            color, mark = palette.look(place)
            label = report.label(arms[0]).removesuffix(f", {labels[0]}") or name
            handles[label] = axis.errorbar(
                x, [mean.mean for _, mean in means], [mean.half or 0 for _, mean in means],
                color=color, marker=mark or "o", markersize=4, capsize=3, linewidth=1.2,
            )  # fmt: skip
        axis.set_xticks(range(len(labels)), labels)
        head = _statistics.label(measure, report.measures[measure])
        axis.set_title(figures.wrapped(head, 58, 2), loc="left")
        axis.set_ylabel("percent")
        axis.grid(True)
    axes[-1, 0].set_xlabel(figures.wrapped(figure.title, 70, 2))
    figures.legend_below(drawn, list(handles.values()), list(handles))
    figures.save(drawn, path)
