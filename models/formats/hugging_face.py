"""A folder that plain transformers loads with `from_pretrained`, offline. Written, not read.

The model is a VisionTextDualEncoderModel: timm's tower in a TimmWrapperModel, the text transformer
as a CLIPTextModel, two projections without bias, `logit_scale`. No code travels along. Names:
transformers 5.23.0, models/vision_text_dual_encoder and models/timm_wrapper.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    TimmWrapperConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from loaders import tokenizers
from loaders.errors import ConfigError
from models.formats import load_lines, timm_image, writing
from models.loaded_run import LoadedRun

# tanh(x) = x - x^3/3 + ...: at this scale the identity to float32 precision for |x| < 20. A power
# of two, so that scaling down and up again loses nothing.
LINEAR_RANGE = 2.0**-14


def write(run: LoadedRun, folder: Path) -> str:
    """FOLDER with configuration, weights, tokenizer and image processor.

    Features are `get_image_features(...).pooler_output` and `get_text_features(...)`'s, before
    normalisation. CLIP's tokenizer pads with the end token and does not clean HTML entities, where
    ours pads with 0 and does.

    Raises:
        ConfigError: names the text tower that this model class cannot express.
    """
    model = run.model
    text_config, text_state, text_projection = _text(run)
    architecture, arguments = timm_image.architecture(model.image.trunk)
    arguments.pop("num_classes")  # TimmWrapperModel sets it
    vision_config = TimmWrapperConfig(
        architecture=architecture, model_args=arguments, hidden_size=model.image_width, num_labels=0
    )
    dual = VisionTextDualEncoderModel(
        VisionTextDualEncoderConfig(
            vision_config=vision_config.to_dict(),
            text_config=text_config,
            projection_dim=model.embed_dim,
        )
    )
    trunk = timm_image.trunk_state(run, dual.vision_model.timm_model)
    state = {f"vision_model.timm_model.{name}": value for name, value in trunk.items()}
    state |= {f"text_model.{name}": value for name, value in text_state.items()}
    state["visual_projection.weight"] = model.image_projection.weight
    state["text_projection.weight"] = text_projection
    # There is no bound here: store the value as it acts.
    state["logit_scale"] = model.scale().log().reshape(())
    dual.load_state_dict(state)
    dual.save_pretrained(folder)
    _write_processor(run, folder)
    _require_same(run, folder)
    return load_lines.hf(folder)


def _write_processor(run: LoadedRun, folder: Path) -> None:
    """Tokenizer and evaluation transform, for VisionTextDualEncoderProcessor and the Auto classes.

    The transform is timm's, by TimmWrapperImageProcessor. (CLIPImageProcessor crops one pixel
    beside the centre where the margin is odd.) Its own `save_pretrained` does nothing, so the
    entry is written here.
    """
    text = run.model.cfg.text
    _tokenizer(text.tokenizer, text.context_length).save_pretrained(folder)
    image_processor = {
        "image_processor_type": "TimmWrapperImageProcessor",
        "architecture": timm_image.architecture(run.model.image.trunk)[0],
        "pretrained_cfg": timm_image.data_config(run),
    }
    content = {
        "processor_class": "VisionTextDualEncoderProcessor",
        "image_processor": image_processor,
    }
    writing.write_json(folder / "processor_config.json", content)


def _tokenizer(name: str, context_length: int) -> PreTrainedTokenizerBase:
    options = {"model_max_length": context_length, "split_special_tokens": True}
    if name != "clip":
        return AutoTokenizer.from_pretrained(name, **options)
    # With transformers' own normaliser, where ours cleans the text beforehand and has none.
    backend = tokenizers.build(name, context_length)._backend.backend_tokenizer
    pieces = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in pieces["merges"]]
    return CLIPTokenizer(vocab=pieces["vocab"], merges=merges, **options)


def _text(run: LoadedRun) -> tuple[dict, dict[str, Tensor], Tensor]:
    """Configuration, state dict and projection of the text tower.

    VisionTextDualEncoderModel projects the encoder's `pooler_output`. CLIPTextModel's is the state
    at the end token, as ours. BERT's is tanh(W x + b) of the first token's state x: W is the
    identity times LINEAR_RANGE, b is zero, and the projection is divided by it.

    Raises:
        ConfigError: mean pooling, or an encoder without such a pooler.
    """
    model, text = run.model, run.model.cfg.text
    encoder, projection = model.text.encoder, model.text_projection.weight
    config, state = encoder.config.to_dict(), dict(encoder.state_dict())
    if text.name == "transformer":
        return config, state, projection
    pooler = getattr(AutoModel.from_config(encoder.config), "pooler", None)
    dense, activation = getattr(pooler, "dense", None), getattr(pooler, "activation", None)
    if text.pooling != "first" or dense is None or not isinstance(activation, nn.Tanh):
        raise ConfigError(
            f"text tower '{encoder.config.model_type}' with pooling '{text.pooling}': "
            "VisionTextDualEncoderModel of transformers can only pool the first token, of encoders "
            "with a pooler (BERT, RoBERTa); use the format open_clip, pt or safetensors"
        )
    width = model.text_width
    state["pooler.dense.weight"] = torch.eye(width) * LINEAR_RANGE
    state["pooler.dense.bias"] = torch.zeros(width)
    return config, state, projection / LINEAR_RANGE


@torch.no_grad()
def _require_same(run: LoadedRun, folder: Path) -> None:
    dual = VisionTextDualEncoderModel.from_pretrained(folder).eval()
    text = run.model.cfg.text
    images = writing.random_images(run)
    ids = tokenizers.build(text.tokenizer, text.context_length)(["a", "a photo of a cat. " * 30])
    mask = (ids != getattr(run.model.text, "pad_id", -1)).long()
    for ours, theirs, what in (
        (run.model.encode_image(images), dual.get_image_features(images), "image"),
        (run.model.encode_text(ids), dual.get_text_features(ids, mask), "text"),
    ):
        writing.require_same(ours["feature"], theirs.pooler_output, f"{what} tower, transformers")
