"""Files of our own run folders: which run a path belongs to, its configuration, its checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

import models
from loaders.errors import ConfigError, DataError
from models import plain_yaml
from models.base import Model
from models.config import ModelConfig

WEIGHTS = "model.safetensors"
STEP = re.compile(r"step_(\d+)")
# Files that may hold a whole model, and among them DeepSpeed's own, which hold parts of a training.
MODEL_FILE = re.compile(r".*\.(safetensors|bin|pth?|ckpt)(\.index\.json)?")
TRAINING_FILE = re.compile(r".*_states\.pt")


def locate(path: Path) -> tuple[Path, Path]:
    """The run folder and the checkpoint folder that `path` (either of the two) stands for.

    Raises:
        DataError: neither, or no finished checkpoint.
    """
    path = path.absolute()
    if (path / WEIGHTS).is_file():
        run = path.parent.parent
        if not (run / "config.yaml").is_file():
            raise DataError(f"{path}: its run folder {run} has no config.yaml")
        return run, path
    if not (path / "config.yaml").is_file():
        owner = owning_run(path)
        raise DataError(
            f"{path}: neither a run folder (config.yaml, checkpoints/) nor a checkpoint folder "
            f"({WEIGHTS})" + (f"; give {_stands_for(path, owner)}" if owner else "")
        )
    pointer = path / "checkpoints" / "LAST_GOOD"
    if not pointer.is_file():
        raise DataError(f"{path}: no finished checkpoint yet ({pointer} does not exist)")
    checkpoint = pointer.parent / pointer.read_text().strip()
    if not (checkpoint / WEIGHTS).is_file():
        raise DataError(f"{pointer} names {checkpoint.name}, which has no {WEIGHTS}")
    return path, checkpoint


def owning_run(path: Path) -> Path | None:
    """The run folder that holds `path` somewhere within, or None."""
    for folder in path.absolute().parents:
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None


def _stands_for(path: Path, run: Path) -> Path:
    """The folder to give instead of a file or folder of a run: its checkpoint, or the run."""
    first, *rest = path.absolute().relative_to(run).parts
    if first == "checkpoints" and rest:
        checkpoint = run / first / rest[0].removesuffix(".universal")
        if (checkpoint / WEIGHTS).is_file():
            return checkpoint
    return run


def checkpoint_of(path: Path) -> Path | None:
    """The checkpoint folder whose `model.safetensors` this file is, or None.

    Raises:
        DataError: another file of a run that holds no whole model; names the folder to give.
    """
    run = owning_run(path)
    if run is None:
        return None
    if path.name == WEIGHTS and path.absolute().parent.parent == run / "checkpoints":
        return path.absolute().parent
    universal = any(folder.suffix == ".universal" for folder in path.absolute().parents)
    whole = MODEL_FILE.fullmatch(path.name) and not TRAINING_FILE.fullmatch(path.name)
    if universal or not whole:
        raise DataError(
            f"{path}: a file of the run {run}, which is not read alone; give the folder "
            f"{_stands_for(path, run)}"
        )
    return None


def step_of(path: Path) -> int | None:
    """The number in the nearest folder `step_<number>` that holds this file, or None."""
    found = (STEP.fullmatch(folder.name) for folder in path.absolute().parents)
    return next((int(match.group(1)) for match in found if match), None)


def config_for(path: Path) -> Path:
    """The config.yaml for weights under our names: beside the file, or of the run that holds it.

    Raises:
        DataError: neither is there.
    """
    run = owning_run(path)
    for folder in filter(None, (path.parent, run)):
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    raise DataError(
        f"{path}: weights of a run of this repository without its configuration; put the run's "
        f"config.yaml beside them, into {path.parent}"
    )


def read(config: Path) -> tuple[dict[str, Any], Model]:
    """A run's configuration, and its model without starting weights.

    Raises:
        DataError: no plain YAML (`models.plain_yaml`), or no model in it.
    """
    try:
        cfg = yaml.load(plain_yaml.read_text(config), Loader=plain_yaml.Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{config}: {error}") from None
    if not isinstance(cfg, dict) or "model" not in cfg:
        raise DataError(f"{config}: no `model:` section")
    try:
        return cfg, models.build(ModelConfig.from_dict(cfg["model"]).without_pretrained())
    except ConfigError as error:
        raise DataError(f"{config}: {error}") from error
