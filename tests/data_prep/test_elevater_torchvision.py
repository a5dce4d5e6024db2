"""ELEVATER's sets through torchvision's classes, and the targets that are derived: VOC, KITTI."""

import csv
import json
import random
import struct
import zipfile
from collections import Counter

import numpy as np
import pytest
from scipy.io import savemat

from data_prep.archives import elevater_targets
from data_prep.sets import set_folder
from loaders.errors import DataError
from loaders.manifest import open_shards
from tests.data_prep.elevater_layouts import RNG, SETS, labelled, picture, pixels, put, run, texts

# Layouts of torchvision. Each writer returns [(image bytes, class text)].


def write_food(root):
    rows = {n.replace(" ", "_"): f"{i}" for i, n in enumerate(texts("food-101"))}
    order = list(rows.items())
    random.Random(4).shuffle(order)
    listing = {name: [f"{name}/{number}"] for name, number in order}
    put(root / "food-101/meta/test.json", json.dumps(listing))
    expected = []
    for name, number in order:
        expected.append((picture(), name.replace("_", " ")))
        put(root / f"food-101/images/{name}/{number}.jpg", expected[-1][0])
    return expected


def write_country(root):
    expected = []
    for code, text in SETS["country211"]["aliases"].items():
        expected.append((picture(), text))
        put(root / f"country211/test/{code}/1.jpg", expected[-1][0])
    return expected


def write_aircraft(root):
    names = {"F-16A-B": "F-16A/B", "F-A-18": "F/A-18"}
    variants = [names.get(n, n) for n in texts("fgvc-aircraft-2013b-variants102")]
    random.Random(6).shuffle(variants)
    back = {value: key for key, value in names.items()}
    base = root / "fgvc-aircraft-2013b/data"
    put(base / "variants.txt", "\n".join(variants) + "\n")
    lines, expected = [], []
    for i, name in enumerate(reversed(variants)):
        expected.append((picture(), back.get(name, name)))
        put(base / f"images/{i:07d}.jpg", expected[-1][0])
        lines.append(f"{i:07d} {name}")
    put(base / "images_variant_test.txt", "\n".join(lines) + "\n")
    return expected


def write_pets(root):
    lines, expected = [], []
    for number, name in enumerate(texts("oxford-iiit-pets"), 1):
        image = "_".join(name.lower().split()) + "_1"
        expected.append((picture(), name))
        put(root / f"oxford-iiit-pet/images/{image}.jpg", expected[-1][0])
        lines.append(f"{image} {number} 1 1")
    random.Random(9).shuffle(lines)
    put(root / "oxford-iiit-pet/annotations/test.txt", "\n".join(lines) + "\n")
    return expected


def write_sst2(root):
    expected = []
    for name in ("negative", "positive"):
        for i in range(3):
            expected.append((picture("PNG"), name))
            put(root / f"rendered-sst2/test/{name}/{i}.png", expected[-1][0])
    return expected


def write_cars(root):
    """The official order of the classes, which is not the texts'; slash as in cars_meta.mat."""
    texts_ = texts("stanford-cars")
    names = sorted(texts_, key=lambda n: (n != "AM General Hummer SUV 2000", n))
    official = ["Ram C/V Cargo Van Minivan 2012" if n.startswith("Ram C V") else n for n in names]
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit/cars_meta.mat", {"class_names": np.array([official], dtype=object)})
    record = np.dtype([("class", object), ("fname", object)])
    rows, expected = np.empty((1, 196), dtype=record), []
    for i in range(196):
        rows[0, i] = (i + 1, f"{i:05d}.jpg")
        expected.append((picture(), names[i]))
        put(base / f"cars_test/{i:05d}.jpg", expected[-1][0])
    savemat(base / "cars_test_annos_withlabels.mat", {"annotations": rows})
    return expected


WRITERS = {
    "food-101": write_food,
    "country211": write_country,
    "fgvc-aircraft-2013b-variants102": write_aircraft,
    "oxford-iiit-pets": write_pets,
    "rendered-sst2": write_sst2,
    "stanford-cars": write_cars,
}


@pytest.mark.parametrize("name", WRITERS)
def test_torchvision_files_are_passed_through(name, tmp_path, monkeypatch):
    expected = WRITERS[name](tmp_path / "in")
    options = {"set": name, "split": "test", "from": "torchvision", "root": tmp_path / "in"}
    found = run(monkeypatch, tmp_path / "out", **options, expected_images=len(expected))
    assert labelled(found) == Counter((data, texts(name).index(text)) for data, text in expected)


