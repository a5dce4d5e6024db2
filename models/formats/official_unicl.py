"""The official UniCL release's checkpoints: architecture and names against ours. Read only."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

import models
from loaders.errors import DataError
from models.config import ImageConfig, ModelConfig, TextConfig
from models.two_tower import TwoTower

# (patch embedding width, blocks per stage) -> our preset.
SWIN_LAYOUTS = {(96, (2, 2, 6, 2)): "swin_tiny", (128, (2, 2, 18, 2)): "swin_base"}
# Not stored in any shape: CLIP's convention, which UniCL keeps (width 512, 8 heads).
HEAD_WIDTH = 64

# First part of a key in other releases -> in microsoft/UniCL. K-LITE and ELEVATER say visual and
# text; K-LITE's later module says lang_encoder.
TOP_LEVEL_NAMES = {
    "visual": "image_encoder",
    "text": "text_encoder",
    "lang_encoder": "text_encoder",
    "vision_projection": "image_projection",
    "lang_projection": "text_projection",
}
# Buffers that the original Swin stores and timm recomputes.
DERIVED_BUFFERS = (".relative_position_index", ".attn_mask")

# Part of our text tower's names -> of the release's.
TEXT_NAMES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "resblocks.",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


def build(stored: Mapping[str, Tensor], path: Path, allow_partial: bool = False) -> TwoTower:
    """The model of a release's state dict, in evaluation mode; prints what matched.

    Args:
        stored: either naming.
        path: the file, for messages.
        allow_partial: load what fits and leave the rest as initialised.

    Raises:
        DataError: not such a checkpoint, or, without `allow_partial`, tensors that do not fit.
    """
    state = official_names(stored)
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


def official_names(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A release's state dict under the names of microsoft/UniCL, derived buffers left out."""
    state = {}
    for key, value in stored.items():
        top, dot, rest = key.partition(".")
        name = TOP_LEVEL_NAMES.get(top, top) + dot + rest
        if not name.endswith(DERIVED_BUFFERS):
            state[name] = value
    return state


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, name) for name in state)
    return len({match.group(1) for match in found if match})


def infer_config(state: Mapping[str, Tensor], path: Path) -> ModelConfig:
    """Read the architecture off the shapes; see `HEAD_WIDTH` for the one thing not in them.

    Raises:
        DataError: the tensors that decide it are absent, or the image tower is not Swin-T or -B.
    """
    try:
        swin_width = state["image_encoder.patch_embed.proj.weight"].shape[0]
        vocab_size, text_width = state["text_encoder.token_embedding.weight"].shape
        context_length = state["text_encoder.positional_embedding"].shape[0]
        embed_dim = state["image_projection"].shape[1]
    except KeyError as error:
        raise DataError(
            f"{path}: no tensor {error}, so this is not a UniCL checkpoint with a Swin image "
            f"tower; its keys begin with {sorted({name.split('.')[0] for name in state})}"
        ) from None
    depths = tuple(
        _count(state, rf"image_encoder\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(4)
    )
    preset = SWIN_LAYOUTS.get((swin_width, depths))
    if preset is None:
        raise DataError(
            f"{path}: image tower of width {swin_width} with {depths} blocks is none of "
            f"{SWIN_LAYOUTS}"
        )
    return ModelConfig(
        image=ImageConfig(name=preset),
        text=TextConfig(
            width=text_width,
            layers=_count(state, r"text_encoder\.resblocks\.(\d+)\."),
            heads=text_width // HEAD_WIDTH,
            context_length=context_length,
            vocab_size=vocab_size,
        ),
        embed_dim=embed_dim,
    )


def _official_source(name: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Where the release keeps our parameter `name`: its key, and how to cut it out of there."""
    if name == "logit_scale":
        return name, lambda stored: stored.reshape(1)
    if name in ("image_projection.weight", "text_projection.weight"):
        # The release multiplies from the right: (in, out) instead of nn.Linear's (out, in).
        return name.removesuffix(".weight"), lambda stored: stored.T
    if name.startswith("image.trunk."):
        # timm counts a downsampling to the stage it leads into, the original to the one before.
        return re.sub(
            r"layers\.(\d+)\.downsample",
            lambda match: f"layers.{int(match.group(1)) - 1}.downsample",
            "image_encoder." + name.removeprefix("image.trunk."),
        ), lambda stored: stored
    short = name.removeprefix("text.encoder.")
    for ours, theirs in TEXT_NAMES.items():
        short = short.replace(ours, theirs)
    fused = re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", short)
    if fused is None:
        return "text_encoder." + short, lambda stored: stored
    block, part, kind = fused.groups()
    third = "qkv".index(part)
    return f"text_encoder.{block}.attn.in_proj_{kind}", lambda stored: stored.chunk(3)[third]


def convert(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Our state dict out of the release's, and the official names that do not fit, by reason.

    Args:
        state: the release's tensors, from `official_names`.
        target: our model's state dict, for its names and shapes.

    Returns:
        the tensors under our names, and the names that are missing, unexpected or of the wrong
        shape. q, k and v come from one fused matrix, whose name is listed once.
    """
    converted: dict[str, Tensor] = {}
    missing, wrong_shape, expected = [], [], set()
    for name, parameter in target.items():
        source, cut = _official_source(name)
        expected.add(source)
        if source not in state:
            missing.append(source)
        elif (value := cut(state[source])).shape != parameter.shape:
            shapes = f"{tuple(value.shape)}, needed {tuple(parameter.shape)}"
            wrong_shape.append(f"{source} (has {shapes})")
        else:
            converted[name] = value
    problems = {
        "missing": list(dict.fromkeys(missing)),  # q, k and v miss the same fused key
        "unexpected": sorted(set(state) - expected),
        "wrong shape": list(dict.fromkeys(wrong_shape)),
    }
    return converted, problems
