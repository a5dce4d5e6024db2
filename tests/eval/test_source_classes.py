"""Labels of two splits meet by class name, whatever the order and the number of their classes.

Every class is a plain colour, equal in both splits, so that whoever compares names is always right.
"""

import io
import json
import shutil

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from eval import finetune, in_training, knn, linear_probe
from eval.sources import base, common_classes
from eval.sources.registry import Registry
from loaders import manifest
from loaders.errors import DataError
from tests.eval.conftest import write_run
from tests.eval.test_sources_kinds import NAMES, PROMPTS, write_tar

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (20, 60, 230)}
ORDERS = {
    "train": ["blue", "green", "red"],
    "test": ["green", "red"],
    "val": ["red", "blue", "green"],
}
EACH = 6  # images of a class


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", seed=0)


def png(name):
    out = io.BytesIO()
    Image.new("RGB", (40, 40), COLOURS[name]).save(out, "PNG")
    return out.getvalue()


def samples(names):
    """(bytes, number in `names`) of every image."""
    return [(png(name), i) for i, name in enumerate(names) for _ in range(EACH)]


def write_folders(folder, names):
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(EACH):
            (folder / name / f"{i}.png").write_bytes(png(name))


def write_shards(folder, names):
    images = [{"png": image, "cls": label} for image, label in samples(names)]
    write_tar(folder / "shards/0.tar", images)
    classes = [{"id": i, "synset": None, "names": [name]} for i, name in enumerate(names)]
    manifest.write_manifest(folder, "-", "image_label", classes, "-", "-", "2026-01-01", 1)


def write_webdataset(folder, names):
    images = [{"png": image, "cls": label} for image, label in samples(names)]
    write_tar(folder / "0.tar", images)
    (folder / "classnames.txt").write_text("\n".join(names))


def write_huggingface(folder, names):
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    images, labels = zip(*samples(names), strict=True)
    data = {"image": [{"bytes": image, "path": None} for image in images], "label": labels}
    datasets.Dataset.from_dict(data, datasets.Features(columns)).save_to_disk(folder)


WRITERS = {
    "folder": write_folders,
    "shards": write_shards,
    "webdataset": write_webdataset,
    "huggingface": write_huggingface,
    "torchvision:ImageFolder": write_folders,
}


def write_registry(root, kind="folder", orders=ORDERS, **changes):
    """The set `colours` with the splits and class lists of `orders`, and its registry."""
    for split, names in orders.items():
        WRITERS[kind](root / split, names)
    row = {
        "source": kind,
        "splits": {name: {"path": str(root / name), "samples": None} for name in orders},
        "tasks": {"zero_shot": ["top1"], "knn": ["top1"], "linear_probe": ["top1"]},
        "classes": None,
        "templates": "clipart",
        "labelled_only": True,
        "resize_ratio": 1.0,
        "optional": False,
        "obtain": "-",
    } | changes
    path = root / "registry.yaml"
    path.write_text(yaml.safe_dump({"collections": {}, "datasets": {"colours": row}}))
    return path


def command(main, run, registry, output, *more):
    """The rows that an evaluation writes, as (metric, value, n, classes)."""
    arguments = ["--checkpoint", str(run), "--datasets", "colours", "--output", str(output)]
    main([*arguments, "--workers", "0", *map(str, more)], registry)
    (path,) = output.glob("*.jsonl")
    rows = map(json.loads, path.read_text().splitlines())
    return [(row["metric"], row["value"], row["n"], row["classes"]) for row in rows]


def open_splits(registry, fitted=("train",)):
    return common_classes.open_splits(Registry(registry).datasets["colours"], fitted, 8)


@pytest.mark.parametrize("kind", WRITERS)
def test_neighbours_of_splits_with_other_class_lists(kind, run, tmp_path):
    registry = write_registry(tmp_path, kind)
    assert command(knn.main, run, registry, tmp_path / "out") == [("top1", 100, 2 * EACH, 3)]


