"""ELEVATER's sets from Hugging Face datasets and folders, and the same labels from every source."""

import json
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from data_prep import elevater
from data_prep.archives import elevater_targets
from data_prep.sets import set_folder
from loaders.errors import ConfigError, DataError
from loaders.manifest import open_shards, write_manifest
from tests.data_prep.elevater_layouts import (
    LAYOUTS,
    SETS,
    as_archive,
    as_class_folders,
    as_coco,
    as_saved,
    as_torchvision,
    labelled,
    picture,
    run,
    samples,
    texts,
)


@pytest.fixture(scope="module")
def textures():
    """(class name, file name, jpeg) of two images for each of the 47 classes, shuffled."""
    rows = [(n, f"{n}_{i:04d}.jpg", picture()) for n in texts("dtd") for i in range(2)]
    random.Random(1).shuffle(rows)
    return rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_source_gives_the_same_bytes_and_labels(
    layout, textures, tmp_path, monkeypatch, capsys
):
    kind, write = LAYOUTS[layout]
    write(tmp_path / "in", textures)
    options = {"set": "dtd", "split": "test", "from": kind, "root": tmp_path / "in"}
    out = tmp_path / "out"
    found = run(monkeypatch, out, **options, expected_images=94, samples_per_shard=40)
    ids = texts("dtd")
    assert labelled(found) == Counter((data, ids.index(name)) for name, _, data in textures)
    assert all(json.loads(s["json"])["name"] == ids[int(s["cls"])] for s in found)
    assert len(list((out / "shards").glob("*.tar"))) == 3
    assert f"next: python data_prep/verify.py {out}" in capsys.readouterr().out


def test_samples_keep_the_order_of_the_archive(textures, tmp_path, monkeypatch):
    as_archive(tmp_path / "in", textures)
    options = {"set": "dtd", "split": "test", "from": "folder", "root": tmp_path / "in"}
    found = run(monkeypatch, tmp_path / "out", **options, expected_images=94)
    files = [json.loads(sample["json"])["source"].rpartition("/")[2] for sample in found]
    assert files == [file for _, file, _ in textures]


def test_the_set_opens_with_the_class_texts(textures, tmp_path, monkeypatch):
    as_class_folders(tmp_path / "in", textures)
    options = {"set": "dtd", "split": "test", "from": "folder", "root": tmp_path / "in"}
    run(monkeypatch, tmp_path / "out", **options, expected_images=94)
    preparation = set_folder.load(tmp_path / "out")
    assert preparation.kind == "image_label"
    assert preparation.attempted == 94
    assert preparation.extra["metric"] == "accuracy"
    assert preparation.extra["elevater_id"] == "dtd"
    assert preparation.extra["templates"]["file"] == "prompts/elevater/dtd.json"
    fields = ("name", "kind", "source", "license", "date", "attempted", "extra")
    write_manifest(
        tmp_path / "out",
        classes=set_folder.load_classes(tmp_path / "out"),
        **{field: getattr(preparation, field) for field in fields},
    )
    shards = open_shards(tmp_path / "out")
    assert [entry.names[0] for entry in shards.classes] == texts("dtd")
    assert np.bincount(shards.labels).tolist() == [2] * 47


def test_a_count_that_differs_names_both(textures, tmp_path, monkeypatch):
    as_class_folders(tmp_path / "in", textures)
    options = {"set": "dtd", "split": "test", "from": "folder", "root": tmp_path / "in"}
    with pytest.raises(DataError, match=r"ELEVATER has 1880 images, 94 are there"):
        run(monkeypatch, tmp_path / "out", **options)
    with pytest.raises(DataError, match=r"says 95 images, 94 are there"):
        run(monkeypatch, tmp_path / "out", **options, expected_images=95)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("there", "images", "message"),
    [
        ({"zigzagged": "zigzaged"}, 94, r"\['zigzaged'\].*\['zigzagged'\]"),
        ({"banded": None}, 92, "47 classes expected, 46 there"),
    ],
)
def test_a_class_that_is_misspelt_or_missing_is_named(
    layout, textures, tmp_path, monkeypatch, there, images, message
):
    kind, write = LAYOUTS[layout]
    rows = [(there.get(name, name), *rest) for name, *rest in textures]
    write(tmp_path / "in", [row for row in rows if row[0] is not None])
    options = {"set": "dtd", "split": "test", "from": kind, "root": tmp_path / "in"}
    with pytest.raises(DataError, match=message):
        run(monkeypatch, tmp_path / "out", **options, expected_images=images)


