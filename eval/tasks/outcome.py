"""What a task found, and its result rows."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from eval import rows
from eval.sources.registry import EvalDataset
from models.provenance import training_git
from models.weights import LoadedRun


@dataclass
class Outcome:
    """What a task found on one data set: metric name -> {"value", "ci95", "n"} and the facts a
    reader needs beside the numbers."""

    metrics: dict[str, dict]
    classes: int | None
    protocol: str
    digest: str | None


def run_folder(run: LoadedRun) -> Path | None:
    """RUN of RUN/checkpoints/step_0001000; None for a model that is a file of its own."""
    checkpoint = run.path.resolve()
    return checkpoint.parents[1] if checkpoint.is_dir() else None


def samples_seen(run: LoadedRun) -> int | None:
    """Samples trained on up to the checkpoint's step, from the run's metrics.jsonl; null if there
    is no run folder, or its log has no line for that step."""
    folder = run_folder(run)
    log = None if folder is None else folder / "metrics.jsonl"
    if log is None or not log.exists():
        return None
    records = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    seen = [r["samples"] for r in records if r.get("step") == run.step and "samples" in r]
    return seen[-1] if seen else None


def make_rows(run: LoadedRun, dataset: EvalDataset, task: str, outcome: Outcome) -> list[dict]:
    """One row per metric that the registry names for this task, in its order."""
    metrics, origin = outcome.metrics, dataset.origin
    protocol = outcome.protocol
    if origin:
        protocol += origin.protocol if outcome.digest is None else origin.prompts
    common = {
        "task": task,
        "protocol": protocol,
        "checkpoint_hash": run.checkpoint_hash,
        "step": run.step,
        "samples_seen": samples_seen(run),
        "run": run.name,
        # A configuration need not have a name; the folder's then says which one it was.
        "config_name": run.cfg.get("name", run.name),
        "recipe": run.cfg.get("recipe"),
        "prompt_digest": outcome.digest,
        "git_hash": rows.git_hash(),
        "training_git": training_git(run),
        **({"reference": run.reference} if run.reference else {}),
        **({"set": dict(origin.facts)} if origin else {}),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return [
        {
            "dataset": dataset.name,
            "split": dataset.split_name("test"),
            "n": metrics[name]["n"],
            "classes": outcome.classes,
            "metric": name,
            "value": metrics[name]["value"],
            "ci95": metrics[name]["ci95"],
            **common,
        }
        for name in dataset.tasks[task]
    ]
