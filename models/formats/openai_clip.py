"""State dicts of OpenAI's CLIP, which come without a configuration; theirs is read off the shapes.

Source: openai/CLIP, clip/model.py, build_model. Their names are open_clip's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.formats.official_unicl import HEAD_WIDTH

# Entries that OpenAI's archives keep among the weights (openai/CLIP, clip/model.py, build_model).
SIZES = ("input_resolution", "context_length", "vocab_size")


def is_openai(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is one of OpenAI's, which keep three sizes among the weights."""
    return all(name in state for name in SIZES)


def config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """open_clip's configuration of an OpenAI state dict, read off the shapes.

    Source: openai/CLIP, clip/model.py, build_model. QuickGELU and heads of width 64 throughout.
    """

    def count(pattern: str) -> int:
        return len({match.group(1) for name in state if (match := re.match(pattern, name))})

    vision: dict[str, Any] = {"image_size": int(state["input_resolution"])}
    if "visual.proj" in state:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        blocks = count(r"visual\.transformer\.resblocks\.(\d+)\.")
        vision |= {"width": width, "layers": blocks, "patch_size": patch}
    else:
        stages = [count(rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, 5)]
        width = state["visual.layer1.0.conv1.weight"].shape[0]
        vision |= {"width": width, "layers": stages}
    text_width, embed_dim = state["text_projection"].shape
    text = {
        "width": text_width,
        "heads": text_width // HEAD_WIDTH,
        "layers": count(r"transformer\.resblocks\.(\d+)\."),
        "context_length": state["positional_embedding"].shape[0],
        "vocab_size": state["token_embedding.weight"].shape[0],
    }
    model = {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    return {"model_cfg": model, "preprocess_cfg": {}}