def test_two_names_for_one_class_are_an_error(textures, tmp_path, monkeypatch):
    rows = [("Grid" if n == "woven" else n, f, d) for n, f, d in textures]
    as_class_folders(tmp_path / "in", rows)
    options = {"set": "dtd", "split": "test", "from": "folder", "root": tmp_path / "in"}
    with pytest.raises(DataError, match=r"named twice: \[\"'grid' by \['Grid', 'grid'\]\"\]"):
        run(monkeypatch, tmp_path / "out", **options, expected_images=94)


def test_another_source_is_not_mixed_in(textures, tmp_path, monkeypatch):
    as_class_folders(tmp_path / "in", textures)
    options = {"set": "dtd", "split": "test", "from": "folder", "root": tmp_path / "in"}
    run(monkeypatch, tmp_path / "out", **options, expected_images=94)
    before = samples(tmp_path / "out")
    assert run(monkeypatch, tmp_path / "out", **options, expected_images=94) == before
    as_saved(tmp_path / "hf", textures)
    options |= {"from": "hf", "root": tmp_path / "hf"}
    with pytest.raises(DataError, match="holds another set"):
        run(monkeypatch, tmp_path / "out", **options, expected_images=94)


def test_parts_together_are_the_whole(textures, tmp_path, monkeypatch):
    as_class_folders(tmp_path / "in", textures)
    options = {"set": "dtd", "split": "test", "from": "folder", "root": tmp_path / "in"}
    options |= {"expected_images": 94, "samples_per_shard": 20}
    whole = run(monkeypatch, tmp_path / "whole", **options)
    assert len(run(monkeypatch, tmp_path / "parts", **options, part=1, parts=2)) == 40
    assert run(monkeypatch, tmp_path / "parts", **options, part=0, parts=2) == whole


# What cannot be given, and damaged sources.


def test_splits_and_sources_that_do_not_exist(tmp_path, monkeypatch):
    for name, split, kind, message in (
        ("cifar-10", "val", "folder", "no split val in ELEVATER; it has train, test"),
        ("eurosat_clip", "test", "torchvision", "torchvision cannot give"),
        ("fer-2013", "test", "torchvision", "torchvision cannot give"),
    ):
        options = {"set": name, "split": split, "from": kind, "root": tmp_path}
        with pytest.raises(ConfigError, match=message):
            run(monkeypatch, tmp_path / "out", **options)


def test_empty_roots_say_what_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for kind, message in (
        ("torchvision", "torchvision DTD cannot read it.*unpack"),
        ("folder", r"neither test.txt \(ELEVATER's archive\) nor a folder test/"),
        ("hf", "neither dataset_dict.json"),
    ):
        options = {"set": "dtd", "split": "test", "from": kind, "root": tmp_path}
        with pytest.raises(DataError, match=message):
            run(monkeypatch, tmp_path / "out", **options)
    options = {"set": "dtd", "split": "test", "from": "folder", "root": tmp_path / "absent"}
    with pytest.raises(DataError, match="no such folder"):
        run(monkeypatch, tmp_path / "out", **options)


