"""Evaluations with arguments of their own, which name their rows themselves: several protocols on
the sets that a task lists."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from eval import cli, rows
from eval.features import Extractor
from eval.sources.registry import REGISTRY, EvalDataset, Registry
from eval.sources.splits import present
from loaders.errors import DataError
from models import weights

# Yields (task name for the row, what was found); off the main process nothing.
Evaluate = Callable[[Extractor, EvalDataset], Iterator[tuple[str, cli.Outcome]]]


def parse(
    command: str, description: str, options: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str], str]:
    """Arguments of `options` (made without help), the remaining ones, and the description for the
    help of the common ones."""
    options.prog = f"python -m eval.{command} …"
    own, rest = options.parse_known_args(argv)
    return own, rest, f"{description} Before the options below: {options.format_usage()}"


def store(
    output: Path,
    run: weights.LoadedRun,
    dataset: EvalDataset,
    task: str,
    outcome: cli.Outcome,
) -> Path:
    """Write one row per metric of `outcome` and print them; the path of the file."""
    listed = replace(dataset, tasks={task: list(outcome.metrics)})
    new = cli.make_rows(run, listed, task, outcome)
    path = rows.write_rows(output, new)
    for row in new:
        interval = "  [{:.2f}, {:.2f}]".format(*row["ci95"]) if row["ci95"] else ""
        print(
            f"{row['run']}  {row['dataset']}  {task}  {row['metric']}  {row['value']:6.2f}"
            f"{interval}  n={row['n']}"
        )
    print(f"{outcome.protocol}\n-> {path}", flush=True)
    return path


def run(
    command: str,
    listed: str,
    description: str,
    evaluate: Evaluate,
    argv: Sequence[str],
    registry: Path | str = REGISTRY,
) -> None:
    """Evaluate every run on every named set that has the task `listed`."""
    args = cli.parse(command, description, argv)
    selected = Registry(registry, args.data_root).select(args.datasets, listed)
    found = [r for r in selected if present(r, listed, r.name in args.datasets)]
    if not found:
        raise DataError(f"none of {', '.join(args.datasets)} is there for {command}: nothing to do")
    accelerator = cli.make_accelerator()
    for folder in args.checkpoint:
        loaded = weights.load(folder)
        extractor = Extractor(
            accelerator, loaded, args.output / ".features", args.batch_size, args.workers
        )
        for row in found:
            for task, outcome in evaluate(extractor, row):
                store(args.output, loaded, row, task, outcome)
