"""open_clip's configuration of a CLIP model, and OpenAI's shapes, as our `model:` section.

The configuration is the `model_cfg` and `preprocess_cfg` of `open_clip_config.json` (fields and
their defaults: open_clip 3.3.0, open_clip/model.py, CLIPVisionCfg and CLIPTextCfg, and
open_clip/transform.py, PreprocessCfg). OpenAI's state dicts come without one; theirs is read off
the shapes as in openai/CLIP, clip/model.py, build_model.

What decides the features and has no counterpart in our towers is refused by name: SigLIP and CoCa
models, attentional or average pooling of the native ViT, layer scale, projections with a bias or a
hidden layer, text towers without causal mask or pooled elsewhere than at the end token.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from loaders.errors import ConfigError, DataError
from models.config import ImageConfig, ModelConfig, TextConfig
from models.official_unicl import HEAD_WIDTH

CONFIG_FILE = "open_clip_config.json"
LOCAL_PREFIX = "local-dir:"
# open_clip/constants.py: channel statistics of OpenAI's training set, the default of open_clip.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# nn.LayerNorm's own epsilon, which both projects use unless the configuration says otherwise.
CLIP_EPS = 1e-5
# Entries that OpenAI's archives keep among the weights (openai/CLIP, clip/model.py, build_model).
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")

# (width, blocks per stage) of CLIP's ModifiedResNet -> timm's name (open_clip/model_configs and
# timm/models/byobnet.py, model_cfgs).
RESNETS = {
    (64, (3, 4, 6, 3)): "resnet50_clip",
    (64, (3, 4, 23, 3)): "resnet101_clip",
    (80, (4, 6, 10, 6)): "resnet50x4_clip",
    (96, (6, 8, 18, 8)): "resnet50x16_clip",
    (128, (3, 15, 36, 10)): "resnet50x64_clip",
}
# open_clip/hf_model.py, class names of the poolers -> ours.
HF_POOLERS = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "first"}

# Field -> the only value that our towers can express; it is the field's default as well.
BLOCK = dict.fromkeys(
    ("block_type", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner",
     "scale_attn", "scale_fc", "ls_init_value", "act_kwargs", "final_ln_after_pool")
)  # fmt: skip
VISION_TRANSFORMER = BLOCK | {
    "attentional_pool": None, "no_ln_pre": None, "pos_embed_type": "learnable",
    "pool_type": "tok", "norm_kwargs": None,
}  # fmt: skip
TEXT_TRANSFORMER = BLOCK | {
    "embed_cls": None, "no_causal_mask": None, "pool_type": "argmax", "proj_type": "linear",
    "proj_bias": None, "tokenizer_mode": None, "mlp_ratio": 4.0,
}  # fmt: skip
PREPROCESS = {"mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"}


def read_config(folder: Path) -> dict[str, Any]:
    """The content of FOLDER/open_clip_config.json: `model_cfg` and `preprocess_cfg`.

    Raises:
        DataError: not JSON, or without `model_cfg`.
    """
    path = folder / CONFIG_FILE
    try:
        content = json.loads(path.read_bytes())
        model = content["model_cfg"]
        dict(model["vision_cfg"]), dict(model["text_cfg"])
        return {"model_cfg": model, "preprocess_cfg": dict(content.get("preprocess_cfg") or {})}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a configuration of open_clip ({type(error).__name__}: {error})"
        ) from error


def is_openai(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is one of OpenAI's, which keep three sizes among the weights."""
    return all(name in state for name in OPENAI_SIZES)


def openai_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
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


def model_config(config: Mapping[str, Any], folder: Path) -> ModelConfig:
    """Our `model:` section for open_clip's `model_cfg` and `preprocess_cfg`.

    A native ViT becomes timm's `vit_base_patch32_clip[_quickgelu]_224` with its sizes as
    arguments, a ModifiedResNet one of timm's `resnet*_clip`. The text transformer's activation and
    epsilon are not part of the section: see `text_details`.

    Args:
        config: from `read_config` or `openai_config`.
        folder: where tokenizer files lie, and for messages.

    Raises:
        DataError: names the field that our towers cannot express, or that is missing.
    """
    model, where = config["model_cfg"], f"{folder / CONFIG_FILE}: "
    _require(model, {"init_logit_bias": None, "multimodal_cfg": None}, where + "model_cfg")
    try:
        return ModelConfig(
            image=_image_config(model, config["preprocess_cfg"], where),
            text=_text_config(model, folder, where + "text_cfg"),
            embed_dim=model["embed_dim"],
            logit_scale_init=model.get("init_logit_scale", math.log(1 / 0.07)),
        )
    except KeyError as error:
        raise DataError(f"{where}no field {error}") from error
    except (ConfigError, TypeError) as error:
        raise DataError(f"{where}{error}") from error


