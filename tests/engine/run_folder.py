"""Run folders of small random models, whose every weight and statistic matters to the features."""

from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from transformers import BertTokenizerFast

import models

TEXT = {"width": 32, "layers": 2, "heads": 2}
IMAGES = {
    "vit": {
        "name": "vit_tiny_patch16_224", "size": 32,
        "kwargs": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    },
    "swin": {
        "name": "swin_tiny", "size": 32,
        "kwargs": {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4,
                   "drop_path_rate": 0.2},
    },
    "resnet": {"name": "test_resnet", "size": 48},
}  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz .&"]
BERT = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "vocab_size": 80, "max_position_embeddings": 40,
}  # fmt: skip
# From nothing to far more than 77 tokens.
TEXTS = ["", "A photo of a cat.", "naïve café 😀 2 > 1!", "several words " * 7, "word " * 200]


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Draw all parameters and batch norm statistics anew; evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "logit_scale" in name or not value.is_floating_point() or "mask" in name:
                continue
            noise = torch.randn(value.shape, generator=generator)
            if "running_var" in name:
                value.copy_(0.5 + noise.abs())
            elif value.ndim == 1 and name.endswith("weight"):
                value.copy_(1 + 0.2 * noise)
            elif value.ndim == 1:
                value.copy_(0.3 * noise)
            else:  # outputs as large as inputs, so that deep towers forget none of their weights
                value.copy_(noise / value[0].numel() ** 0.5)
    return model.eval()


def write(
    folder: Path, image: str = "vit", text: dict | None = None, **settings
) -> torch.nn.Module:
    """A run folder with one checkpoint after step 7; returns its model."""
    config = {
        "image": {**IMAGES.get(image, {"name": image, "size": 48}), "mean": [0.4, 0.5, 0.6]},
        "text": text or TEXT,
        "embed_dim": 24,
        **settings,
    }
    model = randomize(models.build(config))
    checkpoint = folder / "checkpoints" / "step_0000007"
    checkpoint.mkdir(parents=True)
    state = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    save_file({**state, "method.bank": torch.zeros(2)}, checkpoint / "model.safetensors")
    (folder / "checkpoints" / "LAST_GOOD").write_text(checkpoint.name)
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "tiny", "model": config}))
    return model


def bert_text(folder: Path, pooling: str) -> dict:
    """A text section with a BERT encoder and a tokenizer of single letters, written to `folder`."""
    folder.mkdir(exist_ok=True)
    pieces = [*WORDS, *(f"##{letter}" for letter in WORDS[5:31])]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return {
        "name": "hf", "hf_config": BERT, "pooling": pooling, "tokenizer": str(folder),
        "context_length": 40,
    }  # fmt: skip
