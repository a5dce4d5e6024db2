"""The loop over models and data sets, and the writing of what was found."""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from engine.launch import in_step, map_environment
from eval import rows
from eval.sources import common_classes
from eval.sources.registry import EvalDataset
from eval.tasks.features import Extractor
from eval.tasks.outcome import Outcome, make_rows
from models import weights

# A task extracts features (all processes) and scores them (main process; the others return None).
Task = Callable[[Extractor, EvalDataset], Outcome | None]
# One that names its rows itself, for its several protocols: yields (task name for the rows, what
# was found); off the main process nothing.
ProtocolTask = Callable[[Extractor, EvalDataset], Iterator[tuple[str, Outcome]]]


def make_accelerator() -> Accelerator:
    """Accelerator whose processes wait as long as the main process fits and scores."""
    if in_step(os.environ):
        # accelerate knows torchrun's variables, but not those of a process that srun started.
        map_environment(os.environ)
    # Without `cpu` accelerate takes every CPU process of a launcher for a run of its own.
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )


def extractors(args: argparse.Namespace) -> Iterator[Extractor]:
    """Every model of `args.checkpoint`, one after the other; its `run` says which it is."""
    accelerator = make_accelerator()
    for folder in args.checkpoint:
        yield Extractor(
            accelerator,
            weights.load(folder),
            args.output / ".features",
            args.batch_size,
            args.workers,
        )


def run(args: argparse.Namespace, chosen: Sequence[EvalDataset], name: str, task: Task) -> None:
    """Evaluate every model on every set and write DIR/<run>_<name>.jsonl.

    A row appears as soon as it is known, so that an interrupted command loses one set at most.
    `args` are those of `eval.cli.parser`.
    """
    common_classes.open_sets([(name, row) for row in chosen])
    for extractor in extractors(args):
        for row in chosen:
            outcome = task(extractor, row)
            if outcome is None:
                continue
            new = make_rows(extractor.run, row, name, outcome)
            path = rows.write_rows(args.output, new)
            for result in new:
                low, high = result["ci95"]
                print(
                    f"{result['run']}  {row.name}  {result['metric']:<17} {result['value']:6.2f}"
                    f"  [{low:.2f}, {high:.2f}]  n={result['n']}"
                )
            print(f"{new[0]['protocol']}\n-> {path}", flush=True)


def run_protocols(
    args: argparse.Namespace, chosen: Sequence[EvalDataset], task: ProtocolTask
) -> None:
    """As `run`, for a task that names its rows itself, all of which fit something."""
    common_classes.open_sets([("linear_probe", row) for row in chosen])
    for extractor in extractors(args):
        for row in chosen:
            for name, outcome in task(extractor, row):
                store(args.output, extractor.run, row, name, outcome)


def store(
    output: Path, run: weights.LoadedRun, dataset: EvalDataset, task: str, outcome: Outcome
) -> Path:
    """Write one row per metric of `outcome` and print them; the path of the file."""
    listed = replace(dataset, tasks={task: list(outcome.metrics)})
    new = make_rows(run, listed, task, outcome)
    path = rows.write_rows(output, new)
    for row in new:
        interval = "  [{:.2f}, {:.2f}]".format(*row["ci95"]) if row["ci95"] else ""
        print(
            f"{row['run']}  {row['dataset']}  {task}  {row['metric']}  {row['value']:6.2f}"
            f"{interval}  n={row['n']}"
        )
    print(f"{new[0]['protocol']}\n-> {path}", flush=True)
    return path