@pytest.mark.parametrize("protocol", ["standardised", "clip", "elevater"])
def test_probes_choose_among_all_trained_classes(protocol, run, tmp_path):
    """The validation split of `clip` has its classes in a third order."""
    registry = write_registry(tmp_path)
    options = ["--protocol", protocol]
    options += ["--head-init", "random"] if protocol == "elevater" else []
    found = command(linear_probe.main, run, registry, tmp_path / "out", *options)
    epochs = ("_last_epoch", "_best_epoch") if protocol == "elevater" else ("",)
    assert found == [(f"top1{epoch}", 100, 2 * EACH, 3) for epoch in epochs]


def test_few_shots_are_drawn_from_every_trained_class(run, tmp_path):
    registry = write_registry(tmp_path)
    options = ["--protocol", "clip", "--shots", "5", "--seeds", "0", "1"]
    found = command(linear_probe.main, run, registry, tmp_path / "out", *options)
    assert {(value, classes) for _, value, _, classes in found} == {(100, 3)}
    assert "15 train, 12 test" in next((tmp_path / "out").glob("*.jsonl")).read_text()


def test_fine_tuning_teaches_every_class_its_own_name(run, tmp_path):
    registry = write_registry(tmp_path)
    options = ["--epochs", "12", "--lr", "3e-3", "--head-init", "random"]
    found = command(finetune.main, run, registry, tmp_path / "out", *options)
    assert found == [("top1", 100, 2 * EACH, 3)]


def test_evaluation_in_training_finds_the_same(tmp_path):
    run, registry = write_run(tmp_path / "tiny", seed=0), write_registry(tmp_path)
    chosen = in_training.select({"knn": ["colours"]}, registry)
    (row,) = in_training.evaluate(run / "checkpoints/step_0000007", chosen, workers=0)
    assert (row["value"], row["classes"]) == (100, 3)


def test_a_test_class_without_training_samples_is_refused_before_training(run, tmp_path):
    registry = write_registry(tmp_path, orders={"train": ["blue", "red"], "test": ["green", "red"]})
    with pytest.raises(DataError, match=r"no sample of the classes \['green'\] \(1 of 2\)"):
        in_training.select({"knn": ["colours"]}, registry)
    for main in (knn.main, linear_probe.main, finetune.main):
        with pytest.raises(DataError, match=r"test: no sample|no sample of the classes"):
            command(main, run, registry, tmp_path / "out")
    assert not (tmp_path / "out/.features").exists()  # found before any image went through it


def test_an_area_under_the_curve_needs_two_classes(tmp_path):
    tasks = {"linear_probe": ["roc_auc"], "zero_shot": ["roc_auc"]}
    with pytest.raises(DataError, match=r"roc_auc needs two classes, these are 3: \['blue'"):
        open_splits(write_registry(tmp_path, tasks=tasks))


def test_names_are_compared_exactly_and_a_near_one_is_said(tmp_path):
    registry = write_registry(tmp_path, orders={"train": ["blue", "red"], "test": ["red"]})
    (tmp_path / "test/red").rename(tmp_path / "test/Red")
    with pytest.raises(DataError, match=r"\['Red'\].*which has \['red'\]: give equal classes"):
        open_splits(registry)
    # Where both are there, as EMNIST's letters are, they are two classes.
    (tmp_path / "train/blue").rename(tmp_path / "train/Red")
    _, classes = open_splits(registry)
    assert classes.names == ["Red", "red"]
    assert set(classes.targets["test"]) == {0}


def test_two_classes_of_one_name_and_classes_without_names_are_refused(tmp_path):
    registry = write_registry(tmp_path, "shards")
    path = tmp_path / "train/manifest.json"
    content = json.loads(path.read_text())
    content["classes"][0]["names"] = ["red"]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"train has several classes named \['red'\]"):
        open_splits(registry)
    content["classes"], content["kind"] = [], "image_text"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"no class names for the ids \[0, 1, 2\].*train"):
        open_splits(registry)


