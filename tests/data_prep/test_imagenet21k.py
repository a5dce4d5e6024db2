"""Whole ImageNet releases from made-up archives; class names against timm's lists and WordNet."""

import hashlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from data_prep import imagenet21k
from data_prep.archives import wordnet
from data_prep.sets import set_folder
from loaders.errors import ConfigError, DataError
from tests.data_prep import imagenet_layout as layout

SCRIPT = layout.ROOT / "data_prep" / "imagenet21k.py"
TIMM = Path(importlib.util.find_spec("timm").origin).parent / "data" / "_info"
# 30 classes of ImageNet-1K among 90 others.
LIST = (TIMM / "imagenet22k_synsets.txt").read_text().split()
IN1K = set(layout.SYNSETS)
CHOSEN = sorted([s for s in LIST if s in IN1K][:30] + [s for s in LIST if s not in IN1K][:90])


def make_images():
    images = layout.train_images(CHOSEN, lambda i: 1 + i % 4)
    return {synset: images[synset] for synset in reversed(CHOSEN)}


def expected(images, exclude=False):
    """The flags that state a release smaller than the official one."""
    left = {s: f for s, f in images.items() if f and not (exclude and s in IN1K)}
    return ["--expected-classes", len(left), "--expected-images", sum(map(len, left.values()))]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A release as a tar of class tars, below a folder, in no order."""
    path = tmp_path_factory.mktemp("release") / "fall11_whole.tar"
    images = make_images().items()
    path.write_bytes(layout.pack({f"./whole/{s}.tar": layout.pack(f) for s, f in images}))
    return path


def run(*arguments):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def call(monkeypatch, capsys):
    """The command in this process; what it prints."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["imagenet21k.py", *map(str, arguments)])
        imagenet21k.main()
        return capsys.readouterr().out

    return call


def shards(out):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("shards/*.tar")}


def samples(out):
    found = set()
    for path in out.glob("shards/*.tar"):
        with tarfile.open(path) as tar:
            data = [tar.extractfile(m).read() for m in tar]
        for image, label, about in zip(*[iter(data)] * 3, strict=True):
            about = json.loads(about)
            assert about["label"] == int(label)
            found.add((about["source"], image, about["label"], about["synset"]))
    return found


@pytest.mark.parametrize("exclude", [False, True])
def test_shards_are_the_archive(archive, call, tmp_path, exclude):
    arguments = ["--archive", archive, "--release", "fall11", "--out", tmp_path / "out"]
    arguments += ["--samples-per-shard", 50, *(["--exclude-in1k"] if exclude else [])]
    arguments += expected(make_images(), exclude)
    text = call(*arguments)
    truth = {}
    with tarfile.open(archive) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                synset = Path(member.name).stem
                truth[synset] = {m.name: inner.extractfile(m).read() for m in inner}
    whole, images = len(truth), sum(map(len, truth.values()))
    in1k = sum(len(files) for synset, files in truth.items() if synset in IN1K)
    if exclude:
        truth = {s: files for s, files in truth.items() if s not in IN1K}
    classes = sorted(truth)
    assert samples(tmp_path / "out") == {
        (f"{s}/{name}", data, classes.index(s), s)
        for s, files in truth.items()
        for name, data in files.items()
    }
    left = sum(map(len, truth.values()))
    name = "imagenet21k" if exclude else "imagenet22k"
    assert f"{name}: {len(classes)} classes, {left} images" in text
    assert "in1k classes in archive: 30" in text
    preparation = set_folder.load(tmp_path / "out")
    assert preparation.name == name
    assert preparation.attempted == left == len(samples(tmp_path / "out"))
    assert preparation.extra == {
        "release": "fall11",
        "release_note": "the release of the UniCL paper's ImageNet-22K",
        "classes_in_archive": whole,
        "images_in_archive": images,
        "in1k_classes_in_archive": 30,
        "in1k_images_in_archive": in1k,
        "in1k_classes_not_in_archive": sorted(IN1K - set(CHOSEN))[:10],
        "in1k_excluded": exclude,
    }
    table = set_folder.load_classes(tmp_path / "out")
    assert [entry["synset"] for entry in table] == classes
    assert [entry["id"] for entry in table] == list(range(len(classes)))
    assert all(tuple(e["names"]) == wordnet.names(e["synset"]) for e in table)


