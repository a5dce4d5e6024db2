"""Fashion-MNIST from Debian's package: 28-pixel photographs of clothes, bright on black."""

import gzip
import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.clipart.claims_packages import FASHION_MNIST
from data_prep.clipart.packages import read_members
from data_prep.clipart.write import Sample
from loaders.progress import Progress

FOLDER = "usr/share/datasets/fashion-mnist/"
PARTS = {"train": "train", "test": "t10k"}
HEADERS = {"images-idx3": 16, "labels-idx1": 8}  # bytes before the numbers
SIDE = 28
JPEG_QUALITY = 95
VALIDATION = 5000  # of the 60,000 of train, the last
# As the authors' table names them.
CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
    "ankle boot",
)  # fmt: skip


def class_table() -> list[dict]:
    """The ten classes (id, synset, names) in the data's order."""
    return [{"id": i, "synset": None, "names": [name]} for i, name in enumerate(CLASSES)]


def fashion_samples(package: Path) -> dict[str, list[Sample]]:
    """Samples of the parts train (55,000), val (5,000) and test (10,000), 28-pixel RGB JPEGs."""
    wanted = {
        f"{FOLDER}{file}-{kind}-ubyte.gz": (part, kind)
        for part, file in PARTS.items()
        for kind in HEADERS
    }
    arrays = {}
    for name, data in read_members(package, wanted.__contains__):
        part, kind = wanted[name]
        arrays[part, kind] = np.frombuffer(gzip.decompress(data), np.uint8)[HEADERS[kind] :]
    found = {}
    for part, file in PARTS.items():
        images = arrays[part, "images-idx3"].reshape(-1, SIDE, SIDE)
        labels = arrays[part, "labels-idx1"]
        origin = f"{FOLDER}{file}-images-idx3-ubyte.gz"
        pairs = zip(images, labels, strict=True)
        bar = Progress(pairs, desc=f"Fashion-MNIST, {part}", unit="image", total=len(labels))
        found[part] = [
            Sample(
                _jpeg(image),
                None,
                int(label),
                FASHION_MNIST.package.label,
                f"{origin}#{index}",
                CLASSES[label],
            )
            for index, (image, label) in enumerate(bar)
        ]
    found["val"] = found["train"][-VALIDATION:]
    del found["train"][-VALIDATION:]
    return found


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
