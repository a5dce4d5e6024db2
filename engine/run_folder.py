"""Whose folder is it? A run writes only into a new folder, or into one that a run has made.

Everything here only reads.
"""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine import checkpoint, config, config_file
from loaders.errors import ConfigError, DataError
from models.provenance import ENVIRONMENT

CONFIG, DEEPSPEED = "config.yaml", "ds_config.json"
METRICS = "metrics.jsonl"
# What a run rewrites or cuts in its folder; log.txt is only added to.
WRITTEN = (
    CONFIG, DEEPSPEED, ENVIRONMENT, METRICS, "evals.jsonl", "window.jsonl", "bad_samples.tsv",
    "checkpoints",
)  # fmt: skip
SECTIONS = {"seed", "deepspeed", "loss", "model", "data", "train", "optim"}


def configuration(folder: Path) -> DictConfig | None:
    """The configuration in a run folder; keys that it does not know have their defaults."""
    if not (folder / CONFIG).exists():
        return None
    read, _ = config_file.read(folder / CONFIG)
    try:
        return OmegaConf.merge(OmegaConf.structured(config.RunConfig), read)
    except OmegaConfBaseException:  # of an older version, with keys that are gone
        return read


def refuse_foreign(folder: Path) -> None:
    """Nothing that a run would overwrite may be that of something else.

    Raises:
        DataError: names the file that is not of a run.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"output_dir={folder} is a file; choose another --output-dir")
    found = [name for name in WRITTEN if (folder / name).exists()]
    reason = _foreign(folder, set(found)) if found else None
    if reason:
        raise DataError(
            f"{folder} is not the folder of a run: {reason}. Nothing in it was touched. Choose "
            f"another --output-dir, or move these out of it: {', '.join(found)}"
        )


def _foreign(folder: Path, found: set[str]) -> str | None:
    """Why the files that a run would overwrite are not those of a run, or None."""
    if CONFIG in found and not _is_config(folder / CONFIG):
        return f"{CONFIG} is not the configuration of a run"
    if METRICS in found and not _has_steps(folder / METRICS):
        return f"{METRICS} has lines without a step"
    if ENVIRONMENT in found:
        return None if starts(folder) else f"{ENVIRONMENT} is not that of a run"
    if CONFIG in found:
        deepspeed = read_json(folder / DEEPSPEED)
        known = isinstance(deepspeed, dict) and "train_batch_size" in deepspeed
        return None if known else f"beside {CONFIG} there is no {DEEPSPEED} of a run"
    root = folder / "checkpoints"
    if (root / checkpoint.POINTER).is_file():  # checkpoints that were brought here alone
        checkpoint.read_facts(checkpoint.last_good(folder))
        return None
    if found == {"checkpoints"} and root.is_dir() and not any(root.iterdir()):
        return None
    if found == {"checkpoints"}:
        return "its checkpoints have no run.json"
    return f"there is no {CONFIG}"


def _is_config(path: Path) -> bool:
    try:
        return set(config_file.read(path)[0]) >= SECTIONS
    except ConfigError:
        return False


def _has_steps(path: Path) -> bool:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # cut off half-way by a kill
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            return False
    return True


def read_json(path: Path) -> Any:
    """Content of a JSON file; None where it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def starts(folder: Path) -> list[dict[str, Any]]:
    """The entries of RUN/environment.json; none where it is missing or not that of a run."""
    content = read_json(folder / ENVIRONMENT)
    entries = content.get("starts") if isinstance(content, dict) else None
    known = isinstance(entries, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("after_step"), int) for entry in entries
    )
    return entries if known else []
