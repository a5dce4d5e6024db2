"""Tux Paint stamps: captions and classes for evaluation. GPL-2, so never part of the repository."""

import io
from pathlib import Path

from PIL import Image

from data_prep.clipart.classes import class_ids, stamp_class
from data_prep.clipart.packages import TUXPAINT_STAMPS, read_members
from data_prep.clipart.write import Sample, render
from loaders.progress import Progress

ROOT = "usr/share/tuxpaint/stamps/"
LEFT_OUT = f"{ROOT}symbols/alphabets/"  # letters are no captions


def stamp_samples(package: Path) -> tuple[list[Sample], int]:
    """(samples, number of PNG stamps): a stamp's caption is the first line of its text file."""

    def wanted(name: str) -> bool:
        return name.startswith(ROOT) and name.endswith((".png", ".txt"))

    files = dict(read_members(package, wanted))
    pictures = sorted(name for name in files if name.endswith(".png"))
    ids = class_ids()
    samples, seen = [], set()
    for name in Progress(pictures, desc="Tux Paint stamps", unit="image"):
        text = files.get(name.removesuffix(".png") + ".txt")
        if text is None or name.startswith(LEFT_OUT) or files[name] in seen:
            continue
        seen.add(files[name])
        caption = text.decode().splitlines()[0].strip()
        with Image.open(io.BytesIO(files[name])) as image:
            jpeg = render(image)
        if jpeg is None or not caption:
            continue
        category = stamp_class(name.removeprefix(ROOT))
        label = None if category is None else ids[category]
        samples.append(Sample(jpeg, caption, label, TUXPAINT_STAMPS.label, name, caption))
    return samples, len(pictures)
