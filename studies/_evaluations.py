"""Which rows the evaluations of a study shall make, and which of them are there."""

from dataclasses import dataclass
from pathlib import Path

from eval import rows
from eval.report import render_names
from eval.sources.presence import those_present
from eval.sources.registry import EvalDataset, Registry
from loaders.errors import ConfigError
from studies._study import Evaluation, Measure, Study, nearest


@dataclass(frozen=True)
class Planned:
    """An evaluation with the sets that it reads: those that are named and on disk."""

    task: str
    options: tuple[str, ...]
    sets: tuple[EvalDataset, ...]

    def row_tasks(self) -> list[str]:
        """Names that its rows have: linear_probe_clip for a protocol, …_5shot for few shots."""
        protocol = _value(self.options, "--protocol")
        named = self.task == "linear_probe" and protocol not in (None, "standardised")
        name = f"{self.task}_{protocol}" if named else self.task
        shots = _values(self.options, "--shots")
        return [f"{name}_{count}shot" for count in shots] or [name]

    def lacking(self, found: list[dict]) -> list[str]:
        """Sets for which `found`, the rows of one checkpoint, does not hold what is asked for."""
        wanted = None if self.task == "linear_probe" else _value(self.options, "--protocol")
        have = {
            (row["dataset"], row["task"])
            for row in found
            if wanted is None or render_names.protocol_name(row) in (None, wanted)
        }
        asked = self.row_tasks()
        return [row.name for row in self.sets if any((row.name, t) not in have for t in asked)]


def plan(study: Study) -> list[Planned]:
    """The evaluations with their sets; says which optional sets are not there.

    Raises:
        ConfigError: an unknown set, one without the task, or two evaluations that would write
            the same rows. DataError: a set that is named is not on disk.
    """
    planned, written = [], {}
    for entry in study.evaluations:
        one = _plan_one(entry)
        planned.append(one)
        for task in one.row_tasks():
            for row in one.sets:
                if (task, row.name) in written:
                    raise ConfigError(
                        f"evaluations: {task} on {row.name} stands twice; one would overwrite "
                        "the other"
                    )
                written[task, row.name] = one
    return planned


def measures(study: Study, planned: list[Planned]) -> dict[str, Measure]:
    """The study's measures; where it states none, the first metric of every set and task.

    Raises:
        ConfigError: a measure or comparison that no evaluation gives.
    """
    given = {
        (task, row.name): row.tasks[one.task]
        for one in planned
        for task in one.row_tasks()
        for row in one.sets
    }
    if not study.measures:
        made = {
            f"{name}.{task}": Measure(task, [name], metrics[0])
            for (task, name), metrics in given.items()
        }
    else:
        made = study.measures
        for name, measure in made.items():
            for dataset in measure.datasets:
                _check(name, measure, dataset, given, planned)
    for entry in study.comparisons:
        for name in entry.measures:
            if name not in made:
                raise ConfigError(f"comparisons: {nearest(name, made, 'measure')}")
    return made


def read_rows(results: Path, run: str, checkpoint_hash: str) -> list[dict]:
    """All rows of a checkpoint of the run in RESULTS/<run>_*.jsonl."""
    return [
        row
        for path in sorted(results.glob(f"{run}_*.jsonl"))
        for row in rows.read_rows(path)
        if row["run"] == run and row["checkpoint_hash"] == checkpoint_hash
    ]


def _plan_one(entry: Evaluation) -> Planned:
    known = Registry(data_root=_value(entry.options, "--data-root"))
    protocol = None if entry.task == "linear_probe" else _value(entry.options, "--protocol")
    found = known.select(entry.datasets, entry.task, protocol)
    there = those_present(found, entry.task, entry.datasets)
    if not there:
        raise ConfigError(
            f"evaluations: none of {', '.join(entry.datasets)} is there for {entry.task}"
        )
    return Planned(entry.task, tuple(entry.options), tuple(there))


def _check(name, measure, dataset, given, planned) -> None:
    metrics = given.get((measure.task, dataset))
    if metrics is None:
        pairs = [f"{task} on {data}" for task, data in given]
        wrong = nearest(f"{measure.task} on {dataset}", pairs, "evaluation")
        raise ConfigError(f"measures.{name}: {wrong}")
    # Probes of other protocols have metrics of their own.
    if measure.task in {one.task for one in planned} and measure.metric not in metrics:
        raise ConfigError(f"measures.{name}: {nearest(measure.metric, metrics, 'metric')}")


def _values(options: tuple[str, ...] | list[str], flag: str) -> list[str]:
    """The words behind a flag, up to the next one."""
    found = []
    for place, word in enumerate(options):
        if word == flag:
            for value in options[place + 1 :]:
                if value.startswith("--"):
                    break
                found.append(value)
        elif word.startswith(f"{flag}="):
            found.append(word.partition("=")[2])
    return found


def _value(options: tuple[str, ...] | list[str], flag: str) -> str | None:
    return next(iter(_values(options, flag)), None)
