"""A study as its YAML file states it: arms, seeds, evaluations, measures and comparisons.

An arm is a configuration with overrides; with `variants`, each arm stands once for each variant
under the name ARM-VARIANT. A cell is an arm with a seed. A measure is a metric of an evaluation, or
its mean over several data sets. A comparison is the difference of two arms in some measures,
paired over the seeds.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from engine import config_file
from eval.report import paper_tables
from loaders.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("zero_shot", "linear_probe", "knn", "retrieval", "finetune")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")


@dataclass
class Arm:
    """One method or setting: a configuration and what is changed in it."""

    config: str = MISSING
    overrides: list[str] = field(default_factory=list)  # key.sub=value, as train.py takes them
    label: str | None = None  # what tables call it; null: its name
    without: list[str] = field(default_factory=list)  # tasks that say nothing about this arm


@dataclass
class Variant:
    """A change that every arm gets in turn, such as a batch size."""

    overrides: list[str] = field(default_factory=list)
    label: str | None = None


@dataclass
class Evaluation:
    """A command of eval/ for every cell."""

    task: str = MISSING  # one of TASKS
    datasets: list[str] = MISSING  # sets and collections of eval/datasets.yaml
    options: list[str] = field(default_factory=list)  # further words of the command line


@dataclass
class Measure:
    """A number of a cell: one metric, averaged over the data sets."""

    task: str = MISSING  # as result rows name it: linear_probe_clip, linear_probe_5shot
    datasets: list[str] = MISSING
    metric: str = MISSING
    label: str | None = None


@dataclass
class Comparison:
    """The first arm minus the second, paired over seeds."""

    arms: list[str] = MISSING
    measures: list[str] = field(default_factory=list)  # empty: all
    claim: str = ""  # what it decides, in words
    margin: float = 0.0  # points; above 0 the claim is "at least": not further behind than that


@dataclass
class Published:
    """Numbers of a paper beside ours: rows and columns of a table of eval/paper/, by their ids."""

    paper: str = MISSING
    table: str = MISSING
    rows: list[str] = MISSING
    columns: list[str] = MISSING


@dataclass
class Figure:
    """A picture of some arms: bars in each measure, or lines over the variants."""

    title: str = MISSING
    arms: list[str] = MISSING  # without a variant: lines over all of them
    measures: list[str] = MISSING
    published: Published | None = None


@dataclass
class Study:
    """A whole study."""

    name: str = MISSING
    output: str = "runs/${name}"
    launcher: str = "python"  # words before train.py: torchrun --standalone --nproc_per_node 2
    evaluation_launcher: str = "python"  # words before a command of eval/
    seeds: list[int] = MISSING
    overrides: list[str] = field(default_factory=list)  # of every run
    arms: dict[str, Arm] = MISSING
    variants: dict[str, Variant] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    measures: dict[str, Measure] = field(default_factory=dict)  # empty: the first of each set
    comparisons: list[Comparison] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)  # by the name of the file


def read(path: Path) -> Study:
    """The study in a file, variants spread over the arms and comparisons over the variants.

    Raises:
        ConfigError: unreadable, an unknown key (with the nearest), a missing or wrong value, equal
            seeds, a name that no path may have, or a comparison of arms or measures that are not
            there.
    """
    values, _ = config_file.read(path)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Study), values)
        study: Study = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise ConfigError(f"{path}: {_unknown_key(error)}") from None
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the whole file"
        raise ConfigError(f"{path}: {key}: {str(error).splitlines()[0]}") from None
    try:
        _check(study)
        _spread(study)
        _check_comparisons(study)
        for name, figure in study.figures.items():
            _check_figure(name, figure, study)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return study


def nearest(name: str, known: Iterable[str], what: str) -> ConfigError:
    """The error that an unknown `name` raises: it says what was meant."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    return ConfigError(f"no {what} {name!r}{hint} (known: {', '.join(known) or 'none'})")


def find_config(text: str, beside: Path) -> Path:
    """A configuration file: from the current folder, the study's folder, or the repository.

    Raises:
        ConfigError: it is in none of them.
    """
    tried = [place / Path(text).expanduser() for place in (Path(), beside.parent, ROOT)]
    for path in tried:
        if path.is_file():
            return path
    places = ", ".join(dict.fromkeys(str(path.absolute()) for path in tried))
    raise ConfigError(f"config={text} is nowhere; tried: {places}")


