"""Names of weights: open_clip's and OpenAI CLIP's as ours, and ours as open_clip's."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from timm.models import byobnet, vision_transformer
from torch import Tensor, nn

from loaders.errors import DataError
from models.formats import openai_clip
from models.formats.official_unicl import TEXT_NAMES
from models.two_tower import TwoTower

State = dict[str, Tensor]


def from_open_clip(state: Mapping[str, Tensor], model: TwoTower) -> State:
    """`state` under the names of `model`.

    Sources: open_clip/model.py for the top level (text in CLIP lies there, in CustomTextCLIP under
    `text.`), open_clip/timm_model.py and open_clip/hf_model.py for wrapped towers.

    Raises:
        KeyError: a projection or the temperature is missing.
        DataError: see `_fold_bias`.
    """
    image = {name: value for name, value in state.items() if name.startswith("visual.")}
    others = {*image, *openai_clip.SIZES}
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


def to_open_clip(model: TwoTower, trunk: Mapping[str, Tensor]) -> State:
    """A model's weights under the names of open_clip's CustomTextCLIP with a timm image tower.

    Args:
        trunk: the image trunk's, with the shapes that timm gives them.
    """
    encoder = model.text.encoder.state_dict()
    if model.cfg.text.name == "hf":
        text = {f"transformer.{name}": value for name, value in encoder.items()}
        text["proj.weight"] = model.text_projection.weight
    else:
        text = text_to_clip(encoder) | {"text_projection": model.text_projection.weight.T}
    return {
        **{f"visual.trunk.{name}": value for name, value in trunk.items()},
        "visual.head.proj.weight": model.image_projection.weight,
        **{f"text.{name}": value for name, value in text.items()},
        # open_clip knows no bound: store the value as it acts, and 0-D as open_clip has it.
        "logit_scale": model.scale().log().reshape(()),
    }


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
