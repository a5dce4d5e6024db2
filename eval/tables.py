"""Result rows joined into one table: `python -m eval.tables RESULTS [--format md|tex|csv|html|png]
[--output FILE]`, or a published table beside our numbers: `… --paper unicl --table 5`."""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put eval/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval import rows
from eval.report import paper_join, paper_tables, render, render_bars, render_names, render_paper
from eval.report.table import Column, Line, Table
from eval.sources import presence
from eval.sources.registry import EvalDataset, Registry
from loaders.errors import ConfigError, DataError, run_cli
from loaders.specs import as_path

QUICKSTART_TITLE = "Clip-art numbers of the quickstart sets, not ImageNet"
TITLE = "Evaluation results"


def read_folder(folder: Path) -> list[dict]:
    """All result rows of FOLDER/*.jsonl, none if there is no such file."""
    return [row for path in sorted(folder.glob("*.jsonl")) for row in rows.read_rows(path)]


def load_folder(folder: Path) -> list[dict]:
    """All result rows of FOLDER/*.jsonl; none at all raises DataError with the command."""
    found = read_folder(folder)
    if not found:
        raise DataError(
            f"{folder} holds no result rows (*.jsonl); make some with: "
            f"python -m eval.zero_shot --checkpoint RUN --datasets quickstart --output {folder}"
        )
    return found


def refuse_mixed_prompts(found: list[dict]) -> None:
    """Raise DataError where one data set, task and protocol has results of several prompt digests:
    class names or templates have changed in between."""
    runs: dict[tuple, dict[str | None, str]] = defaultdict(dict)
    for row in found:
        measure = runs[row["dataset"], row["task"], row["protocol"]]
        measure.setdefault(row["prompt_digest"], row["run"])
        if len(measure) > 1:
            raise DataError(
                f"{row['dataset']}, {row['task']}: {' and '.join(measure.values())} were evaluated "
                "with different prompts (class names or templates); evaluate them again, or keep "
                "their results in folders of their own"
            )


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


def column_of(row: dict) -> Column:
    """Column of a result row."""
    size = (row["n"], row["classes"])
    measure = (row["dataset"], row["task"], row["metric"])
    return Column(*measure, *size, render_names.protocol_name(row))


def _owed(touched: set[str], registry: Registry) -> tuple[set[str], list[EvalDataset]]:
    """Sets that a table of the sets `touched` has a place for, and optional ones that belong with
    them but are not there: nobody can evaluate those, so they get no empty cells."""
    owed: set[str] = set()
    for members in registry.collections.values():
        # Benchmark sets are all optional: nobody owes the other 26 for having evaluated one.
        if touched & set(members) and not all(registry.datasets[m].optional for m in members):
            owed |= set(members)
    absent = [
        row
        for name, row in registry.datasets.items()
        if name in owed - touched and row.optional and presence.absent_splits(row)
    ]
    return owed - {row.name for row in absent}, absent


def _columns(found: list[dict], owed: set[str], registry: Registry) -> list[Column]:
    """Columns in the registry's order: what was measured, and what the sets `owed` still lack."""
    measured = {column_of(row) for row in found}
    seen = {column[:3] for column in measured}
    expected: list[tuple[str, str, str]] = []
    for row in registry.datasets.values():
        for task, metrics in row.tasks.items():
            expected += [(row.name, task, metric) for metric in metrics]
    position = {key: i for i, key in enumerate(expected)}
    lacking = [
        Column(*key, n=None, classes=None) for key in expected if key[0] in owed and key not in seen
    ]

    def order(column: Column) -> tuple:
        place = position.get(column[:3], len(position))
        return (place, column[:3], column.protocol or "", column.n or 0)

    return sorted([*measured, *lacking], key=order)


def _left_out(absent: list[EvalDataset]) -> list[str]:
    """One note with the sets that are not there and the commands that make them; or none."""
    how = presence.obtain((row.obtain, row.name) for row in absent)
    return [f"Optional sets that are not there; {how}"] if absent else []


