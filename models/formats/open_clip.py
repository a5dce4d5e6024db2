"""Folders that `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads, read and written.

Names and fields: open_clip 3.3.0, open_clip/model.py (CustomTextCLIP, CLIPVisionCfg, CLIPTextCfg),
timm_model.py (`visual.trunk`, `visual.head.proj`), transformer.py (TextTransformer), hf_model.py
(`text.transformer`, `text.proj`), transform.py (PreprocessCfg). The configuration is the matter of
`open_clip_config`, the names of weights that of `open_clip_weights`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.activations import ACT2FN

import models
from loaders.errors import ConfigError, DataError
from models.formats import load_lines, open_clip_config, open_clip_weights, timm_image, writing
from models.formats.open_clip_config import CONFIG_FILE
from models.loaded_run import LoadedRun
from models.two_tower import TwoTower

WEIGHTS_FILE = "open_clip_model.safetensors"


def build(state: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> TwoTower:
    """The model of an open_clip configuration with the weights of `state`.

    Args:
        state: names of open_clip's CLIP or CustomTextCLIP, or of OpenAI's CLIP.
        config: from `open_clip_config.read_config` or `openai_clip.config`.
        folder: where the configuration and tokenizer files lie, for messages.

    Returns:
        The model in evaluation mode, float32, on the CPU; its `cfg` holds the image statistics of
        `preprocess_cfg`, or CLIP's.

    Raises:
        DataError: a part that our towers cannot express, or weights that do not fit; both named.
    """
    cfg = open_clip_config.model_config(config, folder)
    try:
        model = models.build(cfg)
    except ConfigError as error:
        raise DataError(f"{folder}: this model cannot be built here: {error}") from error
    if cfg.text.name == "transformer":
        _set_text_details(model.text, *open_clip_config.text_details(config))
    vision = config["model_cfg"]["vision_cfg"]
    pool = vision.get("timm_pool", "avg") if vision.get("timm_model_name") else ""
    if pool:
        # After construction, as open_clip/timm_model.py does: a ViT keeps its norm before pooling.
        model.image.trunk.reset_classifier(0, global_pool=pool)
    # OpenAI's are in half precision, in which nothing should be computed.
    wide = {name: v.float() if v.is_floating_point() else v for name, v in state.items()}
    try:
        converted = open_clip_weights.from_open_clip(wide, model)
    except KeyError as error:
        raise DataError(f"{folder}: the weights have no {error}") from error
    _fit(model, converted, folder)
    return model.eval()


def _set_text_details(tower: nn.Module, activation: str, eps: float) -> None:
    """Give a text transformer another project's activation and LayerNorm epsilon, in place.

    The `model:` section has no key for either: `models.text_transformer` fixes UniCL's.
    """
    for module in tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
        if hasattr(module, "activation_fn"):
            module.activation_fn = ACT2FN[activation]


def _fit(model: TwoTower, converted: Mapping[str, Tensor], folder: Path) -> None:
    target = model.state_dict()
    shaped = {
        name: value.reshape(target[name].shape)
        if name in target and value.numel() == target[name].numel() == 1
        else value
        for name, value in converted.items()
    }
    wrong = [
        f"{name} (has {tuple(value.shape)}, needed {tuple(target[name].shape)})"
        for name, value in shaped.items()
        if name in target and value.shape != target[name].shape
    ]
    problems = {
        "missing": sorted(set(target) - set(shaped)),
        "unexpected": sorted(set(shaped) - set(target)),
        "wrong shape": wrong,
    }
    listing = [f"{reason}: {', '.join(names)}" for reason, names in problems.items() if names]
    if listing:
        raise DataError(
            f"{folder}: the weights do not fit the configuration (names are ours). "
            + "; ".join(listing)
        )
    model.load_state_dict(shaped)


def write(run: LoadedRun, folder: Path) -> str:
    """FOLDER/{open_clip_config.json, open_clip_model.safetensors} and what they refer to.

    What `open_clip_config.config_of` refers to by absolute path must be rewritten when the folder
    moves.

    Raises:
        ConfigError: names the part that open_clip cannot express.
    """
    content = open_clip_config.config_of(run, folder)
    trunk = _trunk_state(run, content["model_cfg"]["vision_cfg"]["timm_model_name"])
    state = open_clip_weights.to_open_clip(run.model, trunk)
    save_file(writing.contiguous(state), folder / WEIGHTS_FILE, {"format": "pt"})
    writing.write_json(folder / CONFIG_FILE, content)
    bound = str(folder.resolve()) in json.dumps(content)
    moved = f"\n# {CONFIG_FILE} holds this folder's absolute path: rewrite it after moving"
    return load_lines.open_clip(folder) + (moved if bound else "")


def _trunk_state(run: LoadedRun, name: str) -> dict[str, Tensor]:
    """The trunk's weights, tried in a trunk that is built as open_clip/timm_model.py builds it.

    Raises:
        ConfigError: open_clip's trunk has other weights or gives other features.
    """
    trunk = timm.create_model(name)
    trunk.reset_classifier(0)
    state = timm_image.trunk_state(run, trunk)
    try:
        trunk.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"open_clip builds another image tower: {error}") from error
    if trunk.num_features != run.model.image_width:
        raise ConfigError(
            f"image tower '{run.model.cfg.image.name}': open_clip expects pooled "
            f"features of width {trunk.num_features}, they have {run.model.image_width}; "
            "it cannot express this tower"
        )
    timm_image.require_same_images(run, trunk, "open_clip")
    return state
