"""Values of measures, means over seeds with their intervals, and paired differences of arms."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from eval.report import render_names
from loaders.errors import DataError
from studies._cells import Cell
from studies._study import Measure, Study

SHOWN, NOT_SHOWN, NO_INTERVAL = "shown", "not shown", "no interval"
REFUTED = "refuted"  # of a claim that states a margin


@dataclass(frozen=True)
class Value:
    """A measure of one cell: percent, and half of its 95 % interval over the test samples."""

    value: float
    samples_half: float | None


@dataclass(frozen=True)
class Mean:
    """A mean over n values with half of its 95 % interval (None for a single one)."""

    mean: float
    half: float | None
    n: int
    values: tuple[float, ...]

    def holds(self, number: float) -> bool:
        """Whether the interval holds `number`; there must be one."""
        return abs(self.mean - number) <= self.half


@dataclass(frozen=True)
class Difference:
    """The first arm minus the second in one measure; None where no seed has both."""

    arms: tuple[str, str]
    measure: str
    claim: str
    mean: Mean | None
    margin: float = 0.0

    @property
    def verdict(self) -> str:
        """SHOWN, NOT_SHOWN where the interval holds 0, NO_INTERVAL with fewer than two seeds.

        With a margin m > 0 the claim is "at least", as in trials of non-inferiority: SHOWN where
        the interval is above -m, REFUTED where it is below, NOT_SHOWN where it holds -m.
        """
        if self.mean is None or self.mean.half is None:
            return NO_INTERVAL
        if self.mean.holds(-self.margin):
            return NOT_SHOWN
        return REFUTED if self.margin and self.mean.mean < -self.margin else SHOWN


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and half-width t(0.975, n - 1) s / sqrt(n) with s² = sum (x - mean)² / (n - 1).

    Student's interval for the mean of n normal values (Student 1908).
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Mean(mean, None, n, tuple(values))
    # Here and not above: --help should not wait for it.
    from scipy.stats import t

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Mean(mean, half, n, tuple(values))


def values_of(cells: list[Cell], measures: dict[str, Measure]) -> dict[tuple, dict[int, Value]]:
    """(arm, measure) -> seed -> value, of all cells whose rows are there.

    Raises:
        DataError: rows of one data set and task differ in samples, classes, protocol or prompts.
    """
    found: dict[tuple, dict[int, Value]] = defaultdict(dict)
    told: dict[tuple, tuple[tuple, str]] = {}
    for cell in cells:
        rows = {(row["dataset"], row["task"], row["metric"]): row for row in cell.rows()}
        for name, measure in measures.items():
            keys = [(dataset, measure.task, measure.metric) for dataset in measure.datasets]
            if not all(key in rows for key in keys):
                continue
            parts = [rows[key] for key in keys]
            for key, row in zip(keys, parts, strict=True):
                _refuse_other(told, key, row, cell.name)
            found[cell.arm, name][cell.seed] = _average(parts)
    return found


def differences(
    study: Study, measures: dict[str, Measure], values: dict[tuple, dict[int, Value]]
) -> list[Difference]:
    """Every comparison of the study in every measure that it names, paired over common seeds."""
    found = []
    for entry in study.comparisons:
        first, second = entry.arms
        for name in entry.measures or measures:
            if any(measures[name].task in row_tasks(study, arm) for arm in entry.arms):
                continue
            one, other = values.get((first, name), {}), values.get((second, name), {})
            seeds = [seed for seed in study.seeds if seed in one and seed in other]
            gaps = [one[seed].value - other[seed].value for seed in seeds]
            mean = mean_of(gaps) if gaps else None
            found.append(Difference((first, second), name, entry.claim, mean, entry.margin))
    return found


def row_tasks(study: Study, arm: str) -> set[str]:
    """Tasks, as rows name them, that the arm is not measured by."""
    from studies._evaluations import Planned

    without = study.arms[arm].without
    made = [Planned(e.task, tuple(e.options), ()) for e in study.evaluations if e.task in without]
    return {task for one in made for task in one.row_tasks()}


def label(name: str, measure: Measure) -> str:
    """What tables call a measure."""
    if measure.label:
        return measure.label
    words = (render_names.task_name(measure.task), render_names.metric_name(measure.metric))
    return f"{', '.join(measure.datasets)}: {' '.join(words)}"


def _average(parts: list[dict]) -> Value:
    """Mean over data sets; their test samples are independent, so variances add up."""
    halves = [(r["ci95"][1] - r["ci95"][0]) / 2 if r["ci95"] else None for r in parts]
    half = None if None in halves else math.sqrt(sum(h * h for h in halves)) / len(parts)
    return Value(math.fsum(row["value"] for row in parts) / len(parts), half)


def _refuse_other(told: dict, key: tuple, row: dict, cell: str) -> None:
    kind = tuple(row[name] for name in ("n", "classes", "prompt_digest"))
    first, who = told.setdefault(key, (kind, cell))
    if first != kind:
        raise DataError(
            f"{key[0]}, {key[1]}: {who} and {cell} were measured on different samples, classes or "
            f"prompts ({first[:2]} and {kind[:2]}); remove the rows of one of them and run the "
            "study again"
        )
