"""A world in small: three drawn data sets with a registry, and an untrained two-tower run."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import save_file

import models
from loaders import manifest

NAMES = ["circle", "square", "cross", "planet"]
SIZE = 32
MODEL = {
    "image": {
        "name": "vit_tiny_patch16_224",
        "size": SIZE,
        "kwargs": {"depth": 1, "embed_dim": 32, "num_heads": 2},
    },
    "text": {"width": 32, "layers": 1, "heads": 2, "context_length": 16},
    "embed_dim": 16,
}


def drawing(label: int, random: np.random.Generator) -> bytes:
    """PNG of a shape (the class) in random colour and place on a noisy ground."""
    image = Image.fromarray(random.integers(150, 255, size=(40, 40, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(image)
    x, y = random.integers(2, 16, size=2).tolist()
    color = tuple(random.integers(0, 200, size=3).tolist())
    if label == 0:
        draw.ellipse((x, y, x + 20, y + 20), fill=color)
    elif label == 1:
        draw.rectangle((x, y, x + 20, y + 20), fill=color)
    else:
        draw.line((x, y, x + 20, y + 20), fill=color, width=4)
        draw.line((x + 20, y, x, y + 20), fill=color, width=4)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def write_set(folder: Path, kind: str, samples: list[dict]) -> None:
    """Two tars and a manifest; a sample is {"png": bytes, "txt": str, "cls": int}, all optional."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    half = len(samples) // 2 + 1
    for number, part in enumerate((samples[:half], samples[half:])):
        with tarfile.open(folder / "shards" / f"{number:05d}.tar", "w") as tar:
            for i, sample in enumerate(part):
                for suffix, value in sample.items():
                    data = value if isinstance(value, bytes) else str(value).encode()
                    info = tarfile.TarInfo(f"{number:05d}{i:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    classes = [{"id": i, "synset": None, "names": [name, "x"]} for i, name in enumerate(NAMES)]
    manifest.write_manifest(
        folder, folder.name, kind, classes, "drawn", "CC0", "2026-01-01", len(samples)
    )


ONE_TOWER = {"kind": "one_tower"}  # of MODEL: words go through the blocks of its image tower


def write_run(folder: Path, seed: int, step: int = 7, **changes) -> Path:
    """Run folder with one checkpoint of a randomly initialised model, MODEL with `changes`."""
    torch.manual_seed(seed)
    settings = {**MODEL, **changes}
    model = models.build(settings)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # larger than the usual start, so that features differ
            torch.nn.init.normal_(parameter, std=0.5)
    checkpoint = folder / "checkpoints" / f"step_{step:07d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    state = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, checkpoint / "model.safetensors")
    (folder / "checkpoints" / "LAST_GOOD").write_text(checkpoint.name)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"name": f"config_{seed}", "model": settings})
    )
    log = [
        {"step": s, "samples": 64 * s, "loss": 5 / s, "floor": 1 / s, "mean_positives": 2.0}
        for s in range(1, step + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Folder with sets `drawn_train`, `drawn_test`, `registry.yaml` and the run `runs/tiny`."""
    root = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    for name, n in (("train", 45), ("test", 23)):
        samples = []
        for i in range(n):
            label = i % 3
            # Five distinct captions; "A Circle 0" and "a  circle 0" differ in case and space only.
            text = f"{'A' if i % 2 else 'a '} {NAMES[label]} {i % 5 // 3}".strip()
            sample = {"png": drawing(label, random), "txt": text}
            samples.append(sample | ({"cls": label} if i % 7 else {}))
        write_set(root / f"drawn_{name}", "image_text", samples)
    test = {"path": str(root / "drawn_test"), "samples": None}
    common = {
        "source": "shards",
        "classes": None,
        "resize_ratio": 1.0,
        "optional": False,
        "obtain": "make toys",
    }
    retrieval = [f"{d}_r{k}" for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    rows = {
        "toy_classes": {
            "splits": {
                "train": {"path": str(root / "drawn_train"), "samples": None},
                "test": {**test, "samples": sum(1 for i in range(23) if i % 7)},
            },
            "tasks": {
                "zero_shot": ["top1", "top5", "mean_per_class"],
                "linear_probe": ["top1", "mean_per_class"],
            },
            "templates": "clipart",
            "labelled_only": True,
            **common,
        },
        "toy_captions": {
            "splits": {"test": {**test, "samples": 23}},
            "tasks": {"retrieval": ["mean_recall", *retrieval]},
            "templates": None,
            "labelled_only": False,
            **common,
        },
    }
    registry = {"collections": {"toys": list(rows)}, "datasets": rows}
    (root / "registry.yaml").write_text(yaml.safe_dump(registry, sort_keys=False))
    write_run(root / "runs" / "tiny", seed=0)
    return root