def test_samples_without_a_label_are_no_class(tmp_path):
    registry = write_registry(tmp_path, "shards", labelled_only=False)
    write_tar(tmp_path / "train/shards/0.tar", [{"png": png("red"), "cls": 2}, {"png": png("red")}])
    classes = json.loads((tmp_path / "train/manifest.json").read_text())["classes"]
    manifest.write_manifest(
        tmp_path / "train", "-", "image_text", classes, "-", "-", "2026-01-01", 2
    )
    with pytest.raises(DataError, match=r"split train.*1 of 2 images have none; `labelled_only"):
        open_splits(registry)


def test_several_labels_per_image_meet_by_name(tmp_path):
    """Without a prompt file: the columns of both splits are the training split's names."""
    lists = {"train": ([0, 1], [2], []), "test": ([1], [0, 1], [])}
    registry = write_registry(tmp_path, "shards", multilabel=True)
    for split, labels in lists.items():
        images = [{"png": png("red"), "json": json.dumps({"labels": few})} for few in labels]
        write_tar(tmp_path / split / "shards/0.tar", images)
        classes = json.loads((tmp_path / split / "manifest.json").read_text())["classes"]
        manifest.write_manifest(
            tmp_path / split, "-", "image_text", classes, "-", "-", "2026-01-01", 3
        )
    splits, classes = open_splits(registry)
    assert classes.names == ["blue", "green", "red"]
    # `labelled_only` leaves out the images without any label, and their rows of the matrix.
    assert classes.targets["train"].tolist() == [[1, 1, 0], [0, 0, 1]]
    assert classes.targets["test"].tolist() == [[0, 0, 1], [0, 1, 1]]
    assert splits["test"].class_names()[1] == ["green", "red"]


def test_splits_in_one_torchvision_root_have_features_of_their_own(tmp_path):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    pixels = np.zeros((6, 28, 28), dtype=np.uint8)
    for part, labels in (("train", [3, 1, 4, 1, 5, 9]), ("t10k", [1, 3, 4, 4, 5, 9])):
        head = np.array([0x803, 6, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = np.array([0x801, 6], ">i4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes(labels))
    registry = write_registry(tmp_path, orders={}, source="torchvision:MNIST")
    content = yaml.safe_load(registry.read_text())
    content["datasets"]["colours"]["splits"] = {
        name: {"path": str(tmp_path), "samples": 6, "arguments": {"train": name == "train"}}
        for name in ("train", "test")
    }
    registry.write_text(yaml.safe_dump(content))
    splits, classes = open_splits(registry)
    assert classes.names == ["1 - one", "3 - three", "4 - four", "5 - five", "9 - nine"]
    assert classes.targets["test"].tolist() == [0, 1, 2, 2, 3, 4]
    assert splits["train"].content_hash != splits["test"].content_hash


def test_with_a_prompt_file_its_classes_are_the_candidates(tmp_path):
    """Also those without a training sample, in whatever order each split has their names."""
    labels = {"train": (NAMES[::-1], [0, 0, 3]), "test": (NAMES, [0, 9])}
    changes = {"prompts": PROMPTS, "templates": "prompts", "classes": 10, "source": "huggingface"}
    registry = write_registry(tmp_path, "huggingface", **changes)
    for split, (names, numbers) in labels.items():
        columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        images = [{"bytes": png("red"), "path": None}] * len(numbers)
        data = {"image": images, "label": numbers}
        made = datasets.Dataset.from_dict(data, datasets.Features(columns))
        shutil.rmtree(tmp_path / split)
        made.save_to_disk(tmp_path / split)
    _, classes = open_splits(registry)
    assert classes.names == NAMES
    assert classes.targets["train"].tolist() == [9, 9, 6]
    assert classes.targets["test"].tolist() == [0, 9]


def test_prompt_files_are_matched_by_the_same_name_first():
    table = base.ClassTable("x.json", ["C", "C++", "t-shirt"], [None] * 3, None, np.arange(3))
    source = base.Source()
    source.what, source.names = "letters", ["T Shirt", "C++", "C"]
    assert base.class_ids(source, table).tolist() == [2, 1, 0]
    source.names = ["t shirt", "C", "t_shirt", "C++"]
    with pytest.raises(DataError, match=r"named twice: \['t-shirt'\]"):
        base.class_ids(source, table)
