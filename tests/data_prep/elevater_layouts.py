"""Made-up ELEVATER sets in the layouts of their sources, and reading the shards back."""

import io
import json
import random
import sys
import tarfile
import zipfile
from collections import Counter, defaultdict

import numpy as np
from PIL import Image

from data_prep import elevater

SETS = elevater.read_sets()
RNG = np.random.default_rng(7)


def texts(name):
    content = json.loads((elevater.PROMPTS / f"{name}.json").read_text(encoding="utf-8"))
    return [entry["names"][0] for entry in content["classes"]]


def picture(form="JPEG"):
    """An encoded image of random pixels, 9 x 7; no two are equal."""
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (7, 9, 3), dtype=np.uint8)).save(buffer, form)
    return buffer.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return image.mode, image.size, image.tobytes()


def run(monkeypatch, out, **options):
    """The command itself, in this process."""
    words = ["elevater.py", "--out", str(out)]
    for key, value in options.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    monkeypatch.setattr(sys, "argv", words)
    elevater.main()
    return samples(out)


def samples(out):
    """Members of every sample, read with tarfile: [{extension: bytes}]."""
    found = []
    for path in sorted((out / "shards").glob("*.tar")):
        parts = defaultdict(dict)
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                parts[key][extension] = tar.extractfile(member).read()
        found += parts.values()
    return found


def labelled(found, decode=False):
    """Multiset of (image, class id) of samples; checks that cls and json agree."""
    result = Counter()
    for sample in found:
        (extension,) = set(sample) - {"cls", "json"}
        data = sample[extension]
        about = json.loads(sample["json"])
        assert int(sample["cls"]) == about["label"]
        result[(pixels(data) if decode else data, about["label"])] += 1
    return result


# Rows: (class name, file name, image) of the test split of DTD, but for COCO json.


def as_torchvision(root, rows):
    lines = [f"{name}/{file}" for name, file, _ in rows]
    put(root / "dtd/dtd/labels/test1.txt", "\n".join(lines) + "\n")
    for name, file, data in rows:
        put(root / "dtd/dtd/images" / name / file, data)


def as_class_folders(root, rows):
    for name, file, data in rows:
        put(root / "test" / name / file, data)


def shuffled(rows):
    names = sorted({name for name, _, _ in rows})
    random.Random(3).shuffle(names)
    return names


def as_archive(root, rows, unpacked=False, names=None):
    names = names or shuffled(rows)
    base = root / "classification/dtd_20211007"
    lines = [f"test.zip@my images/{file} {names.index(name)}" for name, file, _ in rows]
    put(base / "test.txt", "\r\n".join(lines) + "\r\n")
    put(base / "labels.txt", "\n".join(names) + "\n")
    if unpacked:
        for _, file, data in rows:
            put(base / "test/my images" / file, data)
        return
    with zipfile.ZipFile(base / "test.zip", "w") as archive:
        for _, file, data in rows:
            archive.writestr(f"my images/{file}", data)


def as_coco(root, rows, names=None, index="test.json"):
    """The archive of a set with COCO json; category ids have gaps and are listed backwards."""
    names = names or shuffled(rows)
    ids = {name: 10 + 3 * i for i, name in enumerate(names)}
    content = {
        "images": [
            {"id": i + 1, "file_name": file, "zip_file": "images.zip"}
            for i, (_, file, _) in enumerate(rows)
        ],
        "annotations": [
            {"id": i, "image_id": i + 1, "category_id": ids[name]}
            for i, (name, _, _) in enumerate(rows)
        ],
        "categories": [{"id": ids[name], "name": name} for name in reversed(names)],
    }
    put(root / index, json.dumps(content))
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for _, file, data in rows:
            archive.writestr(file, data)


def as_dataset(rows, names=None):
    import datasets

    names = names or shuffled(rows)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    columns = {
        "image": [{"bytes": data, "path": file} for _, file, data in rows],
        "label": [names.index(name) for name, _, _ in rows],
    }
    return datasets.Dataset.from_dict(columns, features=features, split="test")


def as_saved(root, rows, names=None):
    import datasets

    datasets.DatasetDict({"test": as_dataset(rows, names)}).save_to_disk(root)


def as_parquet(root, rows, test="test-0000{}-of-00002.parquet"):
    (root / test).parent.mkdir(parents=True)
    half = len(rows) // 2
    names = shuffled(rows)
    as_dataset(rows[:half], names).to_parquet(root / test.format(0))
    as_dataset(rows[half:], names).to_parquet(root / test.format(1))
    as_dataset(rows[:3], names).to_parquet(root / "train-00000-of-00001.parquet")


LAYOUTS = {
    "torchvision": ("torchvision", as_torchvision),
    "class folders": ("folder", as_class_folders),
    "archive": ("folder", as_archive),
    "unpacked archive": ("folder", lambda root, rows: as_archive(root, rows, unpacked=True)),
    "save_to_disk": ("hf", as_saved),
    "parquet": ("hf", as_parquet),
    "parquet folders": ("hf", lambda root, rows: as_parquet(root, rows, "test/000{}.parquet")),
}
