"""Export to a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads.

Names and fields: open_clip 3.3.0, open_clip/model.py (CustomTextCLIP, CLIPVisionCfg, CLIPTextCfg),
timm_model.py (`visual.trunk`, `visual.head.proj`), transformer.py (TextTransformer), hf_model.py
(`text.transformer`, `text.proj`), transform.py (PreprocessCfg).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import AutoTokenizer

from engine import export_formats as formats
from loaders.errors import ConfigError
from models.config import ModelConfig, TextConfig
from models.open_clip_config import CONFIG_FILE, HF_POOLERS, LOCAL_PREFIX
from models.open_clip_weights import text_to_clip
from models.weights import LoadedRun

WEIGHTS_FILE = "open_clip_model.safetensors"
TIMM_FOLDER = "timm"
# open_clip/hf_configs.py, arch_dict: encoders that open_clip can wrap.
HF_ENCODERS = ("bert", "roberta", "xlm-roberta")


def write(run: LoadedRun, folder: Path) -> str:
    """FOLDER/{open_clip_config.json, open_clip_model.safetensors} and what they refer to.

    open_clip builds a timm tower by its name alone. A tower with other arguments is described in
    FOLDER/timm/config.json, and a Hugging Face text tower in FOLDER/config.json; the configuration
    then holds their absolute path, which must be rewritten when the folder moves.

    Raises:
        ConfigError: names the part that open_clip cannot express.
    """
    cfg, model = formats.model_config(run), run.model
    preprocess = {
        "size": cfg.image.size,
        "mode": "RGB",
        "mean": list(cfg.image.mean),
        "std": list(cfg.image.std),
        "interpolation": formats.INTERPOLATION,
        "resize_mode": "shortest",
    }
    model_cfg = {
        "embed_dim": cfg.embed_dim,
        # The text transformer's; timm towers have their own activation.
        "quick_gelu": True,
        "custom_text": True,
        "vision_cfg": _vision(run, cfg, folder),
        "text_cfg": _text(run, cfg.text, folder),
    }
    state = {f"visual.trunk.{name}": value for name, value in _trunk(run, model_cfg).items()}
    state["visual.head.proj.weight"] = model.image_projection.weight
    state |= {f"text.{name}": value for name, value in _text_state(model, cfg.text).items()}
    # open_clip knows no bound: store the value as it acts, and 0-D as open_clip has it.
    state["logit_scale"] = model.scale().log().reshape(())
    save_file(formats.contiguous(state), folder / WEIGHTS_FILE, {"format": "pt"})
    content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    formats.write_json(folder / CONFIG_FILE, content)
    bound = str(folder.resolve()) in json.dumps(content)
    return f'open_clip.create_model_and_transforms("{LOCAL_PREFIX}{folder}")' + (
        f"\n{CONFIG_FILE} holds this folder's absolute path: rewrite it after moving"
        if bound
        else ""
    )


def _vision(run: LoadedRun, cfg: ModelConfig, folder: Path) -> dict[str, Any]:
    trunk = run.model.image.trunk
    name, arguments = formats.architecture(trunk)
    if formats.architecture(timm.create_model(name, num_classes=0)) != (name, arguments):
        save_for_hf(formats.plain_trunk(run), folder / TIMM_FOLDER, safe_serialization=True,
                    data_config=formats.data_config(run))  # fmt: skip
        # Its weights are in open_clip's own file.
        (folder / TIMM_FOLDER / "model.safetensors").unlink()
        name = f"{LOCAL_PREFIX}{(folder / TIMM_FOLDER).resolve()}"
    return {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "",  # the network's own
        "timm_proj": "linear",
        "image_size": cfg.image.size,
    }


def _trunk(run: LoadedRun, model_cfg: dict[str, Any]) -> dict[str, Tensor]:
    """The trunk's weights, tried in a trunk that is built as open_clip/timm_model.py builds it.

    Raises:
        ConfigError: open_clip's trunk has other weights or gives other features.
    """
    trunk = timm.create_model(model_cfg["vision_cfg"]["timm_model_name"])
    trunk.reset_classifier(0)
    state = formats.trunk_state(run, trunk)
    try:
        trunk.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"open_clip builds another image tower: {error}") from error
    if trunk.num_features != run.model.image_width:
        raise ConfigError(
            f"image tower '{formats.model_config(run).image.name}': open_clip expects pooled "
            f"features of width {trunk.num_features}, they have {run.model.image_width}; "
            "it cannot express this tower"
        )
    formats.require_same_images(run, trunk, "open_clip")
    return state


def _text(run: LoadedRun, text: TextConfig, folder: Path) -> dict[str, Any]:
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


def _text_state(model: nn.Module, text: TextConfig) -> dict[str, Tensor]:
    encoder = model.text.encoder.state_dict()
    if text.name == "hf":
        state = {f"transformer.{name}": value for name, value in encoder.items()}
        return state | {"proj.weight": model.text_projection.weight}
    return text_to_clip(encoder) | {"text_projection": model.text_projection.weight.T}