def test_damaged_sources(textures, tmp_path, monkeypatch):
    options = {"set": "dtd", "split": "test", "expected_images": 94}
    as_archive(tmp_path / "a", textures)
    base = tmp_path / "a/classification/dtd_20211007"
    index = (base / "test.txt").read_text()
    for content, message in (
        (index + "test.zip@absent.jpg 3\n", r"1 of 95 images are not there: \['test.zip@absent"),
        (index + "test.zip@absent.jpg\n", "line 95: .* is not 'path label'"),
        (index + "../../x.jpg 3\n", "leaves the folder"),
    ):
        (base / "test.txt").write_text(content)
        with pytest.raises(DataError, match=message):
            run(monkeypatch, tmp_path / "out", **options, **{"from": "folder", "root": base})
    as_torchvision(tmp_path / "b", textures)
    first = tmp_path / "b/dtd/dtd/images" / textures[0][0] / textures[0][1]
    first.write_bytes(b"GIF89a and nothing else")
    source = {"from": "torchvision", "root": tmp_path / "b"}
    with pytest.raises(DataError, match=f"{textures[0][1]}: not a jpeg"):
        run(monkeypatch, tmp_path / "out", **options, **source)
    first.unlink()
    with pytest.raises(DataError, match=f"1 images are listed but not there.*{textures[0][1]}"):
        run(monkeypatch, tmp_path / "out", **options, **source)


# ELEVATER archives whose label map has other words, COCO json, and labels without names.


def test_archive_labels_are_numbers_only_when_no_name_fits(tmp_path, monkeypatch):
    rows = [(n, f"{i}_{j}.jpg", picture()) for i, n in enumerate(texts("dtd")) for j in range(2)]
    other = {n: f"class{i:02d}" for i, n in enumerate(texts("dtd"))}
    renamed = [(other[n], f, d) for n, f, d in rows]
    as_archive(tmp_path / "in", renamed, names=list(other.values()))
    options = {"set": "dtd", "split": "test", "from": "folder", "root": tmp_path / "in"}
    found = run(monkeypatch, tmp_path / "out", **options, expected_images=94)
    assert labelled(found) == Counter((d, texts("dtd").index(n)) for n, _, d in rows)


def test_an_empty_line_among_class_names_is_refused(tmp_path, monkeypatch):
    """Without it, all names after it would move to other numbers; at the end it is nothing."""
    rows = [(n, f"{n}.jpg", picture()) for n in texts("dtd")]
    as_archive(tmp_path / "in", rows, names=texts("dtd"))
    labels = tmp_path / "in/classification/dtd_20211007/labels.txt"
    options = {"set": "dtd", "split": "test", "from": "folder", "root": tmp_path / "in"}
    labels.write_text("\ufeff" + "\r\n".join([*texts("dtd"), "", ""]))
    assert len(run(monkeypatch, tmp_path / "out", **options, expected_images=len(rows))) == len(
        rows
    )
    labels.write_text("\n".join([*texts("dtd")[:3], "", *texts("dtd")[3:]]))
    with pytest.raises(DataError, match=r"labels\.txt, line 4: empty"):
        run(monkeypatch, tmp_path / "gap", **options, expected_images=len(rows))


def test_coco_labels_are_numbers_only_when_no_name_fits(tmp_path, monkeypatch):
    words = ["left or right", "near", "far", "none"]
    rows = [(words[i % 4], f"{i}.png", picture("PNG")) for i in range(8)]
    as_coco(tmp_path / "in", rows, words, "test_meta.json")
    options = {"set": "kitti-distance", "split": "test", "from": "folder", "root": tmp_path / "in"}
    found = run(monkeypatch, tmp_path / "out", **options, expected_images=8)
    assert labelled(found) == Counter((data, words.index(name)) for name, _, data in rows)


def test_coco_archive(tmp_path, monkeypatch):
    rows = [
        (n.replace(" ", "_"), f"{i}.jpg", picture()) for i, n in enumerate(texts("resisc45_clip"))
    ]
    random.Random(2).shuffle(rows)
    as_coco(tmp_path / "in", rows)
    options = {"set": "resisc45_clip", "split": "test", "from": "folder", "root": tmp_path / "in"}
    found = run(monkeypatch, tmp_path / "out", **options, expected_images=45)
    ids = texts("resisc45_clip")
    assert labelled(found) == Counter((d, ids.index(n.replace("_", " "))) for n, _, d in rows)