def _unknown_key(error: ConfigKeyError) -> str:
    kind: Any = error.object_type
    names = list(getattr(kind, "__dataclass_fields__", {}))
    near = difflib.get_close_matches(str(error.key), names, n=1, cutoff=0.0)
    hint = f"; the nearest is {near[0]!r} (known: {', '.join(names)})" if near else ""
    return f"unknown key {error.full_key!r}{hint}"


def _check(study: Study) -> None:
    if not study.seeds or not study.arms:
        raise ConfigError("seeds and arms need at least one entry each")
    twice = sorted({seed for seed in study.seeds if study.seeds.count(seed) > 1})
    if twice or min(study.seeds) < 0:
        raise ConfigError(f"seeds={study.seeds}: give each once, from 0 on")
    for kind, names in (("arm", study.arms), ("variant", study.variants)):
        for name in names:
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"{kind} {name!r}: a name has letters, digits, _ and . only; it is in paths"
                )
    tasks = {entry.task for entry in study.evaluations}
    for entry in study.evaluations:
        if entry.task not in TASKS:
            raise nearest(entry.task, TASKS, "evaluation task")
        if not entry.datasets:
            raise ConfigError(f"evaluations: {entry.task} names no datasets")
    for name, arm in study.arms.items():
        for task in arm.without:
            if task not in tasks:
                raise ConfigError(f"arms.{name}.without: {nearest(task, tasks, 'evaluation')}")
    for name, measure in study.measures.items():
        if not measure.datasets:
            raise ConfigError(f"measures.{name} names no datasets")


def _spread(study: Study) -> None:
    """Each arm once for each variant; a comparison of bare arms once for each variant."""
    if not study.variants:
        return
    bare = study.arms
    study.arms = {
        f"{arm}-{name}": Arm(
            value.config,
            [*value.overrides, *variant.overrides],
            f"{value.label or arm}, {variant.label or name}",
            value.without,
        )
        for arm, value in bare.items()
        for name, variant in study.variants.items()
    }
    spread = []
    for entry in study.comparisons:
        if set(entry.arms) <= bare.keys():
            spread += [
                replace(entry, arms=[f"{arm}-{name}" for arm in entry.arms])
                for name in study.variants
            ]
        else:
            spread.append(entry)
    study.comparisons = spread


def _check_comparisons(study: Study) -> None:
    for entry in study.comparisons:
        if entry.margin < 0:
            raise ConfigError(f"comparisons: margin={entry.margin:g} is below 0")
        if len(entry.arms) != 2 or entry.arms[0] == entry.arms[1]:
            raise ConfigError(f"comparisons: arms={entry.arms} are not two different arms")
        for arm in entry.arms:
            if arm not in study.arms:
                raise ConfigError(f"comparisons: {nearest(arm, study.arms, 'arm')}")
        for measure in entry.measures if study.measures else ():
            if measure not in study.measures:
                raise ConfigError(f"comparisons: {nearest(measure, study.measures, 'measure')}")


def lines(study: Study, figure: Figure) -> dict[str, list[str]]:
    """Name in the file -> arms of the study: one, or for lines that of each variant in turn."""
    return {
        name: [name] if name in study.arms else [f"{name}-{v}" for v in study.variants]
        for name in figure.arms
    }


def _check_figure(name: str, figure: Figure, study: Study) -> None:
    where = f"figures.{name}"
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: a name has letters, digits, _ and . only; it is a file's")
    if not figure.arms or not figure.measures:
        raise ConfigError(f"{where}: arms and measures need at least one entry each")
    for arm, names in lines(study, figure).items():
        if not names or names[0] not in study.arms:
            raise ConfigError(f"{where}: {nearest(arm, study.arms, 'arm')}")
    if len({len(names) for names in lines(study, figure).values()}) > 1:
        raise ConfigError(f"{where}: arms with and without a variant do not go into one figure")
    for measure in figure.measures:
        if measure not in study.measures:
            raise ConfigError(f"{where}: {nearest(measure, study.measures, 'measure')}")
    if beside := figure.published:
        table = paper_tables.load(beside.paper, beside.table)
        for kind, asked, known in (
            ("row", beside.rows, [row.id for row in table.rows]),
            ("column", beside.columns, [column.id for column in table.columns]),
        ):
            for wrong in [word for word in asked if word not in known]:
                raise ConfigError(f"{where}.published: {nearest(wrong, known, kind)}")