def test_winter21_says_that_it_is_not_the_papers(archive, call, tmp_path):
    common = ("--archive", archive, "--out", tmp_path / "out", *expected(make_images()))
    text = call(*common, "--release", "winter21")
    assert "release note: not ImageNet-22K of the UniCL paper" in text
    preparation = set_folder.load(tmp_path / "out")
    assert preparation.name == "imagenet_winter21"
    assert preparation.extra["release_note"].startswith("not ImageNet-22K")
    assert preparation.samples_per_shard == 10_000
    with pytest.raises(DataError, match="release: 'winter21' there, 'fall11' now"):
        call(*common, "--release", "fall11")
    others = expected(make_images(), exclude=True)
    with pytest.raises(DataError, match="exclude_in1k: False there, True now"):
        call(*common, "--release", "winter21", "--exclude-in1k", *others)


def test_folders_give_the_same_shards(archive, call, tmp_path):
    common = ["--release", "fall11", "--exclude-in1k", "--samples-per-shard", 40]
    common += expected(make_images(), exclude=True)
    call("--archive", archive, "--out", tmp_path / "tar", *common)
    layout.unpack(make_images(), tmp_path / "folders")
    (tmp_path / "tars").mkdir()
    for synset, files in make_images().items():
        (tmp_path / "tars" / f"{synset}.tar").write_bytes(layout.pack(files))
    for form in ("folders", "tars"):
        call("--archive", tmp_path / form, "--out", tmp_path / f"{form}_out", *common)
        assert shards(tmp_path / f"{form}_out") == shards(tmp_path / "tar")


def test_expected_numbers(archive, call, tmp_path):
    common = ["--archive", archive, "--release", "fall11", "--out", tmp_path / "out"]
    total = sum(map(len, make_images().values()))
    official = r"120 classes, expected 21841 \(release fall11.*--expected-classes 120"
    with pytest.raises(DataError, match=official):
        call(*common)
    with pytest.raises(DataError, match="120 classes, expected 19167"):
        call(*common[:3], "winter21", *common[4:])
    with pytest.raises(DataError, match=f"{total} images, expected 14197122"):
        call(*common, "--expected-classes", 120)
    for option, number, words in (
        ("--expected-classes", 21841, "120 classes to write, but --expected-classes 21841"),
        ("--expected-images", 9, f"{total} images to write, but --expected-images 9"),
    ):
        with pytest.raises(DataError, match=words):
            call(*common, "--expected-classes", 120, option, number)
    assert not (tmp_path / "out" / "run.yaml").exists()
    with pytest.raises(DataError, match="90 classes to write, but --expected-classes 120"):
        call(*common, "--exclude-in1k", "--expected-classes", 120)
    call(*common, "--expected-classes", 120, "--expected-images", total)
    call(*common, "--expected-classes", 120, "--expected-images", total)


def test_killed_and_started_again(archive, tmp_path):
    base = ["--archive", archive, "--release", "fall11", "--samples-per-shard", 5]
    base += expected(make_images())
    run(*base, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, SCRIPT, *map(str, base), "--out", str(out)]
    for sign in ("work", "shards/00001_stats.json", "shards/00020_stats.json"):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not list(out.glob(sign)):
            time.sleep(0.0005)
        child.kill()
        assert child.wait() == -signal.SIGKILL, "ended before it was killed"
    assert 20 <= len(set_folder.finished(out)) < len(shards(tmp_path / "whole"))
    for part in (0, 1):
        run(*base, "--out", out, "--part", part, "--parts", 2)
    assert shards(out) == shards(tmp_path / "whole")


def test_classes_without_images_are_left_out(call, tmp_path):
    images = {**make_images(), "n00004475": {}}
    images["n00005787"] = {"readme.txt": b"x", **images["n00005787"]}
    (tmp_path / "a.tar").write_bytes(layout.train_tar(images))
    text = call("--archive", tmp_path / "a.tar", "--release", "fall11", "--out", tmp_path / "out",
                *expected({**images, "n00005787": make_images()["n00005787"]}))  # fmt: skip
    # It was the first class.
    assert "note: 1 classes without images are left out: n00004475" in text
    assert "note: files without the name of an image: n00005787/readme.txt" in text
    assert set_folder.load_classes(tmp_path / "out")[0]["synset"] == "n00005787"
    assert {label for _, _, label, _ in samples(tmp_path / "out")} == set(range(119))


def test_images_named_for_another_class(call, tmp_path):
    images = make_images()
    one, two = CHOSEN[1], CHOSEN[3]
    images[one][f"{two}_77.JPEG"] = layout.picture(1)
    (tmp_path / "a.tar").write_bytes(layout.train_tar(images))
    common = ["--release", "fall11", "--out", tmp_path / "out"]
    text = call("--archive", tmp_path / "a.tar", *common, *expected(images))
    assert "note: 1 images are named for another class than they lie in" in text
    images = make_images()
    images[one], images[two] = images[two], images[one]
    (tmp_path / "b.tar").write_bytes(layout.train_tar(images))
    with pytest.raises(DataError, match=f"all . images of {one} are named for another class"):
        call("--archive", tmp_path / "b.tar", "--release", "fall11", "--out", tmp_path / "b")


