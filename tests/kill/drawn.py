"""A small set that the killed runs evaluate: what matters is when they do, not what."""

from pathlib import Path

import numpy as np
import yaml

from tests.eval.conftest import drawing, write_set

IMAGES = 150  # more than one batch for each rank, and a last one that is not full


def registry(folder: Path) -> Path:
    """A registry of one set, `drawn`: small images of three classes."""
    random = np.random.default_rng(0)
    samples = [{"png": drawing(i % 3, random), "cls": i % 3} for i in range(IMAGES)]
    write_set(folder / "drawn", "image_label", samples)
    row = {
        "source": "shards",
        "splits": {"test": {"path": str(folder / "drawn"), "samples": IMAGES}},
        "tasks": {"zero_shot": ["top1", "mean_per_class"]}, "classes": None,
        "templates": "clipart", "labelled_only": True, "resize_ratio": 1.0, "optional": False,
        "obtain": "drawn.registry",
    }  # fmt: skip
    path = folder / "registry.yaml"
    path.write_text(yaml.safe_dump({"collections": {}, "datasets": {"drawn": row}}))
    return path
