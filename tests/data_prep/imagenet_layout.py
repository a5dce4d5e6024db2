"""Made-up ImageNet archives and a development kit in the official layout."""

import functools
import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads((ROOT / "prompts" / "imagenet1k.json").read_text())["classes"]
VAL = 120
SYNSETS = [entry["synset"] for entry in TABLE]


@functools.cache
def picture(seed: int, form: str = "JPEG", mode: str = "RGB") -> bytes:
    """A small image, its colours drawn from `seed`."""
    draw = np.random.default_rng(seed)
    size = (int(draw.integers(4, 12)), int(draw.integers(4, 12)))
    pixels = draw.integers(0, 256, (*size[::-1], 4 if mode == "CMYK" else 3), dtype=np.uint8)
    file = io.BytesIO()
    image = Image.frombytes(mode, size, pixels.tobytes())
    image.save(file, form)
    return file.getvalue()


def pack(files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar with these files, in their order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_339_000_000
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def train_images(synsets=SYNSETS, count=lambda i: 1 + i % 2) -> dict[str, dict[str, bytes]]:
    """WNID -> file name -> bytes. One PNG named .JPEG and CMYK files are there, as in the set."""
    images = {}
    for i, synset in enumerate(synsets):
        names = [f"{synset}_{10 * i + k}.JPEG" for k in range(count(i))]
        images[synset] = {name: picture(10 * i + k) for k, name in enumerate(names)}
    first, second = list(images)[:2]
    images[first][f"{first}_9.JPEG"] = picture(1, "PNG")
    images[second][f"{second}_9.JPEG"] = picture(2, "JPEG", "CMYK")
    return images


def train_tar(images, order=None, form: int = tarfile.GNU_FORMAT) -> bytes:
    """The tar of class tars; `order`: of the classes in it."""
    classes = {f"{synset}.tar": pack(images[synset], form) for synset in order or images}
    return pack(classes, form)


def unpack(images, folder: Path) -> Path:
    """Class folders."""
    for synset, files in images.items():
        (folder / synset).mkdir(parents=True)
        for name, data in files.items():
            (folder / synset / name).write_bytes(data)
    return folder


def val_images(count: int) -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{i + 1:08d}.JPEG": picture(i) for i in range(count)}


def devkit_ids(seed: int = 7) -> dict[str, int]:
    """WNID -> ILSVRC2012_ID, which is not the rank of the WNID."""
    order = np.random.default_rng(seed).permutation(len(SYNSETS))
    return {SYNSETS[rank]: number for number, rank in enumerate(order, 1)}


@functools.cache
def meta_mat(ids: tuple[tuple[str, int], ...]) -> bytes:
    """meta.mat: a MATLAB struct array, leaves first, then 860 inner nodes."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children"]
    fields += ["wordnet_height", "num_train_images"]
    rows = []
    for synset, number in sorted(ids, key=lambda item: item[1]):
        rows.append((number, synset, "a, b", "c", 0, np.zeros((1, 0)), 0, 1300))
    for i in range(860):
        number = len(ids) + i + 1
        rows.append((number, f"n9{i:07d}", "d", "e", 2, np.array([[1.0, 2.0]]), 3, 0))
    array = np.empty((len(rows), 1), dtype=[(field, object) for field in fields])
    for i, row in enumerate(rows):
        array[i, 0] = tuple(float(v) if isinstance(v, int) else v for v in row)
    file = io.BytesIO()
    scipy.io.savemat(file, {"synsets": array}, do_compression=True)
    return file.getvalue()


def devkit(path: Path, truth: list, ids: dict[str, int] | None = None, meta=None) -> Path:
    """ILSVRC2012_devkit_t12.tar.gz; `truth`: the lines of the ground truth."""
    files = {
        "readme.txt": b"",
        "data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{x}\n" for x in truth).encode(),
        "data/meta.mat": meta_mat(tuple((ids or devkit_ids()).items())) if meta is None else meta,
    }
    folder = "ILSVRC2012_devkit_t12/"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(folder + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def archives(path: Path) -> Path:
    """train.tar (class tars in no order), val.tar of `VAL` images, and devkit.tar.gz in `path`."""
    images, ids = train_images(), devkit_ids()
    order = list(images)
    random.Random(0).shuffle(order)
    (path / "train.tar").write_bytes(train_tar(images, order))
    (path / "val.tar").write_bytes(pack(val_images(VAL)))
    devkit(path / "devkit.tar.gz", [list(ids.values())[i * 7 % 1000] for i in range(VAL)], ids)
    return path
