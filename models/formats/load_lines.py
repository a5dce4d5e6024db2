"""The Python that loads an export, whole lines to be run as they are.

`models.export` prints them and a model card holds them; comments among them say what a format
leaves out. A place is a folder of this machine, or the name of a repository on the hub.
"""

from __future__ import annotations

import json
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def ours(place: Path | str) -> str:
    """Of a file or folder that `models.load` reads, from any folder."""
    if isinstance(place, str):
        return (
            "# in a checkout of the code that it was trained with\n"
            "import huggingface_hub, models\n"
            f"folder = huggingface_hub.snapshot_download({_quoted(place)})\n"
            "model, transform, tokenizer = models.load(folder)"
        )
    return (
        f"import sys; sys.path.insert(0, {_quoted(REPOSITORY)})\n"
        "import models\n"
        f"model, transform, tokenizer = models.load({_quoted(place)})"
    )


def open_clip(place: Path | str) -> str:
    """Of an open_clip folder."""
    name = _quoted(place, "hf-hub:", "local-dir:")
    return (
        "import open_clip\n"
        f"model, _, transform = open_clip.create_model_and_transforms({name})\n"
        f"model.eval(); tokenizer = open_clip.get_tokenizer({name})"
    )


def hf(place: Path | str) -> str:
    """Of a folder for transformers."""
    kind = "transformers.VisionTextDualEncoder"
    return (
        "import transformers\n"
        f"model = {kind}Model.from_pretrained({_quoted(place)})\n"
        f"processor = {kind}Processor.from_pretrained({_quoted(place)})\n"
        "transform, tokenizer = processor.image_processor, processor.tokenizer"
    )


def timm(place: Path | str) -> str:
    """Of a folder for timm."""
    name = _quoted(place, "hf-hub:", "local-dir:")
    return (
        "import timm\n"
        f"model = timm.create_model({name}, pretrained=True, num_classes=0).eval()\n"
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        "# the image tower alone: no texts, so no tokenizer"
    )


OF_FORMAT = {"pt": ours, "safetensors": ours, "open_clip": open_clip, "hf": hf, "timm": timm}


def of_folder(folder: Path) -> str | None:
    """Of a folder with a `config.json` of timm or transformers, None for another one."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if content.get("model_type") == "vision-text-dual-encoder":
            return hf(folder)
        return timm(folder) if "architecture" in content else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _quoted(place: Path | str, hub: str = "", local: str = "") -> str:
    """A place as a literal of Python, a path absolute; `hub` or `local` stands before it."""
    text = hub + place if isinstance(place, str) else local + str(place.absolute())
    return json.dumps(text, ensure_ascii=not text.isprintable())
