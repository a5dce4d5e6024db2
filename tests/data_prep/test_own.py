"""own.py folders: classes of any depth, what is passed over, splits, parts, and wrong folders."""

import io
import os
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from data_prep.archives import class_folders
from data_prep.sets import set_folder, split
from loaders.errors import ConfigError, DataError
from tests.data_prep.own_parts import (
    folders,
    images,
    manifest,
    opened,
    picture,
    put,
    run,
    sources,
    tars,
)


def test_the_class_is_the_path_of_the_folder(tmp_path, monkeypatch):
    counts = {"animals/golden_retriever": 3, "animals": 1, "cafe\u0301": 2, "z/z/bird": 1}
    written = folders(tmp_path / "in", counts)
    run(monkeypatch, "folders", tmp_path / "in", "--out", tmp_path / "D")
    shards = opened(tmp_path / "D")
    assert (shards.name, shards.kind) == ("D", "image_label")
    names = [entry.names for entry in shards.classes]
    assert names == [("animals",), ("golden retriever",), ("caf\u00e9",), ("bird",)]
    of = {"animals": 0, "animals/golden_retriever": 1, "cafe\u0301": 2, "z/z/bird": 3}
    found = sources(shards)
    assert {n: (shards.read_image(i), shards.label(i)) for n, i in found.items()} == {
        name: (data, of[name.rpartition("/")[0]]) for name, data in written.items()
    }


def test_equal_last_parts_are_told_apart_by_the_whole_path(tmp_path, monkeypatch):
    folders(tmp_path / "in", {"birds/crane": 1, "machines/crane": 1, "machines/fork_lift": 1})
    run(monkeypatch, "folders", tmp_path / "in", "--out", tmp_path / "D")
    table = set_folder.load_classes(tmp_path / "D")
    assert [entry["names"] for entry in table] == [
        ["birds crane"],
        ["machines crane"],
        ["fork lift"],
    ]


SYSTEM = {  # file or folder -> what it is counted as
    "cat/.DS_Store": ".DS_Store",
    "cat/._1.jpg": "._*",
    "cat/.hidden.jpg": ".*",
    "cat/Thumbs.db": "Thumbs.db",
    "cat/desktop.ini": "desktop.ini",
    "cat/1.jpg:Zone.Identifier": "*:zone.identifier",
    "@eaDir/cat/1.jpg": "@eaDir",
    "__MACOSX/cat/1.jpg": "__MACOSX",
    ".ipynb_checkpoints/1.jpg": ".ipynb_checkpoints",
    "cat/.ipynb_checkpoints/1.jpg": ".ipynb_checkpoints",
    "lost+found/cat/1.jpg": "lost+found",
    "$RECYCLE.BIN/1.jpg": "$RECYCLE.BIN",
    "System Volume Information/1.jpg": "System Volume Information",
    ".Trash-1000/1.jpg": ".Trash-1000",
    ".thumbnails/1.jpg": ".thumbnails",
    "cat/notes.txt": class_folders.OTHER,
}


