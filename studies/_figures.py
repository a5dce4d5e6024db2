"""The pictures of a study; each is readable at a width of 500 pixels."""

from pathlib import Path

import numpy as np

from eval.report import figures
from eval.report.palette import BLUE, DARK, GREY, WIDTH
from studies import _statistics
from studies._tables import Report


def draw_measures(report: Report, path: Path) -> None:
    """A panel for each measure, a line for each arm: seeds as dots, mean with its interval."""
    arms, names = list(report.study.arms), list(report.measures)
    height = 0.24 * len(arms) + 0.75
    figure, axes = figures.new_figure(len(names), 1, (WIDTH, len(names) * height + 0.3))
    for axis, name in zip(axes[:, 0], names, strict=True):
        for place, arm in enumerate(arms):
            mean = report.mean(arm, name)
            if mean is None:
                continue
            axis.plot(mean.values, [place] * mean.n, ".", color=GREY, markersize=5, zorder=3)
            half = mean.half or 0
            axis.errorbar(mean.mean, place, xerr=half, fmt="|", color=BLUE, capsize=3, markersize=9)
        axis.set_yticks(range(len(arms)), [figures.short(report.label(arm), 22) for arm in arms])
        axis.set_ylim(len(arms) - 0.5, -0.5)
        title = _statistics.label(name, report.measures[name])
        axis.set_title(figures.wrapped(title, 58, 2), loc="left")
        axis.grid(axis="x")
    axes[-1, 0].set_xlabel("percent; dots: seeds, bar: 95 % interval of their mean")
    figures.save(figure, path)


def draw_differences(report: Report, path: Path) -> None:
    """A line for each comparison and measure: the difference with its interval, beside zero."""
    shown = [one for one in report.differences if one.mean is not None]
    figure, axes = figures.new_figure(1, 1, (WIDTH, 0.5 * len(shown) + 0.8))
    axis = axes[0, 0]
    labels = []
    for place, one in enumerate(shown):
        mean = one.mean
        axis.plot(mean.values, [place] * mean.n, ".", color=GREY, markersize=5, zorder=3)
        color = BLUE if one.verdict == _statistics.SHOWN else DARK
        axis.errorbar(
            mean.mean, place, xerr=mean.half or 0, fmt="|", color=color, capsize=3, markersize=9
        )
        if one.margin:
            axis.plot([-one.margin] * 2, [place - 0.2, place + 0.2], color=DARK, linewidth=0.8)
        pair = " − ".join(figures.short(report.label(arm), 14) for arm in one.arms)
        measure = _statistics.label(one.measure, report.measures[one.measure])
        labels.append(f"{figures.printable(pair)}\n{figures.wrapped(measure, 30, 2)}")
    axis.axvline(0, color=DARK, linewidth=0.8, linestyle="--")
    axis.set_yticks(np.arange(len(shown)), labels)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.grid(axis="x")
    bound = "; short line: the margin of “at least”" if any(one.margin for one in shown) else ""
    axis.set_xlabel(f"difference in points; blue: shown{bound}")
    figures.save(figure, path)


def draw_costs(report: Report, path: Path) -> None:
    """A panel for each measure: CPU minutes of a training against the mean, arms as numbers."""
    minutes = {
        arm: cost.samples / cost.samples_per_cpu_second / 60
        for arm, cost in report.costs.items()
        if cost.samples_per_cpu_second
    }
    names, keys = list(report.measures), -(-len(minutes) // 2)
    inches = (WIDTH, 2.3 * len(names) + 0.16 * keys + 0.4)
    figure, axes = figures.new_figure(len(names), 1, inches)
    for axis, name in zip(axes[:, 0], names, strict=True):
        shown = {n: (c, report.mean(arm, name)) for n, (arm, c) in enumerate(minutes.items(), 1)}
        shown = {n: (cost, mean) for n, (cost, mean) in shown.items() if mean is not None}
        for cost, mean in shown.values():
            half = mean.half or 0
            axis.errorbar(cost, mean.mean, yerr=half, color=GREY, elinewidth=0.8, capsize=2)
            axis.plot(cost, mean.mean, ".", color=BLUE, markersize=4)
        axis.margins(0.08, 0.12)
        _number(axis, {n: (cost, mean.mean) for n, (cost, mean) in shown.items()})
        title = _statistics.label(name, report.measures[name])
        axis.set_title(figures.wrapped(title, 58, 2), loc="left")
        axis.grid(True)
    axes[-1, 0].set_xlabel("CPU minutes of a training; bar: 95 % interval over seeds")
    lines = [f"{n} {figures.short(report.label(arm), 24)}" for n, arm in enumerate(minutes, 1)]
    for place, part in enumerate((lines[:keys], lines[keys:])):
        figure.text(0.06 + 0.5 * place, -0.01, "\n".join(part), va="top")
    figures.save(figure, path)


def _number(axis, points: dict[int, tuple[float, float]]) -> None:
    """A number beside each point, where no other number and no other point is; a line where that
    is not next to it."""
    if not points:
        return
    axis.autoscale_view()  # else the limits are those of an empty panel
    data = axis.transData + axis.transAxes.inverted()
    at = {number: data.transform(point) for number, point in points.items()}
    size, taken = np.array([0.045, 0.09]), []  # of a number, in parts of the panel
    offsets = [(x, y) for x in np.arange(-8, 9) for y in np.arange(-8, 9) if (x, y) != (0, 0)]
    offsets.sort(key=lambda offset: (np.hypot(*offset), offset))
    for number, point in sorted(at.items(), key=lambda item: tuple(item[1])):
        others = [other for n, other in at.items() if n != number]
        for offset in offsets:
            place = point + np.array(offset) * size * 0.75
            inside = np.all((place > size / 2) & (place < 1 - size / 2))
            far = all(np.any(np.abs(place - other) > size) for other in taken)
            clear = all(np.any(np.abs(place - other) > size * 0.6) for other in others)
            if inside and far and clear:
                break
        else:
            place = point
        taken.append(place)
        axis.annotate(
            str(number), point, place, "axes fraction", "axes fraction", color=BLUE,
            ha="center", va="center", arrowprops={"arrowstyle": "-", "color": BLUE, "lw": 0.4},
        )  # fmt: skip
