"""Evaluation of a checkpoint that a running training has just written; see `eval.in_training`."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from eval import rows
from eval.sources.registry import EvalDataset
from eval.tasks import evaluation, knn, retrieval, zero_shot
from eval.tasks.features import Extractor
from eval.tasks.outcome import make_rows
from models import weights

TASKS = {"zero_shot": zero_shot.evaluate, "retrieval": retrieval.evaluate, "knn": knn.evaluate}
EVALS = "evals.jsonl"


def evaluate(
    checkpoint: Path, chosen: Sequence[tuple[str, EvalDataset]], batch_size: int, workers: int
) -> list[dict]:
    """`eval.in_training.evaluate`."""
    accelerator = evaluation.make_accelerator()
    loaded = weights.load(checkpoint)
    run = checkpoint.resolve().parents[1]
    cache = run / ".evals"
    extractor = Extractor(accelerator, loaded, cache, batch_size, workers)
    found = []
    for task, row in chosen:
        outcome = TASKS[task](extractor, row)
        if outcome is not None:
            found += make_rows(loaded, row, task, outcome)
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
