"""The code that a run was trained with, from RUN/environment.json, which the engine writes."""

from __future__ import annotations

import json
from pathlib import Path

from models.loaded_run import LoadedRun

ENVIRONMENT = "environment.json"


def training_git(run: LoadedRun) -> str | None:
    """Commits that made the steps up to the checkpoint, in order, with `-dirty` where files had
    been changed; joined by a comma and a space. None where that is not known: an export, a run
    without `environment.json`, code outside of a checkout."""
    checkpoint = run.path.resolve()
    if not checkpoint.is_dir() or run.step is None:
        return None
    path = checkpoint.parents[1] / ENVIRONMENT
    return _commits(path, run.step) if path.is_file() else None


def starts_up_to(starts: list[dict], step: int) -> list[dict]:
    """Of the entries of `environment.json` those that made the steps up to `step`, in order."""
    made: list[dict] = []
    for start in starts:
        # It made its steps again that earlier starts had made behind it.
        made = [s for s in made if s["after_step"] < start["after_step"]] + [start]
    return [s for s in made if s["after_step"] < step]


def _commits(path: Path, step: int) -> str | None:
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
        found = [s["git"] for s in starts_up_to(starts, step)]
        names = [g and g["commit"] + ("-dirty" if g["changed"] else "") for g in found]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if None in names or not names else ", ".join(dict.fromkeys(names))
