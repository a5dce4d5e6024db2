"""What the three evaluation commands share: arguments, the loop over runs and sets, writing."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from eval import rows, sources
from eval.features import Extractor
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
Task = Callable[[Extractor, sources.EvalDataset], Outcome | None]


def make_accelerator() -> Accelerator:
    """Accelerator whose processes wait as long as the main process fits and scores."""
    # Without `cpu` accelerate takes every CPU process of a launcher for a run of its own.
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )


def parse(task: str, description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of `python -m eval.<task>`."""
    parser = argparse.ArgumentParser(prog=f"python -m eval.{task}", description=description)
    parser.add_argument(
        "--checkpoint", nargs="+", required=True, metavar="RUN", help="run or checkpoint folders"
    )
    parser.add_argument(
        "--datasets", nargs="+", required=True, metavar="NAME", help="sets or collections"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="result rows")
    parser.add_argument("--batch-size", type=int, default=256, help="images per process")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes per process")
    return parser.parse_args(argv)


def run(
    task: str,
    description: str,
    evaluate: Task,
    argv: Sequence[str] | None,
    registry: Path | str = sources.REGISTRY,
) -> None:
    """Evaluate every run on every selected data set and write DIR/<run>_<task>.jsonl.

    A row appears as soon as it is known, so that an interrupted command loses one set at most.
    """
    args = parse(task, description, argv)
    selected = sources.Registry(registry).select(args.datasets, task)
    selected = [row for row in selected if sources.present(row)]
    accelerator = make_accelerator()
    for folder in args.checkpoint:
        loaded = weights.load_run(folder)
        extractor = Extractor(
            accelerator, loaded, args.output / ".features", args.batch_size, args.workers
        )
        for row in selected:
            outcome = evaluate(extractor, row)
            if outcome is None:
                continue
            new = rows.make_rows(
                loaded,
                row,
                task,
                outcome.metrics,
                outcome.classes,
                outcome.protocol,
                outcome.digest,
            )
            path = rows.write_rows(args.output, new)
            for result in new:
                low, high = result["ci95"]
                print(
                    f"{result['run']}  {row.name}  {result['metric']:<17} {result['value']:6.2f}"
                    f"  [{low:.2f}, {high:.2f}]  n={result['n']}"
                )
            print(f"{outcome.protocol}\n-> {path}", flush=True)