def test_what_systems_leave_in_folders_is_passed_over_and_counted(tmp_path, monkeypatch, capsys):
    place = tmp_path / "in"
    written = folders(place, {"cat": 2, "dog": 1})
    for name in SYSTEM:
        put(place / name, picture(99))
    (place / "cat/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (place / "dog/up").symlink_to(place)
    put(tmp_path / "elsewhere/5.jpg", picture(50))
    (place / "ox").symlink_to(tmp_path / "elsewhere")  # a folder of images on another disk
    run(monkeypatch, "folders", place, "--out", tmp_path / "D")
    shards = opened(tmp_path / "D")
    assert sorted(sources(shards)) == sorted([*written, "ox/5.jpg"])
    expected = {what: list(SYSTEM.values()).count(what) for what in SYSTEM.values()}
    expected |= {class_folders.LINKS: 1, "links that lead back to a folder above": 1}
    assert manifest(tmp_path / "D")["passed_over"] == expected
    printed = capsys.readouterr().out
    for what, count in expected.items():
        assert f"passed over, {what}: {count}\n" in printed
    assert "not named as images: cat/notes.txt\n" in printed


def test_files_that_are_no_images_are_named_and_counted(tmp_path, monkeypatch, capsys):
    folders(tmp_path / "in", {"cat": 3})
    put(tmp_path / "in/cat/page.jpg", b"<html>")
    put(tmp_path / "in/cat/empty.png", b"")
    put(tmp_path / "in/cat/cut.bmp", picture(7, "BMP")[:60])
    put(tmp_path / "in/cat/cut.jpg", picture(8)[:-200])  # begins as one: verify.py finds it
    run(monkeypatch, "folders", tmp_path / "in", "--out", tmp_path / "D")
    printed = capsys.readouterr().out
    for name in ("page.jpg", "empty.png", "cut.bmp"):
        assert f"cat/{name}: not a jpeg, png or webp image; left out\n" in printed
    assert "left out, not a jpeg, png or webp image: 3\n" in printed
    (stats,) = set_folder.finished(tmp_path / "D").values()
    assert stats["status_dict"] == {"success": 4, "not a jpeg, png or webp image": 3}
    with pytest.raises(AssertionError):
        opened(tmp_path / "D")
    assert "image: " in (tmp_path / "D/bad_samples.tsv").read_text()
    assert manifest(tmp_path / "D")["yield"] == {"attempted": 7, "kept": 4}


def test_other_formats_become_png(tmp_path, monkeypatch):
    forms = {"bmp": "BMP", "gif": "GIF", "tiff": "TIFF", "ppm": "PPM"}
    for number, (end, form) in enumerate(forms.items()):
        put(tmp_path / f"in/cat/{end}.{end}", picture(number, form))
    put(tmp_path / "in/cat/w.jpg", picture(9, "WEBP"))  # named wrongly: the content decides
    run(monkeypatch, "folders", tmp_path / "in", "--out", tmp_path / "D")
    shards = opened(tmp_path / "D")
    found = {n: shards.read_image(i) for n, i in sources(shards).items()}
    assert found.pop("cat/w.jpg") == picture(9, "WEBP")
    for number, (end, form) in enumerate(forms.items()):
        image = Image.open(io.BytesIO(found[f"cat/{end}.{end}"]))
        assert image.format == "PNG"
        original = Image.open(io.BytesIO(picture(number, form))).convert("RGB")
        assert image.convert("RGB").tobytes() == original.tobytes()


@pytest.mark.parametrize("end", ["tsv", "csv"])
def test_a_table_of_names_decides_names_and_numbers(tmp_path, monkeypatch, capsys, end):
    comma = {"tsv": "\t", "csv": ","}[end]
    lines = ["n02084071{}dog{}hound", "ox{}ox", "sub/n02121620/{}cat"]
    text = "\r\n".join(lines).replace("{}", comma)
    (tmp_path / f"names.{end}").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    folders(tmp_path / "in", {"n02084071": 2, "sub/n02121620": 1})
    words = ["folders", tmp_path / "in", "--names", tmp_path / f"names.{end}"]
    run(monkeypatch, *words, "--out", tmp_path / "D")
    shards = opened(tmp_path / "D")
    assert [entry.names for entry in shards.classes] == [("dog", "hound"), ("ox",), ("cat",)]
    assert [entry.synset for entry in shards.classes] == ["n02084071", None, None]
    assert sorted(shards.labels.tolist()) == [0, 0, 2]
    assert "without an image: 1 classes, ox" in capsys.readouterr().out
    put(tmp_path / "in/new_one/1.jpg", picture(1))
    with pytest.raises(DataError, match="no line for 1 of 3 classes: 'new_one'"):
        run(monkeypatch, *words, "--out", tmp_path / "E")
    assert not (tmp_path / "E/run.yaml").exists()


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({}, "no image in it or below it"),
        ({"1.jpg": 1, "cat/1.jpg": 2}, "1 images lie in it without a class folder"),
        ({"train/cat/1.jpg": 1, "Val/cat/1.jpg": 2}, r"these are splits, not classes.*in/Val"),
        ({"0/1.jpg": 1, "1/1.jpg": 2}, r"are numbers \('0', '1'\).*--names"),
        ({"n02084071/1.jpg": 1}, r"are WordNet ids.*--names"),
    ],
)
def test_folders_that_make_no_set_are_refused(tmp_path, monkeypatch, there, message):
    (tmp_path / "in").mkdir()
    for name, number in there.items():
        put(tmp_path / "in" / name, picture(number))
    with pytest.raises(DataError, match=message):
        run(monkeypatch, "folders", tmp_path / "in", "--out", tmp_path / "D")
    assert not (tmp_path / "D/run.yaml").exists()


def test_a_table_of_names_that_is_none(tmp_path, monkeypatch):
    folders(tmp_path / "in", {"cat": 1})
    for text, message in (
        ("cat\tcat\ndog\n", r"names\.tsv, line 2: not a key and its name"),
        ("cat\t \n", "line 1: not a key"),
        ("cat\ta\ncat\tb\n", "line 2: 'cat' stands twice"),
        ("", "no lines"),
    ):
        (tmp_path / "names.tsv").write_text(text)
        with pytest.raises(DataError, match=message):
            run(monkeypatch, "folders", tmp_path / "in", "--out", tmp_path / "D",
                "--names", tmp_path / "names.tsv")  # fmt: skip


# Restart, parts and other folders.