def text_details(config: Mapping[str, Any]) -> tuple[str, float]:
    """Activation (`quick_gelu` or `gelu`) and LayerNorm epsilon of open_clip's text transformer."""
    model = config["model_cfg"]
    norm = model["text_cfg"].get("norm_kwargs") or {}
    return "quick_gelu" if model.get("quick_gelu") else "gelu", norm.get("eps", CLIP_EPS)


def _require(section: Mapping[str, Any], needed: Mapping[str, Any], where: str) -> None:
    for key, only in needed.items():
        value = section.get(key, only)
        if value != only and (value or only):
            raise DataError(f"{where}.{key} is {value!r}; our towers can only express {only!r}")


def _image_config(
    model: Mapping[str, Any], preprocess: Mapping[str, Any], where: str
) -> ImageConfig:
    _require(preprocess, PREPROCESS, where + "preprocess_cfg")
    vision, where = model["vision_cfg"], where + "vision_cfg"
    size = vision.get("image_size", 224)
    if isinstance(size, list | tuple):
        _require({"image_size": list(size)}, {"image_size": [size[0], size[0]]}, where)
        size = size[0]
    layers, kwargs = vision.get("layers", 12), {}
    if vision.get("timm_model_name"):
        _require(vision, {"timm_proj": "linear", "timm_proj_bias": None}, where)
        name, kwargs = _timm_model(vision["timm_model_name"], size)
    elif isinstance(layers, list | tuple):
        _require(vision, {"head_width": HEAD_WIDTH}, where)
        shape = (vision.get("width", 768), tuple(layers))
        if shape not in RESNETS:
            raise DataError(f"{where}: a ModifiedResNet of {shape} is none of {RESNETS}")
        name = RESNETS[shape]
    else:
        _require(vision, VISION_TRANSFORMER, where)
        name = f"vit_base_patch32_clip_{'quickgelu_' if model.get('quick_gelu') else ''}224"
        width = vision.get("width", 768)
        kwargs = {
            "patch_size": vision.get("patch_size", 16),
            "embed_dim": width,
            "depth": layers,
            "num_heads": width // vision.get("head_width", HEAD_WIDTH),
            "mlp_ratio": vision.get("mlp_ratio", 4.0),
        }
    mean, std = preprocess.get("mean") or CLIP_MEAN, preprocess.get("std") or CLIP_STD
    return ImageConfig(name=name, size=size, kwargs=kwargs, mean=tuple(mean), std=tuple(std))


def _timm_model(name: str, size: int) -> tuple[str, dict[str, Any]]:
    """timm's architecture and arguments; a `local-dir:` folder holds them in its config.json."""
    if not name.startswith(LOCAL_PREFIX):
        return name, {}
    path = Path(name.removeprefix(LOCAL_PREFIX)) / "config.json"
    try:
        content = json.loads(path.read_bytes())
        architecture, arguments = content["architecture"], dict(content.get("model_args") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"vision_cfg.timm_model_name is {name!r}, but {path} cannot be read ({error}). If the "
            f"folder was moved, write its new absolute path into {CONFIG_FILE}"
        ) from error
    # What the tower sets itself must agree with what the folder says.
    own = {"num_classes": 0, "in_chans": 3, "img_size": [size, size]}
    _require({key: arguments.pop(key, value) for key, value in own.items()}, own, str(path))
    return architecture, arguments


def _text_config(model: Mapping[str, Any], folder: Path, where: str) -> TextConfig:
    text = model["text_cfg"]
    # `split_special_tokens` is what our tokenizers do anyway.
    options = {**(text.get("tokenizer_kwargs") or {}), "split_special_tokens": None}
    _require(options, dict.fromkeys(options), where + ".tokenizer_kwargs")
    common = {
        "context_length": text.get("context_length", 77),
        # open_clip reads the tokenizer from the folder itself, whatever its name says.
        "tokenizer": str(folder) if text.get("hf_tokenizer_name") else "clip",
    }
    if text.get("hf_model_name"):
        hf = {"hf_proj_type": text.get("hf_proj_type", "mlp")}
        _require(hf, {"hf_proj_type": "linear"}, where)
        pooler = text.get("hf_pooler_type", "mean_pooler")
        if pooler not in HF_POOLERS:
            raise DataError(f"{where}.hf_pooler_type is {pooler!r}, none of {list(HF_POOLERS)}")
        hf_name, pooling = text["hf_model_name"], HF_POOLERS[pooler]
        return TextConfig(name="hf", hf_name=hf_name, pretrained=False, pooling=pooling, **common)
    _require(text, TEXT_TRANSFORMER, where)
    if others := sorted(set(text.get("norm_kwargs") or {}) - {"eps"}):
        raise DataError(f"{where}.norm_kwargs has {others}; our towers can only express eps")
    return TextConfig(
        width=text.get("width", 512),
        layers=text.get("layers", 12),
        heads=text.get("heads", 8),
        vocab_size=text.get("vocab_size", 49408),
        **common,
    )
