"""The image tower alone, as timm pushes models to the hub and loads them from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from models.config import INTERPOLATION
from models.formats import load_lines, writing
from models.loaded_run import LoadedRun


def write(run: LoadedRun, folder: Path) -> str:
    """FOLDER/{config.json, model.safetensors} as timm pushes them to the hub.

    The tower alone, without projection and classifier; `config.json` holds the architecture, its
    arguments and `pretrained_cfg` with the image statistics.

    Raises:
        ConfigError: timm rebuilds another function from these files.
    """
    save(run, folder)
    name = f"local-dir:{folder}"
    require_same_images(run, timm.create_model(name, pretrained=True), "timm")
    return load_lines.timm(folder)


def save(run: LoadedRun, folder: Path) -> None:
    """Write the two files, without the comparison."""
    save_for_hf(plain_trunk(run), folder, safe_serialization=True, data_config=data_config(run))


def architecture(trunk: nn.Module) -> tuple[str, dict[str, Any]]:
    """timm's name of a trunk and the arguments that build it, without dropout rates."""
    # By its full name, because timm has it from 1.0.31 on, and only exports need it.
    return trunk.pretrained_cfg["architecture"], timm.models.get_model_args(trunk)


def data_config(run: LoadedRun) -> dict[str, Any]:
    """timm's description of the evaluation transform: resize to the size, then centre crop."""
    image = run.model.cfg.image
    return {
        "input_size": (3, image.size, image.size),
        "interpolation": INTERPOLATION,
        "mean": image.mean,
        "std": image.std,
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


def plain_trunk(run: LoadedRun) -> nn.Module:
    """A fresh timm model with the run's weights; counters have timm's own 0-D shape again."""
    name, arguments = architecture(run.model.image.trunk)
    trunk = timm.create_model(name, **arguments)
    trunk.load_state_dict(trunk_state(run, trunk))
    return trunk.eval()


def trunk_state(run: LoadedRun, like: nn.Module) -> dict[str, Tensor]:
    """The run's trunk weights; those that are 0-D in `like` are 0-D (see `lift_zero_dim`)."""
    flat = {name for name, value in like.state_dict().items() if value.ndim == 0}
    state = writing.contiguous(run.model.image.trunk.state_dict())
    return {name: value.reshape(()) if name in flat else value for name, value in state.items()}


@torch.no_grad()
def require_same_images(run: LoadedRun, trunk: nn.Module, library: str) -> None:
    """Compare pooled image features, unit length, with those of a reloaded trunk.

    Raises:
        ConfigError: shape or values differ.
    """
    images = writing.random_images(run)
    pooled = run.model.image(images)[0]
    writing.require_same(pooled, trunk.eval()(images), f"image tower through {library}")
