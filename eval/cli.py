"""What the evaluation commands share: arguments, the loop over runs and sets, writing."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from engine.launch import in_step, map_environment
from eval import rows
from eval.features import Extractor
from eval.sources.registry import REGISTRY, EvalDataset, Registry
from eval.sources.splits import present
from loaders.errors import CommandParser, DataError
from loaders.specs import as_path
from models import weights


@dataclass
class Outcome:
    """What a task found on one data set: metric name -> {"value", "ci95", "n"} and the facts a
    reader needs beside the numbers."""

    metrics: dict[str, dict]
    classes: int | None
    protocol: str
    digest: str | None


# A task extracts features (all processes) and scores them (main process; the others return None).
Task = Callable[[Extractor, EvalDataset], Outcome | None]


def make_rows(
    run: weights.LoadedRun, dataset: EvalDataset, task: str, outcome: Outcome
) -> list[dict]:
    """Result rows of an outcome; see `rows.make_rows`."""
    return rows.make_rows(
        run, dataset, task, outcome.metrics, outcome.classes, outcome.protocol, outcome.digest
    )


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


def parse(task: str, description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of `python -m eval.<task>`."""
    parser = CommandParser(prog=f"python -m eval.{task}", description=description)
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        required=True,
        type=as_path,
        metavar="RUN",
        help="run or checkpoint folders, exports, files of UniCL, open_clip or OpenAI CLIP",
    )
    parser.add_argument(
        "--datasets", nargs="+", required=True, metavar="NAME", help="sets or collections"
    )
    parser.add_argument("--output", type=as_path, required=True, metavar="DIR", help="result rows")
    parser.add_argument(
        "--data-root",
        type=as_path,
        metavar="DIR",
        help="where benchmark sets lie (default: $UNICL_EVAL_DATA, else data/eval)",
    )
    if task == "zero_shot":
        parser.add_argument(
            "--protocol",
            choices=["unicl", "elevater"],
            help="for sets with both (ImageNet; default: the first in eval/datasets.yaml)",
        )
    parser.add_argument("--batch-size", type=int, default=256, help="images per process")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes per process")
    return parser.parse_args(argv)


def run(
    task: str,
    description: str,
    evaluate: Task,
    argv: Sequence[str] | None,
    registry: Path | str = REGISTRY,
) -> None:
    """Evaluate every run on every selected data set and write DIR/<run>_<task>.jsonl.

    A row appears as soon as it is known, so that an interrupted command loses one set at most.
    """
    args = parse(task, description, argv)
    known = Registry(registry, args.data_root)
    selected = known.select(args.datasets, task, getattr(args, "protocol", None))
    found = [row for row in selected if present(row, task, row.name in args.datasets)]
    if not found:
        raise DataError(f"none of {', '.join(args.datasets)} is there for {task}: nothing to do")
    accelerator = make_accelerator()
    for folder in args.checkpoint:
        loaded = weights.load(folder)
        extractor = Extractor(
            accelerator, loaded, args.output / ".features", args.batch_size, args.workers
        )
        for row in found:
            outcome = evaluate(extractor, row)
            if outcome is None:
                continue
            new = make_rows(loaded, row, task, outcome)
            path = rows.write_rows(args.output, new)
            for result in new:
                low, high = result["ci95"]
                print(
                    f"{result['run']}  {row.name}  {result['metric']:<17} {result['value']:6.2f}"
                    f"  [{low:.2f}, {high:.2f}]  n={result['n']}"
                )
            print(f"{outcome.protocol}\n-> {path}", flush=True)
