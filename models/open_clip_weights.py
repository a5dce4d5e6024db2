"""Weights of open_clip and OpenAI CLIP under our names, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import byobnet, vision_transformer
from torch import Tensor, nn
from transformers.activations import ACT2FN

import models
from loaders.errors import ConfigError, DataError
from models import open_clip_config
from models.official_unicl import TEXT_NAMES
from models.two_tower import TwoTower

State = dict[str, Tensor]


def build(state: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> TwoTower:
    """The model of an open_clip configuration with the weights of `state`.

    Args:
        state: names of open_clip's CLIP or CustomTextCLIP, or of OpenAI's CLIP.
        config: from `open_clip_config.read_config` or `openai_config`.
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
        set_text_details(model.text, *open_clip_config.text_details(config))
    vision = config["model_cfg"]["vision_cfg"]
    pool = vision.get("timm_pool", "avg") if vision.get("timm_model_name") else ""
    if pool:
        # After construction, as open_clip/timm_model.py does: a ViT keeps its norm before pooling.
        model.image.trunk.reset_classifier(0, global_pool=pool)
    # OpenAI's are in half precision, in which nothing should be computed.
    wide = {name: v.float() if v.is_floating_point() else v for name, v in state.items()}
    try:
        converted = from_open_clip(wide, model)
    except KeyError as error:
        raise DataError(f"{folder}: the weights have no {error}") from error
    _load(model, converted, folder)
    return model.eval()


def set_text_details(tower: nn.Module, activation: str, eps: float) -> None:
    """Give a text transformer another project's activation and LayerNorm epsilon, in place.

    The `model:` section has no key for either: `models.text_transformer` fixes UniCL's.
    """
    for module in tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
        if hasattr(module, "activation_fn"):
            module.activation_fn = ACT2FN[activation]


def from_open_clip(state: Mapping[str, Tensor], model: TwoTower) -> State:
    """`state` under the names of `model`.

    Sources: open_clip/model.py for the top level (text in CLIP lies there, in CustomTextCLIP under
    `text.`), open_clip/timm_model.py and open_clip/hf_model.py for wrapped towers.

    Raises:
        KeyError: a projection or the temperature is missing.
        DataError: see `_fold_bias`.
    """
    image = {name: value for name, value in state.items() if name.startswith("visual.")}
    others = {*image, *open_clip_config.OPENAI_SIZES}
    text = {name: value for name, value in state.items() if name not in others}
    converted = {"logit_scale": text.pop("logit_scale")}
    trunk, converted["image_projection.weight"] = _image_state(image, model.image.trunk)
    text = {name.removeprefix("text."): value for name, value in text.items()}
    if model.cfg.text.name == "hf":
        converted["text_projection.weight"] = text.pop("proj.weight")
        # Buffers that older transformers stored.
        text.pop("transformer.embeddings.position_ids", None)
        encoder = {name.removeprefix("transformer."): value for name, value in text.items()}
    else:
        # (in, out), multiplied from the right, against nn.Linear's (out, in).
        converted["text_projection.weight"] = text.pop("text_projection").T
        encoder = text_from_clip(text)
    converted |= {f"image.trunk.{name}": value for name, value in trunk.items()}
    return converted | {f"text.encoder.{name}": value for name, value in encoder.items()}


def text_from_clip(state: Mapping[str, Tensor]) -> State:
    """CLIP's text transformer (open_clip/transformer.py) under the names of transformers' CLIP.

    The names are those of the UniCL release (`official_unicl.TEXT_NAMES`) with the blocks under
    `transformer.`; query, key and value are one fused matrix.
    """
    converted = {}
    for name, value in state.items():
        short = name.removeprefix("transformer.")
        for ours, theirs in TEXT_NAMES.items():
            short = short.replace(theirs, ours)
        block, fused, kind = short.partition(".attn.in_proj_")
        if fused:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                converted[f"{block}.self_attn.{part}_proj.{kind}"] = third
        else:
            converted[short] = value
    return converted


def text_to_clip(state: Mapping[str, Tensor]) -> State:
    """The inverse of `text_from_clip`."""
    converted = {}
    for name, value in state.items():
        short = name
        for ours, theirs in TEXT_NAMES.items():
            short = short.replace(ours, theirs)
        if short.startswith("resblocks."):
            short = f"transformer.{short}"
        block, query, kind = short.partition(".self_attn.q_proj.")
        if query:
            parts = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            converted[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            converted[short] = value
    return converted


def _image_state(state: Mapping[str, Tensor], trunk: nn.Module) -> tuple[State, Tensor]:
    """The trunk's weights under timm's names, and the (out, in) projection.

    Native towers are renamed by timm itself (timm/models/vision_transformer.py and byobnet.py,
    checkpoint_filter_fn), which takes the projection for a classifier.
    """
    if any(name.startswith("visual.trunk.") for name in state):
        image = {name.removeprefix("visual.trunk."): value for name, value in state.items()}
        return image, image.pop("visual.head.proj.weight")
    if "visual.proj" in state:
        image = vision_transformer.checkpoint_filter_fn(dict(state), trunk)
        image.pop("head.bias")  # zeros that timm adds
        return image, image.pop("head.weight")
    image = byobnet.checkpoint_filter_fn(dict(state), trunk)
    projection = image.pop("head.proj.weight")
    image["head.v.bias"] = _fold_bias(projection, image.pop("head.proj.bias"), image["head.v.bias"])
    return image, projection


def _fold_bias(weight: Tensor, bias: Tensor, value_bias: Tensor) -> Tensor:
    """The value bias of an attention pooling that takes over the bias of its output projection.

    Attention weights sum to one, so a value bias v adds W v to the output, and our projections
    have no bias: v + x with W x = b, exact when W (out, in) has rank `out`.

    Raises:
        DataError: it has not.
    """
    solution = torch.linalg.lstsq(weight.double(), bias.double()[:, None], driver="gelsd").solution
    left = (weight.double() @ solution)[:, 0] - bias.double()
    if left.abs().max() > 1e-6 * bias.abs().max().clamp(min=1e-6):
        raise DataError(
            "the projection of this ModifiedResNet has a bias that its weight cannot express "
            f"(rank below {len(bias)}), and our projections have none"
        )
    return value_bias + solution[:, 0].float()


def _load(model: TwoTower, converted: State, folder: Path) -> None:
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
