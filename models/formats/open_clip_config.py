"""open_clip's configuration of a CLIP model as our `model:` section, and back.

The configuration is the `model_cfg` and `preprocess_cfg` of `open_clip_config.json` (fields and
their defaults: open_clip 3.3.0, open_clip/model.py, CLIPVisionCfg and CLIPTextCfg, and
open_clip/transform.py, PreprocessCfg).

In reading, what decides the features and has no counterpart in our towers is refused by name:
SigLIP and CoCa models, attentional or average pooling of the native ViT, layer scale, projections
with a bias or a hidden layer, text towers without causal mask or pooled elsewhere than at the end
token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from transformers import AutoTokenizer

from loaders.errors import ConfigError, DataError
from models.config import INTERPOLATION, ImageConfig, ModelConfig, TextConfig
from models.formats import timm_image
from models.formats.official_unicl import HEAD_WIDTH
from models.loaded_run import LoadedRun

CONFIG_FILE = "open_clip_config.json"
LOCAL_PREFIX = "local-dir:"
TIMM_FOLDER = "timm"
# open_clip/constants.py: channel statistics of OpenAI's training set, the default of open_clip.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# nn.LayerNorm's own epsilon, which both projects use unless the configuration says otherwise.
CLIP_EPS = 1e-5
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
# open_clip/hf_configs.py, arch_dict: encoders that open_clip can wrap.
HF_ENCODERS = ("bert", "roberta", "xlm-roberta")

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


def model_config(config: Mapping[str, Any], folder: Path) -> ModelConfig:
    """Our `model:` section for open_clip's `model_cfg` and `preprocess_cfg`.

    A native ViT becomes timm's `vit_base_patch32_clip[_quickgelu]_224` with its sizes as
    arguments, a ModifiedResNet one of timm's `resnet*_clip`. The text transformer's activation and
    epsilon are not part of the section: see `text_details`.

    Args:
        config: from `read_config` or `openai_clip.config`.
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


def config_of(run: LoadedRun, folder: Path) -> dict[str, Any]:
    """The content of FOLDER/open_clip_config.json for a model of ours, and what it refers to.

    open_clip builds a timm tower by its name alone. A tower with other arguments is described in
    FOLDER/timm/config.json, and a Hugging Face text tower in FOLDER/config.json; the configuration
    then holds their absolute path.

    Raises:
        ConfigError: names the text tower that open_clip cannot express.
    """
    cfg = run.model.cfg
    preprocess = {
        "size": cfg.image.size,
        "mode": "RGB",
        "mean": list(cfg.image.mean),
        "std": list(cfg.image.std),
        "interpolation": INTERPOLATION,
        "resize_mode": "shortest",
    }
    model = {
        "embed_dim": cfg.embed_dim,
        # The text transformer's; timm towers have their own activation.
        "quick_gelu": True,
        "custom_text": True,
        "vision_cfg": _vision_section(run, folder),
        "text_cfg": _text_section(run, folder),
    }
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def _vision_section(run: LoadedRun, folder: Path) -> dict[str, Any]:
    trunk = run.model.image.trunk
    name, arguments = timm_image.architecture(trunk)
    if timm_image.architecture(timm.create_model(name, num_classes=0)) != (name, arguments):
        timm_image.save(run, folder / TIMM_FOLDER)
        # Its weights are in open_clip's own file.
        (folder / TIMM_FOLDER / "model.safetensors").unlink()
        name = f"{LOCAL_PREFIX}{(folder / TIMM_FOLDER).resolve()}"
    return {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "",  # the network's own
        "timm_proj": "linear",
        "image_size": run.model.cfg.image.size,
    }


def _text_section(run: LoadedRun, folder: Path) -> dict[str, Any]:
    text = run.model.cfg.text
    section: dict[str, Any] = {"context_length": text.context_length}
    if text.tokenizer != "clip":
        # open_clip reads it from the folder; the entry only has to be there.
        AutoTokenizer.from_pretrained(text.tokenizer).save_pretrained(folder)
        section["hf_tokenizer_name"] = text.tokenizer
        section["tokenizer_kwargs"] = {"split_special_tokens": True}
    if text.name == "transformer":
        return section | {
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            "norm_kwargs": {"eps": run.model.text.encoder.final_layer_norm.eps},
        }
    encoder = run.model.text.encoder
    if encoder.config.model_type not in HF_ENCODERS:
        raise ConfigError(
            f"text tower '{encoder.config.model_type}': open_clip wraps only "
            f"{', '.join(HF_ENCODERS)}; use the format pt or safetensors"
        )
    encoder.config.save_pretrained(folder)
    poolers = {ours: theirs for theirs, ours in HF_POOLERS.items()}
    return section | {
        "hf_model_name": str(folder.resolve()),
        "hf_proj_type": "linear",
        "hf_pooler_type": poolers[text.pooling],
    }
