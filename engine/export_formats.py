"""Exports of whole models (.pt, safetensors) and of the image tower for timm."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import get_model_args, save_for_hf
from torch import Tensor, nn
from torch.nn import functional as F

from loaders.errors import ConfigError
from models.config import ModelConfig
from models.provenance import training_git
from models.weight_files import EXPORT_KEYS, EXPORT_METADATA
from models.weights import LoadedRun

# Largest difference of unit-length features that counts as rounding. Small models agree to 1e-6,
# deep ones with large weights to a few 1e-5; another function is off by 1e-2 and more.
TOLERANCE = 1e-4
INTERPOLATION = "bicubic"


def write_pt(run: LoadedRun, folder: Path) -> str:
    """FOLDER/<run>.pt: `state_dict`, `config`, `step`, `tokenizer`, `image`; see `facts`."""
    path = folder / f"{run.name}.pt"
    torch.save({"state_dict": run.model.state_dict(), **facts(run)}, path)
    return f'torch.load("{path}", weights_only=True)'


def write_safetensors(run: LoadedRun, folder: Path) -> str:
    """FOLDER/model.safetensors with `facts` in its metadata, and the same facts in config.json."""
    path = folder / "model.safetensors"
    text = json.dumps(facts(run))
    save_file(contiguous(run.model.state_dict()), path, {"format": "pt", EXPORT_METADATA: text})
    write_json(folder / "config.json", facts(run))
    return f'safetensors.torch.load_file("{path}")'


def write_timm(run: LoadedRun, folder: Path) -> str:
    """FOLDER/{config.json, model.safetensors} as timm pushes them to the hub.

    The tower alone, without projection and classifier; `config.json` holds the architecture, its
    arguments and `pretrained_cfg` with the image statistics.

    Raises:
        ConfigError: timm rebuilds another function from these files.
    """
    save_for_hf(plain_trunk(run), folder, safe_serialization=True, data_config=data_config(run))
    name = f"local-dir:{folder}"
    require_same_images(run, timm.create_model(name, pretrained=True), "timm")
    return f'timm.create_model("{name}", pretrained=True, num_classes=0)'


def facts(run: LoadedRun) -> dict[str, Any]:
    """What weights alone do not say, as plain containers.

    `config`: the `model:` section without starting weights (a Hugging Face text tower is
    described by its full configuration); `step`; `tokenizer`: its name; `image`: `size`, `resize`
    of the shorter side before the centre crop, `interpolation`, `mean` and `std` of RGB in [0, 1];
    `training_git`: see `models.provenance`.
    """
    cfg = model_config(run)
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


def model_config(run: LoadedRun) -> ModelConfig:
    """The checked `model:` section of a run."""
    return ModelConfig.from_dict(run.cfg["model"])


def architecture(trunk: nn.Module) -> tuple[str, dict[str, Any]]:
    """timm's name of a trunk and the arguments that build it, without dropout rates."""
    return trunk.pretrained_cfg["architecture"], get_model_args(trunk)


def data_config(run: LoadedRun) -> dict[str, Any]:
    """timm's description of the evaluation transform: resize to the size, then centre crop."""
    image = model_config(run).image
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
    state = contiguous(run.model.image.trunk.state_dict())
    return {name: value.reshape(()) if name in flat else value for name, value in state.items()}


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a state dict that safetensors takes."""
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def write_json(path: Path, content: Any) -> None:
    """Write `content`, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def random_images(run: LoadedRun) -> Tensor:
    """(2, 3, size, size) noise, the same every time, in the layout that our tower works on."""
    size = model_config(run).image.size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return images.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def require_same_images(run: LoadedRun, trunk: nn.Module, library: str) -> None:
    """Compare pooled image features, unit length, with those of a reloaded trunk.

    Raises:
        ConfigError: shape or values differ.
    """
    images = random_images(run)
    require_same(run.model.image(images)[0], trunk.eval()(images), f"image tower through {library}")


def require_same(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Compare features (b, D) after normalisation.

    Raises:
        ConfigError: shape or values differ.
    """
    same = ours.shape == theirs.shape
    if same:
        difference = (F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)).abs().max().item()
        same = difference <= TOLERANCE
    if not same:
        found = f"differ by {difference:.1e}" if ours.shape == theirs.shape else "differ in shape"
        raise ConfigError(
            f"{what}: the reloaded features {found}, so this model cannot be exported to this "
            "format; use pt or safetensors"
        )
