"""Every kind of source on real files: equal pixels, labels by name, and what is refused."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import MNIST

from eval.sources import base
from eval.sources.presence import absent_splits
from eval.sources.registry import EvalDataset
from eval.sources.splits import EvalSplit, subset_ids
from loaders import manifest
from loaders.errors import ConfigError, DataError

# ELEVATER's class 3 of cifar-10 is the cat in its own order too; files come in another order.
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PROMPTS = "elevater/cifar-10.json"


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (12, 10), (value, 7, 9)).save(out, "PNG")
    return out.getvalue()


def row(root, **changes):
    """A row of ten classes with one image each, at ROOT/toy/test."""
    basis = {
        "source": "auto",
        "splits": {"test": {"samples": 10}},
        "tasks": {"zero_shot": ["top1"]},
    }
    basis |= {"classes": 10, "templates": "prompts", "prompts": PROMPTS, "labelled_only": True}
    basis |= {"resize_ratio": 1.0, "optional": True, "obtain": "make it", "root": root}
    return EvalDataset(name="toy", **(basis | changes))


def write_tar(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(samples):
            for suffix, data in sample.items():
                data = data if isinstance(data, bytes) else str(data).encode()
                info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_shards(root, names=NAMES):
    samples = [{"png": png(i), "cls": i} for i in range(10)]
    write_tar(root / "toy/test/shards/00000.tar", samples)
    classes = [{"id": i, "synset": None, "names": [name]} for i, name in enumerate(names)]
    folder = root / "toy/test"
    manifest.write_manifest(folder, "toy", "image_label", classes, "-", "-", "2026-01-01", 10)


def write_folder(root, names=NAMES):
    for i, name in enumerate(names):
        (root / "toy/test" / name).mkdir(parents=True)
        (root / "toy/test" / name / "a.png").write_bytes(png(i))


def write_webdataset(root, names=NAMES):
    order = [4, 1, 0, 2, 3, 9, 8, 7, 6, 5]  # its own class order: names decide
    samples = [
        {"webp" if k == 3 else "png": png(c), "cls": i} for k, (i, c) in enumerate(enumerate(order))
    ]
    write_tar(root / "toy/test/0.tar", samples)
    (root / "toy/classnames.txt").write_text("\n".join(names[c] for c in order))
    (root / "toy/zeroshot_classification_templates.txt").write_text("a {c}.\nthe {c}\n")


def write_huggingface(root, names=NAMES):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    data = {"image": [{"bytes": png(i), "path": None} for i in range(10)], "label": range(10)}
    datasets.Dataset.from_dict(data, features=features).save_to_disk(root / "toy/test")


def write_parquet(root, names=NAMES):
    write_huggingface(root / "disk", names)
    (root / "toy/test").mkdir(parents=True)
    data = datasets.load_from_disk(root / "disk/toy/test")
    data.to_parquet(root / "toy/test/part.parquet")


WRITERS = {
    "shards": write_shards,
    "folder": write_folder,
    "webdataset": write_webdataset,
    "huggingface": write_huggingface,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_sources_give_the_prompt_files_class_and_the_images_pixels(kind, tmp_path):
    WRITERS[kind](tmp_path)
    split = EvalSplit(row(tmp_path), "test", 8)
    assert absent_splits(split.row) == []
    red = [split.image(i).getpixel((5, 5))[0] for i in range(10)]
    # The red value is the class: every image has its own, whatever the order of the files.
    assert sorted(red) == list(range(10))
    assert split.labels.tolist() == red
    assert split.class_names()[1] == NAMES
    assert split[0].shape == (3, 8, 8)
    assert len(split.content_hash) == 64
    assert split.content_hash == EvalSplit(row(tmp_path), "test", 8).content_hash


@pytest.mark.parametrize("kind", ["folder", "webdataset", "huggingface"])
def test_wrong_class_names_fail_in_words(kind, tmp_path):
    WRITERS[kind](tmp_path, [*NAMES[:9], "tractor"])
    with pytest.raises(DataError, match=r"without a class: \['tractor'\].*folder: \['truck'\]"):
        EvalSplit(row(tmp_path), "test", 8)


def test_missing_class_folder_and_wrong_count_fail_in_words(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "toy/test/frog/a.png").rename(tmp_path / "toy/test/cat/b.png")
    with pytest.raises(DataError, match="frog: the class folder holds no image"):
        EvalSplit(row(tmp_path), "test", 8)
    (tmp_path / "toy/test/frog").rmdir()
    with pytest.raises(DataError, match=r"without a name or folder: \['frog'\]"):
        EvalSplit(row(tmp_path), "test", 8)
    splits = {"test": {"samples": 11}}
    without = {"prompts": None, "classes": None, "splits": splits}
    with pytest.raises(DataError, match=r"holds 10 labelled samples.*expects 11.*make it"):
        EvalSplit(row(tmp_path, **without), "test", 8)


def test_shards_in_another_class_order_are_refused_by_name(tmp_path):
    write_shards(tmp_path, [*NAMES[:3], "deer", "cat", *NAMES[5:]])
    with pytest.raises(DataError, match=r"order is not.*id 3 is 'deer' here and 'cat'.*2 ids"):
        EvalSplit(row(tmp_path), "test", 8)


def test_nothing_there_is_absent_and_refused(tmp_path):
    (tmp_path / "toy/test").mkdir(parents=True)
    assert absent_splits(row(tmp_path)) == ["test"]
    with pytest.raises(DataError, match=r"holds no manifest.json, tars.*make it"):
        EvalSplit(row(tmp_path), "test", 8)


def test_webdataset_brings_classes_and_templates(tmp_path):
    write_webdataset(tmp_path)
    split = EvalSplit(row(tmp_path, prompts=None, templates="source"), "test", 8)
    assert split.templates() == ["a {}.", "the {}"]
    assert split.class_names()[1] == ["deer", "automobile", "airplane", "bird", "cat", "truck",
                                      "ship", "horse", "frog", "dog"]  # fmt: skip
    (tmp_path / "toy/zeroshot_classification_templates.txt").unlink()
    with pytest.raises(DataError, match="templates are to come from the source"):
        EvalSplit(row(tmp_path, templates="source"), "test", 8).templates()
    (tmp_path / "toy/dataset_type.txt").write_text("multilabel\n")
    with pytest.raises(DataError, match="npy files are not read"):
        EvalSplit(row(tmp_path), "test", 8)


def test_torchvision_is_read_from_its_root(tmp_path):
    """MNIST's own files, written here: its names are '0 - zero', ELEVATER's '0'."""
    raw = tmp_path / "toy/test/MNIST/raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, size=(6, 28, 28), dtype=np.uint8)
    labels = np.array([3, 1, 4, 1, 5, 9], dtype=np.uint8)
    for part in ("train", "t10k"):
        head = np.array([0x803, 6, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = np.array([0x801, 6], ">i4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    splits = {"test": {"samples": 6, "arguments": {"train": False}}}
    own = {"source": "torchvision:MNIST", "splits": splits, "prompts": None, "classes": 5}
    split = EvalSplit(row(tmp_path, **own), "test", 28)
    assert split.labels.tolist() == labels.tolist()
    assert split.class_names()[1] == [MNIST.classes[i] for i in (1, 3, 4, 5, 9)]
    np.testing.assert_array_equal(split[2][0].numpy(), pixels[2])
    with pytest.raises(DataError, match=r"class names do not fit prompts/elevater/mnist.json"):
        EvalSplit(row(tmp_path, **(own | {"prompts": "elevater/mnist.json"})), "test", 28)
    own["splits"] = {"test": {"samples": 6, "arguments": {"split": "test"}}}
    with pytest.raises(ConfigError, match="unexpected keyword"):
        EvalSplit(row(tmp_path, **own), "test", 28)
    (raw / "t10k-images-idx3-ubyte").unlink()
    own["splits"] = splits
    with pytest.raises(DataError, match="not found"):
        EvalSplit(row(tmp_path, **own), "test", 28)


def test_imagenet_folders_by_synset_number_and_subset(tmp_path):
    table = base.read_table("imagenet1k.json")
    chosen = subset_ids("imagenet_r")
    for i in chosen:
        (tmp_path / "toy/test" / table.synsets[i]).mkdir(parents=True)
        (tmp_path / "toy/test" / table.synsets[i] / "x.png").write_bytes(png(i % 250))
    splits = {"test": {"samples": 200}}
    own = {"prompts": "imagenet1k.json", "templates": "clip_80", "classes": 200}
    own |= {"subset": "imagenet_r", "splits": splits}
    split = EvalSplit(row(tmp_path, **own), "test", 8)
    ids, names = split.class_names()
    assert ids.tolist() == sorted(chosen) == split.labels.tolist()
    assert names[:2] == ["goldfish", "great white shark"]
    with pytest.raises(DataError, match="200 names, 1000 classes expected"):
        EvalSplit(row(tmp_path, **(own | {"subset": None})), "test", 8)
    names = [str(i) for i in range(1000)]
    rng = np.random.default_rng(0).permutation(names).tolist()
    source = base.Source()
    source.names, source.what = rng, "V2"
    assert base.class_ids(source, table, integer_labels=True).tolist() == list(map(int, rng))
    with pytest.raises(DataError, match="do not fit"):
        base.class_ids(source, table)


def test_several_labels_per_image_follow_the_prompt_file(tmp_path):
    samples = [
        {"png": png(i), "json": json.dumps({"labels": [i, (i + 1) % 10]})} for i in range(10)
    ]
    write_tar(tmp_path / "toy/test/shards/00000.tar", samples)
    classes = [{"id": i, "synset": None, "names": [name]} for i, name in enumerate(NAMES)]
    folder = tmp_path / "toy/test"
    manifest.write_manifest(folder, "toy", "image_text", classes, "-", "-", "2026-01-01", 10)
    split = EvalSplit(row(tmp_path, multilabel=True, labelled_only=False), "test", 8)
    np.testing.assert_array_equal(split.targets, (np.eye(10) + np.roll(np.eye(10), 1, 1)) > 0)
    samples[3]["json"] = json.dumps({"labels": [10]})
    write_tar(tmp_path / "toy/test/shards/00000.tar", samples)
    manifest.write_manifest(folder, "toy", "image_text", classes, "-", "-", "2026-01-01", 10)
    with pytest.raises(DataError, match=r"key 000000003: .*labels.*it has \[10\]"):
        EvalSplit(row(tmp_path, multilabel=True, labelled_only=False), "test", 8)


def test_squash_keeps_the_whole_image(tmp_path):
    wide = Image.new("RGB", (40, 10), "black")
    wide.paste("white", (0, 0, 8, 10))  # the left fifth, which a centre crop loses
    for i, name in enumerate(NAMES):
        (tmp_path / "toy/test" / name).mkdir(parents=True)
        wide.save(tmp_path / "toy/test" / name / f"{i}.png")
    squashed = EvalSplit(row(tmp_path, squash=True), "test", 10)
    cropped = EvalSplit(row(tmp_path), "test", 10)
    assert squashed[0][0, 5, 0] > 200
    assert cropped[0].max() == 0
    assert (squashed.resize, squashed.mode) != (cropped.resize, cropped.mode)


def test_captions_of_an_image_first_five_or_all(tmp_path):
    lines = [f"caption {i}" for i in range(6)]
    samples = [
        {"png": png(0), "txt": "\n".join(lines[:5])},
        {"png": png(1), "txt": "x", "json": json.dumps({"captions": lines})},
    ]
    write_tar(tmp_path / "toy/test/0.tar", samples)
    (tmp_path / "toy/dataset_type.txt").write_text("retrieval")
    own = {"prompts": None, "labelled_only": False, "captions_per_image": 5, "classes": None}
    own["splits"] = {"test": {"samples": 2, "texts": 10}}
    found, owner = EvalSplit(row(tmp_path, **own), "test", 8).captions()
    assert found == lines[:5] * 2
    assert owner.tolist() == [0] * 5 + [1] * 5
    own["captions_per_image"] = "all"
    with pytest.raises(DataError, match=r"11 captions.*expects 10"):
        EvalSplit(row(tmp_path, **own), "test", 8).captions()
    own["captions_per_image"] = 6
    with pytest.raises(DataError, match="key 000000000: 5 captions, 6 are needed"):
        EvalSplit(row(tmp_path, **own), "test", 8).captions()