@pytest.mark.parametrize("split", ["train", "test"])
def test_gtsrb_ppm_become_png_without_loss(split, tmp_path, monkeypatch):
    expected, rows = Counter(), []
    for number in range(43):
        data = picture("PPM")
        expected[(pixels(data), number)] += 1
        if split == "train":
            put(tmp_path / f"in/gtsrb/GTSRB/Training/{number:05d}/0.ppm", data)
        else:
            put(tmp_path / f"in/gtsrb/GTSRB/Final_Test/Images/{number:05d}.ppm", data)
            rows.append({"Filename": f"{number:05d}.ppm", "ClassId": number})
    if rows:
        with open(tmp_path / "in/gtsrb/GT-final_test.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["Filename", "ClassId"], delimiter=";")
            writer.writeheader()
            writer.writerows(rows)
    options = {"set": "gtsrb", "split": split, "from": "torchvision", "root": tmp_path / "in"}
    found = run(monkeypatch, tmp_path / "out", **options, expected_images=43)
    assert labelled(found, decode=True) == expected
    assert all("png" in sample for sample in found)
    if split == "train":  # the same files as class folders 00000 to 00042
        options |= {"from": "folder", "root": tmp_path / "in/gtsrb/GTSRB"}
        (tmp_path / "in/gtsrb/GTSRB/Training").rename(tmp_path / "in/gtsrb/GTSRB/train")
        found = run(monkeypatch, tmp_path / "again", **options, expected_images=43)
        assert labelled(found, decode=True) == expected


def test_mnist_arrays_become_png_without_loss(tmp_path, monkeypatch):
    base, images = tmp_path / "in/MNIST/raw", RNG.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    numbers = RNG.permutation(np.repeat(np.arange(10), 2)).astype(np.uint8)
    for part in ("train", "t10k"):
        put(
            base / f"{part}-images-idx3-ubyte",
            struct.pack(">4i", 2051, 20, 28, 28) + images.tobytes(),
        )
        put(base / f"{part}-labels-idx1-ubyte", struct.pack(">2i", 2049, 20) + numbers.tobytes())
    options = {"set": "mnist", "split": "test", "from": "torchvision", "root": tmp_path / "in"}
    found = run(monkeypatch, tmp_path / "out", **options, expected_images=20)
    expected = Counter(
        (("L", (28, 28), image.tobytes()), int(number))
        for image, number in zip(images, numbers, strict=True)
    )
    assert labelled(found, decode=True) == expected


def test_pcam_arrays(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    images = RNG.integers(0, 256, (6, 96, 96, 3), dtype=np.uint8)
    numbers = np.array([0, 1, 1, 0, 1, 0], dtype=np.uint8)
    base = tmp_path / "in/pcam"
    base.mkdir(parents=True)
    for part, key, array in (("x", "x", images), ("y", "y", numbers.reshape(-1, 1, 1, 1))):
        with h5py.File(base / f"camelyonpatch_level_2_split_test_{part}.h5", "w") as file:
            file[key] = array
    options = {"set": "patch-camelyon", "split": "test", "from": "torchvision"}
    found = run(monkeypatch, tmp_path / "out", **options, root=tmp_path / "in", expected_images=6)
    expected = Counter(
        (("RGB", (96, 96), image.tobytes()), int(number))
        for image, number in zip(images, numbers, strict=True)
    )
    assert labelled(found, decode=True) == expected


# PASCAL VOC: several labels an image.


def test_voc_is_multi_label_from_every_source(tmp_path, monkeypatch):
    import datasets

    names = texts("voc-2007-classification")
    chosen = [sorted({names[i], names[(7 * i + 3) % 20], "person"}) for i in range(20)]
    images = [picture() for _ in chosen]
    base = tmp_path / "torchvision/VOCdevkit/VOC2007"
    for i, (objects, data) in enumerate(zip(chosen, images, strict=True)):
        put(base / f"JPEGImages/{i:06d}.jpg", data)
        rows = "".join(
            f"<object><name>{name}</name><difficult>{i % 2}</difficult></object>"
            for name in [*objects, objects[0]]
        )
        put(base / f"Annotations/{i:06d}.xml", f"<annotation>{rows}</annotation>")
    put(base / "ImageSets/Main/test.txt", "".join(f"{i:06d}\n" for i in range(20)))
    order = names[::-1]
    archive = tmp_path / "folder"
    numbers = [[order.index(name) for name in objects] for objects in chosen]
    lines = [f"test.zip@{i}.jpg {','.join(map(str, row))}" for i, row in enumerate(numbers)]
    put(archive / "test_ic.txt", "\n".join(lines))
    put(archive / "labels.txt", "\n".join(order))
    with zipfile.ZipFile(archive / "test.zip", "w") as file:
        for i, data in enumerate(images):
            file.writestr(f"{i}.jpg", data)
    features = datasets.Features(
        {"image": datasets.Image(), "labels": datasets.List(datasets.ClassLabel(names=order))}
    )
    columns = {"image": [{"bytes": d, "path": None} for d in images], "labels": numbers}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "hf")
    expected = {
        data: sorted(names.index(name) for name in objects)
        for data, objects in zip(images, chosen, strict=True)
    }
    options = {"set": "voc-2007-classification", "split": "test", "expected_images": 20}
    for kind in ("torchvision", "folder", "hf"):
        out = tmp_path / f"out {kind}"
        found = run(monkeypatch, out, **options, **{"from": kind, "root": tmp_path / kind})
        assert {s["jpg"]: json.loads(s["json"])["labels"] for s in found} == expected
        assert all(set(sample) == {"jpg", "json"} for sample in found)
        assert set_folder.load(out).kind == "image_text"
        assert set_folder.load(out).extra["multilabel"] is True
        assert (open_shards(out / "shards").labels == -1).all()
        assert [entry["names"][0] for entry in set_folder.load_classes(out)] == names


# KITTI.


@pytest.mark.parametrize(
    ("objects", "label"),
    [
        ([("Car", 1.0)], 0),
        ([("Car", 8.0)], 0),
        ([("Van", 8.01), ("Pedestrian", 2.0)], 1),
        ([("Truck", 20.0)], 1),
        ([("Truck", 20.5), ("Tram", 3.0)], 2),
        ([("Car", 30.0), ("Car", 5.0)], 0),
        ([("Cyclist", 4.0), ("DontCare", -1000.0)], 3),
        ([], 3),
    ],
)
def test_closest_vehicle(objects, label):
    assert elevater_targets.closest_vehicle_class(annotation(objects)) == label


def annotation(objects):
    """A KITTI label file: type, 12 numbers, depth z, angle."""
    zeros = " ".join(["0.00"] * 12)
    return "".join(f"{kind} {zeros} {z:.2f} 0.10\n" for kind, z in objects)


def kitti_mapping(folder_, images=60, videos=25):
    """Made-up mapping files; returns the video of each image."""
    video = [f"2011_09_26_drive_{RNG.integers(videos):04d}_sync" for _ in range(images)]
    lines = RNG.permutation(images)  # line of each image
    content = [""] * images
    for image, line in enumerate(lines):
        content[line] = f"2011_09_26 {video[image]} {image:010d}"
    put(folder_ / "train_mapping.txt", "\n".join(content) + "\n")
    put(folder_ / "train_rand.txt", "\ufeff" + ",".join(str(line + 1) for line in lines) + "\n")
    return video


def test_kitti_splits_are_drawn_as_tensorflow_datasets_draws(tmp_path):
    video = kitti_mapping(tmp_path)
    np.random.seed(123)  # noqa: NPY002  (the reference uses the global generator)
    known = sorted(set(video))
    test = np.random.choice(known, max(1, 10 * len(known) // 100), replace=False)  # noqa: NPY002
    rest = sorted(set(known) - set(test))
    val = np.random.choice(rest, max(1, 10 * len(known) // 100), replace=False)  # noqa: NPY002
    side = {**dict.fromkeys(test, "test"), **dict.fromkeys(val, "val")}
    expected = {split: [] for split in ("train", "val", "test")}
    for image, name in enumerate(video):
        expected[side.get(name, "train")].append(image)
    found = elevater_targets.kitti_splits(tmp_path)
    assert {split: sorted(images) for split, images in found.items()} == expected
    assert all(expected.values())
    with pytest.raises(DataError, match="folder mapping of KITTI's devkit"):
        elevater_targets.kitti_splits(tmp_path / "absent")


def test_kitti_through_torchvision(tmp_path, monkeypatch):
    base = tmp_path / "in/Kitti/raw"
    kitti_mapping(base / "mapping")
    images = {}
    for i in range(60):
        images[i] = picture("PNG")
        put(base / f"training/image_2/{i:06d}.png", images[i])
        objects = [[("Car", 5.0)], [("Van", 15.0)], [("Car", 50.0)], [("Tram", 5.0)]][i % 4]
        put(base / f"training/label_2/{i:06d}.txt", annotation(objects))
    chosen = elevater_targets.kitti_splits(base / "mapping")["train"]
    options = {"set": "kitti-distance", "split": "train", "from": "torchvision"}
    options |= {"root": tmp_path / "in", "expected_images": len(chosen)}
    found = run(monkeypatch, tmp_path / "out", **options)
    assert labelled(found) == Counter((images[i], i % 4) for i in chosen)


def test_names_that_libraries_give_are_all_known():
    """Class lists that torchvision carries itself, in the official order."""
    from torchvision.datasets import MNIST, Flowers102

    for name, classes in (("oxford-flower-102", Flowers102.classes), ("mnist", MNIST.classes)):
        table = elevater_targets.ClassTable(texts(name), SETS[name]["aliases"], None)
        assert table.by_name(classes, name) == list(range(len(classes)))
