"""Our own exports of whole models, to be read with torch or safetensors alone: .pt, .safetensors.

The weights have our names; what they do not say is in four entries beside them (`EXPORT_KEYS`).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import models
from loaders.errors import ConfigError, DataError
from models.base import Model
from models.config import INTERPOLATION, ModelConfig
from models.formats import load_lines, writing
from models.formats.weight_files import EXPORT_KEYS, EXPORT_METADATA
from models.loaded_run import LoadedRun
from models.provenance import training_git


def write_pt(run: LoadedRun, folder: Path) -> str:
    """FOLDER/<run>.pt: `state_dict`, `config`, `step`, `tokenizer`, `image`; see `facts`."""
    path = folder / f"{run.name}.pt"
    torch.save({"state_dict": run.model.state_dict(), **facts(run)}, path)
    return load_lines.ours(path)


def write_safetensors(run: LoadedRun, folder: Path) -> str:
    """FOLDER/model.safetensors with `facts` in its metadata, and the same facts in config.json."""
    path = folder / "model.safetensors"
    state, text = writing.contiguous(run.model.state_dict()), json.dumps(facts(run))
    save_file(state, path, {"format": "pt", EXPORT_METADATA: text})
    writing.write_json(folder / "config.json", facts(run))
    return load_lines.ours(folder)


def facts(run: LoadedRun) -> dict[str, Any]:
    """What weights alone do not say, as plain containers.

    `config`: the `model:` section without starting weights (a Hugging Face text tower is
    described by its full configuration); `step`; `tokenizer`: its name; `image`: `size`, `resize`
    of the shorter side before the centre crop, `interpolation`, `mean` and `std` of RGB in [0, 1];
    `training_git`: see `models.provenance`.
    """
    cfg = run.model.cfg
    config = json.loads(json.dumps(dataclasses.asdict(cfg.without_pretrained())))
    if cfg.text.hf_name is not None:
        hf_config = run.model.text.encoder.config.to_dict()
        config["text"] |= {"hf_name": None, "hf_config": json.loads(json.dumps(hf_config))}
    image = {
        "size": cfg.image.size,
        "resize": cfg.image.size,
        "interpolation": INTERPOLATION,
        "mean": list(cfg.image.mean),
        "std": list(cfg.image.std),
    }
    values = (config, run.step, cfg.text.tokenizer, image)
    return {**dict(zip(EXPORT_KEYS, values, strict=True)), "training_git": training_git(run)}


def build(state: dict[str, Tensor], stored: dict[str, Any], path: Path) -> Model:
    """The model of such a file, in evaluation mode.

    Args:
        state: our names.
        stored: what `weight_files.read` found beside them, with the entries `EXPORT_KEYS`.
        path: the file, for messages.

    Raises:
        DataError: its configuration and its weights do not agree.
    """
    try:
        model = models.build(ModelConfig.from_dict(stored["config"]))
        model.load_state_dict(state)
    except (ConfigError, RuntimeError) as error:
        raise DataError(f"{path}: configuration and weights do not agree: {error}") from error
    return model.eval()
