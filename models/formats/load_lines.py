"""The Python that loads an export, whole lines to be run as they are.

`models.export` prints them; comments among them say what a format leaves out.
"""

from __future__ import annotations

import json
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def ours(path: Path) -> str:
    """Of a file or folder that `models.load` reads, from any folder."""
    return (
        f"import sys; sys.path.insert(0, {_quoted(REPOSITORY)})\n"
        "import models\n"
        f"model, transform, tokenizer = models.load({_quoted(path)})"
    )


def open_clip(folder: Path) -> str:
    """Of an open_clip folder."""
    name = _quoted(f"local-dir:{folder.absolute()}")
    return (
        "import open_clip\n"
        f"model, _, transform = open_clip.create_model_and_transforms({name})\n"
        f"model.eval(); tokenizer = open_clip.get_tokenizer({name})"
    )


def hf(folder: Path) -> str:
    """Of a folder for transformers."""
    return (
        "import transformers\n"
        "model = transformers.VisionTextDualEncoderModel.from_pretrained("
        f"{_quoted(folder)})\n"
        "processor = transformers.VisionTextDualEncoderProcessor.from_pretrained("
        f"{_quoted(folder)})\n"
        "transform, tokenizer = processor.image_processor, processor.tokenizer"
    )


def timm(folder: Path) -> str:
    """Of a folder for timm."""
    name = _quoted(f"local-dir:{folder.absolute()}")
    return (
        "import timm\n"
        f"model = timm.create_model({name}, pretrained=True, num_classes=0).eval()\n"
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        "# the image tower alone: no texts, so no tokenizer"
    )


def of_folder(folder: Path) -> str | None:
    """Of a folder with a `config.json` of timm or transformers, None for another one."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if content.get("model_type") == "vision-text-dual-encoder":
            return hf(folder)
        return timm(folder) if "architecture" in content else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _quoted(value: Path | str) -> str:
    """A path as a literal of Python, absolute."""
    text = value if isinstance(value, str) else str(value.absolute())
    return json.dumps(text, ensure_ascii=not text.isprintable())