def test_integer_labels_follow_the_stated_rule(tmp_path, monkeypatch):
    import datasets

    kaggle = ["angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral"]
    images = [picture() for _ in kaggle]
    columns = {"image": [{"bytes": d, "path": None} for d in images], "label": list(range(7))}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict(columns, features=features, split="test")
    data.save_to_disk(tmp_path / "in")
    options = {"split": "test", "from": "hf", "root": tmp_path / "in", "expected_images": 7}
    found = run(monkeypatch, tmp_path / "out", set="fer-2013", **options)
    ids = texts("fer-2013")
    assert labelled(found) == Counter(
        (d, ids.index(n)) for d, n in zip(images, kaggle, strict=True)
    )
    with pytest.raises(DataError, match="integer labels without class names"):
        run(monkeypatch, tmp_path / "other", set="eurosat_clip", **options)
    with pytest.raises(DataError, match="10 classes expected, 7 occur"):
        run(monkeypatch, tmp_path / "other", set="mnist", **options)


def test_hugging_face_columns(tmp_path, monkeypatch):
    """CIFAR-100 on the hub: image in `img`, two label columns, crab spelt cra."""
    import datasets

    names = sorted("cra" if n == "crab" else n.replace(" ", "_") for n in texts("cifar-100"))
    images = [picture("PNG") for _ in names]
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=names),
            "coarse_label": datasets.ClassLabel(names=["a", "b"]),
        }
    )
    columns = {
        "img": [{"bytes": d, "path": None} for d in images],
        "fine_label": list(range(100)),
        "coarse_label": [0] * 100,
    }
    data = datasets.Dataset.from_dict(columns, features=features, split="test")
    data.save_to_disk(tmp_path / "in")
    options = {"split": "test", "from": "hf", "root": tmp_path / "in", "expected_images": 100}
    found = run(monkeypatch, tmp_path / "out", set="cifar-100", **options)
    ids = {n.replace(" ", "_"): i for i, n in enumerate(texts("cifar-100"))} | {
        "cra": texts("cifar-100").index("crab")
    }
    assert labelled(found) == Counter((d, ids[n]) for d, n in zip(images, names, strict=True))
    assert {extension for s in found for extension in s} == {"png", "cls", "json"}
    with pytest.raises(DataError, match="no split train; there: test"):
        run(monkeypatch, tmp_path / "other", set="cifar-100", **options | {"split": "train"})


def test_every_table_tells_its_classes_apart():
    for name, row in SETS.items():
        table = elevater_targets.ClassTable(texts(name), row["aliases"], row["integers"])
        backwards = texts(name)[::-1]
        assert table.by_name(backwards, name) == list(range(len(backwards)))[::-1]


def test_the_script_and_its_exit_codes(textures, tmp_path):
    as_class_folders(tmp_path / "in", textures)
    command = [sys.executable, elevater.__file__, "--set", "dtd", "--from", "folder"]
    command += ["--root", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    for words, code, message in (
        (["--split", "test", "--expected-images", "94"], 0, "94 images, 47 classes"),
        (["--split", "test"], 3, "error: Describable Textures (DTD), split test: ELEVATER has"),
        (["--split", "test", "--part", "2"], 2, "error: --part 2 --parts 1"),
    ):
        ended = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        assert ended.returncode == code, ended.stderr
        assert message in ended.stdout + ended.stderr


def test_folders_are_read_where_torchvision_is_not_installed(textures, tmp_path):
    as_class_folders(tmp_path / "in", textures)
    words = ["elevater.py", "--set", "dtd", "--split", "test", "--expected-images", "94"]
    words += ["--from", "folder", "--root", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    code = (
        "import sys; sys.modules.update(torch=None, torchvision=None); "
        f"from data_prep import elevater; sys.argv = {words!r}; elevater.main()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=elevater.REPOSITORY)
    assert len(samples(tmp_path / "out")) == 94
