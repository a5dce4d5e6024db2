"""Training curves: one panel below the other over the samples seen, from lines of metrics.jsonl."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from eval.report import palette
from eval.report.figures import legend_below, new_figure, printable

WHOLE, HALVES = "loss", ("loss_image_label", "loss_image_text")
# Key of metrics.jsonl -> name of the axis.
PANELS = {
    WHOLE: "loss",
    "loss_image_label": "loss of labels",
    "loss_image_text": "loss of captions",
    "lr": "learning rate",
    "scale": "scale\n(1 / temperature)",
    "samples_per_second": "samples\nper second",
}
FLOOR = "floor: entropy of the targets"


def floor_key(key: str, log: list[dict]) -> str:
    """Where the floor of a loss stands. With one kind of data it is that of the whole batch, which
    was logged before those of the halves were."""
    own = key.replace("loss", "floor", 1)
    alone = key == WHOLE or sum(any(half in r for r in log) for half in HALVES) == 1
    return "floor" if alone and not any(own in r for r in log) else own


def panels(logs: dict[str, list[dict]]) -> list[str]:
    """Keys that there is something to draw of. The loss of the whole batch is left out where it is
    that of the labels, or of the captions, in every run."""
    kinds = [sum(any(half in r for r in log) for half in HALVES) for log in logs.values()]
    there = [
        key for key in PANELS if any(_series(log, "step", key)[0].size for log in logs.values())
    ]
    return [key for key in there if key != WHOLE or any(kind != 1 for kind in kinds)]


def curves(logs: dict[str, list[dict]]) -> Figure:
    """Loss of labels and of captions, each with its floor, learning rate, scale and throughput of
    runs (name -> lines of metrics.jsonl); a panel that no run has anything for is left out."""
    shown = panels(logs)
    x = "samples" if all("samples" in r for log in logs.values() for r in log) else "step"
    rows = max(1, len(shown))
    figure, axes = new_figure(rows, 1, (palette.WIDTH, 1.25 * rows + 0.8), sharex=True)
    floors = [_panel(axis, key, logs, x) for axis, key in zip(axes[:, 0], shown, strict=False)]
    figure.align_ylabels(axes[:, 0])
    last = axes[-1, 0]
    last.set_xlabel("samples seen" if x == "samples" else "optimizer steps")
    last.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    last.xaxis.set_major_formatter(EngFormatter(sep=""))
    handles, labels = [], []
    for i, name in enumerate(logs):
        color, mark = palette.look(i)
        handles.append(Line2D([], [], color=color, marker=mark, markersize=4))
        labels.append(printable(name))
    if any(floors):
        handles.append(Line2D([], [], color=palette.GREY, linestyle="--"))
        labels.append(FLOOR)
    legend_below(figure, handles, labels)
    return figure


def _panel(axis: Axes, key: str, logs: dict[str, list[dict]], x: str) -> bool:
    """One quantity of all runs, as logged and smoothed; whether a floor is drawn beside it."""
    floors = False
    for i, log in enumerate(logs.values()):
        color, mark = palette.look(i)
        place, values = _series(log, x, key)
        axis.plot(place, values, color=color, alpha=0.3, linewidth=0.7)
        every = max(1, len(place) // 8)
        axis.plot(
            place, _smooth(values), color=color, linewidth=1.4, marker=mark, markersize=4,
            markevery=every,
        )  # fmt: skip
        if key in (WHOLE, *HALVES) and place.size:
            place, floor = _series(log, x, floor_key(key, log))
            axis.plot(place, _smooth(floor), color=color, linestyle="--", linewidth=1.1)
            floors |= bool(place.size)
    axis.set_ylabel(PANELS[key])
    axis.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
    axis.grid(True)
    if key == "samples_per_second":
        axis.set_ylim(bottom=0)
    return floors


def _series(records: list[dict], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(r[x], r[y]) for r in records if r.get(y) is not None and r.get(x) is not None]
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a fiftieth of the points; it narrows towards both ends, so that
    a rising curve is not bent there."""
    half = len(values) // 100
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(half, np.minimum(place, len(values) - 1 - place))
    return (total[place + reach + 1] - total[place - reach]) / (2 * reach + 1)