def join(found: list[dict], folder: Path, registry: Registry | None = None) -> Table:
    """One table of result rows (dicts in the shape of `tasks.outcome.make_rows`).

    A line is a (run, checkpoint), a column is (data set, task, metric, n, k). Cells without a row
    stay empty, and `commands` names the commands that fill them into `folder`. An optional set that
    is not there has no column: a note names it, with the command that makes it. Results that differ
    in their prompts, and two results for one cell, raise DataError.
    """
    registry = registry or Registry()
    refuse_mixed_prompts(found)
    labels = _labels(found)
    lines: dict[tuple, Line] = {}
    for row in found:
        key = (row["run"], row["checkpoint_hash"])
        line = lines.setdefault(key, Line(labels[key], row["config_name"]))
        column = column_of(row)
        if line.cells.setdefault(column, row) != row:
            first = line.cells[column]
            raise DataError(
                f"two results for {line.label}, {', '.join(column[:3])}: {first['value']} "
                f"({first['protocol']}) and {row['value']} ({row['protocol']}); keep one of them"
            )
    owed, absent = _owed({row["dataset"] for row in found}, registry)
    columns = _columns(found, owed, registry)
    protocols: dict[tuple, list[str]] = defaultdict(list)
    for column in columns:
        for key, line in lines.items():
            row = line.cells.get(column)
            if row and labels[key] not in protocols[(*column[:2], row["protocol"])]:
                protocols[(*column[:2], row["protocol"])].append(labels[key])
    notes = [
        f"{dataset}, {render_names.task_name(task)} ({', '.join(runs)}): {protocol}."
        for (dataset, task, protocol), runs in protocols.items()
    ]
    notes += [*_left_out(absent), *_code(found, labels)]
    commands = [
        row.obtain
        for row in registry.datasets.values()
        if any(column.dataset == row.name and column.n is None for column in columns)
        and presence.absent_splits(row)
    ]
    commands = [*dict.fromkeys(commands), *_commands(lines, columns, folder, registry)]
    clip_art = {row["dataset"] for row in found} <= set(registry.collections.get("quickstart", []))
    title = QUICKSTART_TITLE if clip_art else TITLE
    return Table(title, columns, list(lines.values()), notes, commands)


def _code(found: list[dict], labels: dict[tuple, str]) -> list[str]:
    """A note with the commits that trained and evaluated; none if no training commit is known."""
    trained: dict[str, str] = {}
    for row in found:
        if row.get("training_git"):
            trained[labels[row["run"], row["checkpoint_hash"]]] = _short(row["training_git"])
    if not trained:
        return []
    by_commit = [
        f"{commits} ({', '.join(label for label, own in trained.items() if own == commits)})"
        for commits in dict.fromkeys(trained.values())
    ]
    evaluated = dict.fromkeys(_short(row.get("git_hash", "unknown")) for row in found)
    return [f"Code: trained with {'; '.join(by_commit)}, evaluated with {', '.join(evaluated)}."]


def _short(commits: str) -> str:
    return re.sub(r"([0-9a-f]{12})[0-9a-f]+", r"\1", commits)


def _commands(
    lines: dict[tuple, Line], columns: list[Column], folder: Path, registry: Registry
) -> list[str]:
    """The commands that fill the empty cells, one per run and task."""
    lacking: dict[tuple, list[str]] = defaultdict(list)
    measured = [row for line in lines.values() for row in line.cells.values()]
    # Sets of no registry of ours are named by their folder and file, in a command of their own.
    typed = {column_of(row): row["set"]["arguments"] for row in measured if "set" in row}
    for (run, _), line in lines.items():
        done = {column[:3] for column in line.cells}
        for column in columns:
            names = lacking[column.task, run, tuple(typed.get(column, ()))]
            filled = column in line.cells if column in typed else column[:3] in done
            if not filled and column.dataset not in names:
                names.append(column.dataset)
    commands = []
    for (task, run, own), names in lacking.items():
        if names:
            # Runs and their results lie side by side in the quickstart; else the user knows where.
            beside = folder.parent / run
            place = str(beside) if beside.exists() else f"FOLDER_OF_RUN/{run}"
            found = render_names.command(task, place, names, folder, registry, list(own))
            commands.append(found)
    return commands


def paper_table(paper: str, table: str | None, folder: Path) -> paper_tables.PaperTable:
    """A published table with the results of `folder`; raises ConfigError with the known tables."""
    if table is None:
        known = ", ".join(paper_tables.table_ids(paper))
        raise ConfigError(f"--paper {paper} needs --table, one of {known}")
    content = paper_tables.load(paper, table)
    found = [row for row in read_folder(folder) if row["config_name"] in content.configs]
    refuse_mixed_prompts(found)
    return paper_join.join(content, found, folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.tables", description="One table.")
    parser.add_argument("results", type=as_path, help="folder with result rows (*.jsonl)")
    parser.add_argument("--paper", help="published tables: a file of eval/paper without .yaml")
    parser.add_argument("--table", help="which table of --paper")
    parser.add_argument("--format", choices=["md", "tex", "csv", "html", "png"], default="md")
    parser.add_argument("--output", type=as_path, help="file to write; without it: print")
    args = parser.parse_args(argv)
    if args.table and not args.paper:
        raise ConfigError(f"--table needs --paper, one of {', '.join(paper_tables.papers())}")
    if args.format == "png" and args.output is None:
        raise ConfigError("--format png needs --output FILE")
    if args.paper:
        table, texts = paper_table(args.paper, args.table, args.results), render_paper
    else:
        table, texts = join(load_folder(args.results), args.results), render
    if args.format == "png":
        (render_bars if args.paper else render).png(table, args.output)
        return
    text = getattr(texts, args.format)(table)
    if args.output is None:
        print(text, end="")
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
