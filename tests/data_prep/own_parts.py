"""Parts of the tests of own.py: small pictures, the command, and reading back what it wrote."""

import csv
import io
import json
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep import own
from data_prep.verify import verify
from loaders.manifest import ShardSet, open_shards


@cache
def picture(number: int, form: str = "JPEG") -> bytes:
    """An encoded picture of 12 x 10 random pixels; equal numbers give equal bytes."""
    pixels = np.random.default_rng(number).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def put(path: Path, content: bytes = b"x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def folders(place: Path, counts: dict[str, int]) -> dict[str, bytes]:
    """Class folders with so many pictures each; the bytes by path below `place`."""
    names = [f"{group}/{i}.jpg" for group, count in counts.items() for i in range(count)]
    found = {name: picture(number) for number, name in enumerate(names)}
    for name, data in found.items():
        put(place / name, data)
    return found


def write_csv(path: Path, header: list[str], rows: list[list]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def run(monkeypatch, *words) -> None:
    """The command, in this process."""
    monkeypatch.setattr(sys, "argv", ["own.py", *map(str, words)])
    own.main()


def opened(out: Path) -> ShardSet:
    """The set, verified and opened as training does; nothing in it may be bad."""
    assert verify(out).bad == 0
    return open_shards(out)


def sources(shards: ShardSet) -> dict[str, int]:
    """Sample by `source` of its json; no two may be from the same place."""
    found = {shards.read_json(i)["source"]: i for i in range(len(shards))}
    assert len(found) == len(shards)
    return found


def images(shards: ShardSet) -> Counter:
    """Multiset of (class name, image)."""
    return Counter(
        (shards.classes[shards.label(i)].names[0], shards.read_image(i)) for i in range(len(shards))
    )


def tars(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "shards").glob("*.tar")}


def manifest(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_bytes())
