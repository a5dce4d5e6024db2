"""Result rows joined into one table: `python -m eval.tables RESULTS [--format md|tex|csv|html|png]
[--output FILE]`."""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from eval import render, rows, sources
from loaders.errors import ConfigError, DataError, run_cli

TITLE = "Clip-art numbers of the quickstart sets, not ImageNet"


class Column(NamedTuple):
    """What a number is; results on another n or k never share a column."""

    dataset: str
    task: str
    metric: str
    n: int | None
    classes: int | None


@dataclass
class Line:
    """One model: a label, the name of its configuration, and its result rows by column."""

    label: str
    config_name: str
    cells: dict[Column, dict] = field(default_factory=dict)


@dataclass
class Table:
    """Lines x columns, with the notes that belong under it."""

    title: str
    columns: list[Column]
    lines: list[Line]
    notes: list[str]
    commands: list[str]


def load_folder(folder: Path) -> list[dict]:
    """All result rows of FOLDER/*.jsonl; none at all raises DataError with the command."""
    found = [row for path in sorted(folder.glob("*.jsonl")) for row in rows.read_rows(path)]
    if not found:
        raise DataError(
            f"{folder} holds no result rows (*.jsonl); make some with: "
            f"python -m eval.zero_shot --checkpoint RUN --datasets quickstart --output {folder}"
        )
    return found


def _labels(found: list[dict]) -> dict[tuple, str]:
    """(run, checkpoint hash) -> label: the run's name, with the step and, if that is not enough,
    the hash where one run name has several checkpoints."""
    steps = {(row["run"], row["checkpoint_hash"]): row["step"] for row in found}
    labels = {}
    for (run, checkpoint), step in steps.items():
        others = [s for (r, c), s in steps.items() if r == run and c != checkpoint]
        label = run if not others else f"{run} @ step {step}"
        labels[run, checkpoint] = f"{label} ({checkpoint[:8]})" if step in others else label
    return labels


def _columns(found: list[dict], registry: sources.Registry) -> list[Column]:
    """Columns in the registry's order: what was measured, and what a collection that was touched
    still lacks."""
    measured = {
        Column(*(row[k] for k in ("dataset", "task", "metric", "n", "classes"))) for row in found
    }
    seen = {column[:3] for column in measured}
    touched = {column.dataset for column in measured}
    expected: list[tuple[str, str, str]] = []
    for row in registry.datasets.values():
        for task, metrics in row.tasks.items():
            expected += [(row.name, task, metric) for metric in metrics]
    position = {key: i for i, key in enumerate(expected)}
    due = {name for c in registry.collections.values() if touched & set(c) for name in c}
    lacking = [
        Column(*key, n=None, classes=None) for key in expected if key[0] in due and key not in seen
    ]

    def order(column: Column) -> tuple:
        return (position.get(column[:3], len(position)), column[:3], column.n or 0)

    return sorted([*measured, *lacking], key=order)


def join(found: list[dict], folder: Path, registry: sources.Registry | None = None) -> Table:
    """One table of result rows (dicts in the shape of `rows.make_rows`).

    A line is a (run, checkpoint), a column is (data set, task, metric, n, k). Cells without a row
    stay empty, and `commands` names the commands that fill them into `folder`.
    """
    registry = registry or sources.Registry()
    labels = _labels(found)
    lines: dict[tuple, Line] = {}
    for row in found:
        key = (row["run"], row["checkpoint_hash"])
        line = lines.setdefault(key, Line(labels[key], row["config_name"]))
        column = Column(*(row[k] for k in ("dataset", "task", "metric", "n", "classes")))
        line.cells[column] = row
    columns = _columns(found, registry)
    protocols: dict[tuple, list[str]] = defaultdict(list)
    for column in columns:
        for key, line in lines.items():
            row = line.cells.get(column)
            if row and labels[key] not in protocols[(*column[:2], row["protocol"])]:
                protocols[(*column[:2], row["protocol"])].append(labels[key])
    notes = [
        f"{dataset}, {render.TASKS[task]} ({', '.join(runs)}): {protocol}."
        for (dataset, task, protocol), runs in protocols.items()
    ]
    commands = [
        row.obtain
        for row in registry.datasets.values()
        if any(column.dataset == row.name and column.n is None for column in columns)
        and sources.absent_splits(row)
    ]
    commands = [*dict.fromkeys(commands), *_commands(lines, columns, folder)]
    return Table(TITLE, columns, list(lines.values()), notes, commands)


def _commands(lines: dict[tuple, Line], columns: list[Column], folder: Path) -> list[str]:
    """The commands that fill the empty cells, one per run and task."""
    lacking: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (run, _), line in lines.items():
        done = {column[:3] for column in line.cells}
        for column in columns:
            names = lacking[column.task, run]
            if column[:3] not in done and column.dataset not in names:
                names.append(column.dataset)
    commands = []
    for (task, run), names in lacking.items():
        if names:
            # Runs and their results lie side by side in the quickstart; else the user knows where.
            beside = folder.parent / run
            place = beside if beside.exists() else f"FOLDER_OF_RUN/{run}"
            commands.append(
                f"python -m eval.{task} --checkpoint {place} --datasets {' '.join(names)} "
                f"--output {folder}"
            )
    return commands


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.tables", description="One table.")
    parser.add_argument("results", type=Path, help="folder with result rows (*.jsonl)")
    parser.add_argument("--format", choices=["md", "tex", "csv", "html", "png"], default="md")
    parser.add_argument("--output", type=Path, help="file to write; without it: print")
    args = parser.parse_args(argv)
    table = join(load_folder(args.results), args.results)
    if args.format == "png":
        if args.output is None:
            raise ConfigError("--format png needs --output FILE")
        render.png(table, args.output)
        return
    text = getattr(render, args.format)(table)
    if args.output is None:
        print(text, end="")
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
