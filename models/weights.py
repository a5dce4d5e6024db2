"""Weights from elsewhere: the official UniCL release, and checkpoints of this repository's runs."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

import models
from loaders.errors import ConfigError, DataError
from models.config import ModelConfig
from models.official_unicl import convert, infer_config, read_official
from models.two_tower import TwoTower


@dataclass(frozen=True)
class LoadedRun:
    """A model from a run folder, with what an evaluation row has to say about it."""

    model: TwoTower
    cfg: dict[str, Any]
    step: int
    checkpoint_hash: str
    path: Path


def load_official_unicl(path: str | Path, allow_partial: bool = False) -> TwoTower:
    """Load a released UniCL checkpoint (`.pth`), of microsoft/UniCL or K-LITE/ELEVATER naming.

    The architecture (Swin-T or Swin-B, text width and depth, vocabulary, embedding size) comes
    from the shapes. Key names were read in microsoft/UniCL (model/model.py,
    model/text_encoder/transformer.py, model/image_encoder/swin_transformer.py). Prints how many
    of the model's tensors matched, and the names that did not.

    Args:
        path: the file; the weights may lie under `model` or `state_dict`.
        allow_partial: load what fits and leave the rest as initialised.

    Returns:
        The model in evaluation mode, float32, on the CPU.

    Raises:
        DataError: the file cannot be read, is not such a checkpoint, or, without
            `allow_partial`, any tensor is missing, unexpected or of the wrong shape.
    """
    path = Path(path)
    state = read_official(path)
    model = models.build(infer_config(state, path))
    target = model.state_dict()
    converted, problems = convert(state, target)
    print(
        f"{path}: {len(converted)} of {len(target)} tensors matched, "
        + ", ".join(f"{len(names)} {reason}" for reason, names in problems.items())
    )
    listing = [f"{reason}: {', '.join(names)}" for reason, names in problems.items() if names]
    if listing and not allow_partial:
        raise DataError(
            f"{path}: refused, the weights do not fit the model. {'; '.join(listing)}. "
            "Pass allow_partial=True to load the rest anyway."
        )
    for line in listing:
        print(f"  {line}")
    model.load_state_dict(converted, strict=False)
    return model.eval()


def _locate_run(path: Path) -> tuple[Path, Path]:
    """The run folder and the checkpoint folder that `path` (either of the two) stands for."""
    if (path / "model.safetensors").is_file():
        run = path.parent.parent
        if not (run / "config.yaml").is_file():
            raise DataError(f"{path}: its run folder {run} has no config.yaml")
        return run, path
    if not (path / "config.yaml").is_file():
        raise DataError(
            f"{path}: neither a run folder (config.yaml, checkpoints/) nor a checkpoint folder "
            "(model.safetensors)"
        )
    pointer = path / "checkpoints" / "LAST_GOOD"
    if not pointer.is_file():
        raise DataError(f"{path}: no finished checkpoint yet ({pointer} does not exist)")
    checkpoint = pointer.parent / pointer.read_text().strip()
    if not (checkpoint / "model.safetensors").is_file():
        raise DataError(f"{pointer} names {checkpoint.name}, which has no model.safetensors")
    return path, checkpoint


def load_run(path: str | Path) -> LoadedRun:
    """Load the model of a run folder (its last good checkpoint) or of one checkpoint folder.

    Reads the keys `model.*` of `model.safetensors`; `method.*` belongs to training. Nothing
    pretrained is loaded beforehand.

    Returns:
        The model in evaluation mode on the CPU, the whole configuration, the step, and the
        SHA-256 of the weights file.

    Raises:
        DataError: a file is missing, or the weights do not fit the configuration exactly.
    """
    run, checkpoint = _locate_run(Path(path))
    step = re.fullmatch(r"step_(\d+)", checkpoint.name)
    if step is None:
        raise DataError(f"{checkpoint}: folder name is not step_<number>")
    cfg = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    if not isinstance(cfg, dict) or "model" not in cfg:
        raise DataError(f"{run / 'config.yaml'}: no `model:` section")
    try:
        model = models.build(ModelConfig.from_dict(cfg["model"]).without_pretrained())
    except ConfigError as error:
        raise DataError(f"{run / 'config.yaml'}: {error}") from error
    weights = checkpoint / "model.safetensors"
    prefix = "model."
    state = {
        name.removeprefix(prefix): value
        for name, value in load_file(weights).items()
        if name.startswith(prefix)
    }
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{weights}: does not fit {run / 'config.yaml'}: {error}") from error
    with weights.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return LoadedRun(model.eval(), cfg, int(step.group(1)), digest, checkpoint)
