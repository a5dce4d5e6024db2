"""Evaluation of a checkpoint that a running training has just written, on all its ranks.

What is evaluated is the checkpoint on disk, in float32, by the code of `eval.zero_shot` and the
others: the same command later gives the same number. Rows go to RUN/evals.jsonl; rows of later
steps, which an earlier attempt of a resumed run left there, are dropped.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval import cli, knn, retrieval, rows, zero_shot
from eval.features import Extractor
from eval.sources import common_classes
from eval.sources.registry import REGISTRY, EvalDataset, Registry
from eval.sources.splits import EvalSplit, present
from loaders.errors import ConfigError
from models import weights

TASKS = {"zero_shot": zero_shot.evaluate, "retrieval": retrieval.evaluate, "knn": knn.evaluate}
EVALS = "evals.jsonl"


def select(
    plan: Mapping[str, Sequence[str]], registry: Path | str = REGISTRY
) -> list[tuple[str, EvalDataset]]:
    """(task, data set) pairs that `evals:` of a configuration asks for, before any GPU time.

    Raises:
        ConfigError: unknown task or data set. DataError: a set that is named is not on disk, or
            its samples or classes are not what the task needs.
    """
    known = Registry(registry, None)
    chosen = []
    for task, names in plan.items():
        if task not in TASKS:
            raise ConfigError(f"evals.{task}: one of {', '.join(TASKS)}")
        for row in known.select(list(names), task, None):
            if present(row, task, row.name in names):
                _open(task, row)
                chosen.append((task, row))
    return chosen


def _open(task: str, row: EvalDataset) -> None:
    """Open what `task` reads of `row`: what is wrong with its classes must not wait for the first
    checkpoint. No image is decoded, so the crop does not matter."""
    if task == "knn":
        common_classes.open_splits(row, ("train",), crop=1)
        return
    split = EvalSplit(row, "test", crop=1)
    if task == "zero_shot":
        split.class_names()


def evaluate(
    checkpoint: Path,
    chosen: Sequence[tuple[str, EvalDataset]],
    batch_size: int = 64,
    workers: int = 2,
) -> list[dict]:
    """Evaluate a checkpoint folder and add the rows to RUN/evals.jsonl; collective over ranks.

    Args:
        checkpoint: RUN/checkpoints/step_0001000. chosen: what `select` returned.

    Returns:
        The rows on the main process, an empty list on the others.
    """
    accelerator = cli.make_accelerator()
    loaded = weights.load(checkpoint)
    run = checkpoint.resolve().parents[1]
    cache = run / ".evals"
    extractor = Extractor(accelerator, loaded, cache, batch_size, workers)
    found = []
    for task, row in chosen:
        outcome = TASKS[task](extractor, row)
        if outcome is not None:
            found += cli.make_rows(loaded, row, task, outcome)
    if accelerator.is_main_process:
        _replace(run / EVALS, found, loaded.step)
        shutil.rmtree(cache, ignore_errors=True)  # of no use for the next checkpoint
    return found


def _replace(path: Path, found: list[dict], step: int) -> None:
    """Rewrite a file of rows: those before `step`, then the new ones."""
    before = rows.read_rows(path) if path.exists() else []
    kept = [row for row in before if row["step"] < step]
    scratch = path.with_suffix(".tmp")
    scratch.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*kept, *found]),
        encoding="utf-8",
    )
    os.replace(scratch, path)