def test_what_is_no_image_is_counted_not_written(call, tmp_path):
    images = make_images()
    images[CHOSEN[0]][f"{CHOSEN[0]}_99.JPEG"] = b"<html>gone</html>"
    images[CHOSEN[0]][f"{CHOSEN[0]}_98.JPEG"] = b""
    (tmp_path / "a.tar").write_bytes(layout.train_tar(images))
    call("--archive", tmp_path / "a.tar", "--release", "fall11", "--out", tmp_path / "out",
         *expected(images))  # fmt: skip
    total = sum(map(len, images.values()))
    assert len(samples(tmp_path / "out")) == total - 2
    stats = set_folder.finished(tmp_path / "out")[0]
    assert (stats["count"], stats["successes"], stats["failed_to_resize"]) == (total, total - 2, 2)
    assert sum(v for k, v in stats["status_dict"].items() if "not a jpeg" in k) == 2


def test_refusals(archive, call, tmp_path):
    out = ["--release", "fall11", "--out", tmp_path / "out"]
    packed = tmp_path / "winter21_whole.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(archive, "x.tar")
    with pytest.raises(DataError, match=f"gunzip -k {packed}"):
        call("--archive", packed, *out)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.JPEG").touch()
    with pytest.raises(DataError, match="images that are not sorted into classes"):
        call("--archive", tmp_path / "flat", *out)
    for name in ("goldfish", "1", "n0144076"):
        layout.unpack({name: {"a.JPEG": layout.picture(1)}}, tmp_path / f"in_{name}")
        with pytest.raises(DataError, match=f"not named by WNID '{name}'"):
            call("--archive", tmp_path / f"in_{name}", *out)
    layout.unpack({"n99999999": {"a.JPEG": layout.picture(1)}}, tmp_path / "unknown")
    with pytest.raises(DataError, match="no synset 'n99999999'"):
        call("--archive", tmp_path / "unknown", *out, "--expected-classes", 1,
             "--expected-images", 1)  # fmt: skip
    only = {s: {f"{s}_1.JPEG": layout.picture(1)} for s in sorted(IN1K)[:3]}
    layout.unpack(only, tmp_path / "in1k")
    with pytest.raises(DataError, match="no class is left"):
        call("--archive", tmp_path / "in1k", *out, "--exclude-in1k")
    with pytest.raises(DataError, match="no such file or folder"):
        call("--archive", tmp_path / "none", *out)
    with pytest.raises(ConfigError, match="at least 1"):
        call("--archive", archive, *out, "--samples-per-shard", 0)
    with pytest.raises(ConfigError, match="parts are numbered 0 to 1"):
        call("--archive", archive, *out, "--part", 2, "--parts", 2)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(archive.read_bytes()[:-20_000])
    with pytest.raises(DataError, match=r"truncated: member 'whole/n\d+\.tar'|truncated: member"):
        call("--archive", cut, *out)
    assert not (tmp_path / "out" / "run.yaml").exists()


def test_names_are_wordnets_as_timm_has_them():
    lines = (TIMM / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    timm = dict(line.split("\t") for line in lines)
    assert len(timm) == 21_844
    assert wordnet.read_table(wordnet.TABLE) == timm
    for path in TIMM.glob("imagenet*synsets.txt"):
        assert {line.split()[0] for line in path.read_text().splitlines()} <= timm.keys(), path
    assert wordnet.names("n02084071") == ("dog", "domestic dog", "Canis familiaris")
    assert wordnet.names("n00005787") == ("benthos",)


def test_an_unknown_synset_is_named():
    with pytest.raises(DataError, match="no synset 'n12345'"):
        wordnet.names("n12345")


def test_a_changed_table_is_refused(tmp_path):
    changed = tmp_path / "lemmas.tsv"
    shutil.copy(wordnet.TABLE, changed)
    assert wordnet.read_table(changed) == wordnet.read_table(wordnet.TABLE)
    wordnet.read_table.cache_clear()
    changed.write_bytes(changed.read_bytes().replace(b"benthos", b"Benthos"))
    with pytest.raises(DataError, match=f"expected {wordnet.SHA256}: the class names were changed"):
        wordnet.read_table(changed)
    changed.unlink()
    with pytest.raises(DataError, match="restore it from the repository"):
        wordnet.read_table(changed)


def test_the_table_carries_its_licence():
    head = [x for x in wordnet.TABLE.read_text().splitlines() if x.startswith("#")]
    text = " ".join(line[2:] for line in head)
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in text
    assert "Permission to use, copy, modify and distribute this software and database" in text
