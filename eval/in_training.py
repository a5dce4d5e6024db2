"""Evaluation of a checkpoint that a running training has just written, on all its ranks.

What is evaluated is the checkpoint on disk, in float32, by the code of `eval.zero_shot` and the
others: the same command later gives the same number. Rows go to RUN/evals.jsonl; rows of later
steps, which an earlier attempt of a resumed run left there, are dropped.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.sources.presence import those_present
from eval.sources.registry import REGISTRY, EvalDataset, Registry
from loaders.errors import ConfigError

TASKS = ("zero_shot", "retrieval", "knn")


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
        rows = known.select(list(names), task, None)
        chosen += [(task, row) for row in those_present(rows, task, names)]
    # Late: torch takes seconds, and a wrong name should not wait for it. But here, and not at the
    # first checkpoint, where a training would find out hours later that something cannot be loaded.
    from eval.sources import common_classes

    common_classes.open_sets(chosen)
    return chosen


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
    from eval.tasks.checkpoint import evaluate as evaluate_now

    return evaluate_now(checkpoint, chosen, batch_size, workers)