def test_parts_and_restarts_give_the_bytes_of_one_run(tmp_path, monkeypatch, capsys):
    folders(tmp_path / "in", {"cat": 7, "dog": 6})
    words = ["folders", tmp_path / "in", "--samples-per-shard", 3, "--name", "own"]
    run(monkeypatch, *words, "--out", tmp_path / "D")
    assert len(tars(tmp_path / "D")) == 5
    capsys.readouterr()
    run(monkeypatch, *words, "--out", tmp_path / "E", "--part", 1, "--parts", 2)
    assert sorted(tars(tmp_path / "E")) == ["00001.tar", "00003.tar"]
    assert "3 shards of other parts are not finished yet" in capsys.readouterr().out
    (tmp_path / "E/shards/00003_stats.json").write_text('{"count"')  # killed while it was written
    run(monkeypatch, *words, "--out", tmp_path / "E")
    assert tars(tmp_path / "E") == tars(tmp_path / "D")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "E/shards").iterdir()}
    run(monkeypatch, *words, "--out", tmp_path / "E")  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "E/shards").iterdir()} == before
    capsys.readouterr()
    put(tmp_path / "in/cat/new.jpg", picture(77))
    with pytest.raises(DataError, match=r"holds another set .*images_sha256: other images"):
        run(monkeypatch, *words, "--out", tmp_path / "E")


def test_a_new_file_deep_below_is_seen(tmp_path, monkeypatch):
    """The index is kept while no folder changes."""
    folders(tmp_path / "in", {"a/b/c/d": 2})
    first = class_folders.open_class_folders(tmp_path / "in", tmp_path / "D")
    stored = (tmp_path / "D/work/images.npz").stat().st_mtime_ns
    assert class_folders.open_class_folders(tmp_path / "in", tmp_path / "D").digest == first.digest
    assert (tmp_path / "D/work/images.npz").stat().st_mtime_ns == stored
    put(tmp_path / "in/a/b/c/d/new.jpg", picture(1))
    assert len(class_folders.open_class_folders(tmp_path / "in", tmp_path / "D")) == 3


# Splits.


def test_both_sides_hold_every_image_once_under_one_class_table(tmp_path, monkeypatch, capsys):
    written = folders(tmp_path / "in", {"cat": 13, "dog": 6, "ox": 1})
    words = ["folders", tmp_path / "in", "--out", tmp_path / "D", "--validation", "0.25"]
    run(monkeypatch, *words)
    assert "without an image: 1 classes, ox" in capsys.readouterr().out  # on one of the sides
    train, held = opened(tmp_path / "D/train"), opened(tmp_path / "D/validation")
    assert (train.name, held.name) == ("D_train", "D_validation")
    assert (len(train), len(held)) == (15, 5)
    assert train.classes == held.classes
    assert sorted([*sources(train), *sources(held)]) == sorted(written)
    expected = {(name.split("/")[0], data): 1 for name, data in written.items()}
    assert images(train) + images(held) == expected
    ranks = {name: split.group_hash(0, name) for name in written}
    assert set(sources(held)) == set(sorted(written, key=ranks.get)[:5])
    with pytest.raises(DataError, match="validation: '1/4' there, '1/5' now"):
        run(monkeypatch, *words[:-1], "0.2")
    run(monkeypatch, *words[:3], tmp_path / "E", *words[4:], "--seed", 1)
    assert set(sources(opened(tmp_path / "E/validation"))) != set(sources(held))


def test_a_split_and_a_whole_set_do_not_share_a_folder(tmp_path, monkeypatch):
    folders(tmp_path / "in", {"cat": 4})
    words = ["folders", tmp_path / "in", "--out", tmp_path / "D"]
    run(monkeypatch, *words)
    with pytest.raises(DataError, match="holds a set that is not split"):
        run(monkeypatch, *words, "--validation", "0.5")
    words[-1] = tmp_path / "E"
    run(monkeypatch, *words, "--validation", "0.5")
    with pytest.raises(DataError, match="not empty"):
        run(monkeypatch, *words)


def test_the_limit_takes_whole_groups_nearest_to_the_share():
    sizes = {10: 3, 20: 5, 30: 2, 40: 10}  # hash of a group -> its images
    hashes = np.repeat(np.array(list(sizes), np.uint64), list(sizes.values()))
    np.random.default_rng(0).shuffle(hashes)
    for share, limit in (("0.01", 10), ("0.2", 10), ("0.3", 20), ("0.46", 30), ("0.99", 30)):
        assert split.validation_limit(hashes, Fraction(share), "x") == limit
        mask = split.is_validation(hashes, limit)
        assert mask.tolist() == [value <= limit for value in hashes.tolist()]
    with pytest.raises(DataError, match="x: 1 groups in 3 images"):
        split.validation_limit(np.full(3, 7, np.uint64), Fraction("0.5"), "x")


def test_options_that_do_not_fit(tmp_path, monkeypatch, capsys):
    with pytest.raises(DataError, match="no such folder"):
        run(monkeypatch, "folders", tmp_path / "none", "--out", tmp_path / "D")
    for share in ("0", "1", "x"):
        with pytest.raises(SystemExit):
            run(monkeypatch, "folders", tmp_path, "--out", tmp_path / "D", "--validation", share)
        assert "is not a number between 0 and 1" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--part 2 --parts 2"):
        run(monkeypatch, "folders", tmp_path, "--out", tmp_path / "D", "--part", 2, "--parts", 2)
    assert os.listdir(tmp_path) == []
