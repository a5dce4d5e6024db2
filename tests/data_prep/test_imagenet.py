"""ImageNet-1K from made-up archives in the official layout, against tarfile's own extraction."""

import hashlib
import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import scipy.io
from PIL import Image

from data_prep import imagenet
from data_prep.sets import set_folder
from loaders.errors import DataError
from loaders.manifest import open_shards, write_manifest
from tests.data_prep import imagenet_layout as layout
from tests.data_prep.imagenet_layout import SYNSETS

SCRIPT = layout.ROOT / "data_prep" / "imagenet.py"


def run(*arguments):
    """The command, in a process of its own; its output."""
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return layout.archives(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="module")
def train(source):
    """The set made from the training archive."""
    out = source / "train"
    count = sum(map(len, layout.train_images().values()))
    text = run(
        *("--split", "train", "--tar", source / "train.tar", "--out", out),
        *("--expected-images", count, "--samples-per-shard", 100),
    )
    assert f"next: python data_prep/verify.py {out}" in text
    return out


def shards(out):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("shards/*.tar")}


def samples(out):
    """(image extension, image, class, json) of every sample in shard order, by tarfile."""
    found = []
    for path in sorted(out.glob("shards/*.tar")):
        with tarfile.open(path) as tar:
            members = [(m.name, tar.extractfile(m).read()) for m in tar]
        for image, label, about in zip(*[iter(members)] * 3, strict=True):
            key = image[0].partition(".")[0]
            assert [label[0], about[0]] == [f"{key}.cls", f"{key}.json"]
            found.append((image[0].partition(".")[2], image[1], label[1], json.loads(about[1])))
    return found


def extracted(archive, into):
    """Every class archive unpacked by tarfile: WNID -> name -> bytes."""
    with tarfile.open(archive) as tar:
        tar.extractall(into, filter="data")
    found = {}
    for path in sorted(into.iterdir()):
        with tarfile.open(path) as tar:
            found[path.stem] = {m.name: tar.extractfile(m).read() for m in tar}
    return found


def test_training_shards_are_the_archive(source, train, tmp_path):
    truth = extracted(source / "train.tar", tmp_path)
    rank = {synset: i for i, synset in enumerate(sorted(truth))}
    assert len(rank) == 1000
    expected = {
        (f"train/{synset}/{name}", data, b"%d" % rank[synset], synset)
        for synset, files in truth.items()
        for name, data in files.items()
    }
    found = samples(train)
    assert len(found) == len(expected) == 1502
    assert {(a["source"], data, label, a["synset"]) for _, data, label, a in found} == expected
    assert all(a["label"] == int(label) for _, _, label, a in found)
    for extension, data, _, _ in found:
        assert Image.open(io.BytesIO(data)).format == {"jpg": "JPEG", "png": "PNG"}[extension]
    assert [extension for extension, *_ in found].count("png") == 1
    modes = [Image.open(io.BytesIO(data)).mode for _, data, _, _ in found]
    assert modes.count("CMYK") == 1
    first = {label for _, _, label, _ in found[:100]}
    assert len(first) > 80  # the classes are mixed


def test_our_loader_reads_the_set(train):
    preparation = set_folder.load(train)
    assert (preparation.name, preparation.kind, preparation.attempted) == (
        "imagenet1k_train",
        "image_label",
        1502,
    )
    classes = set_folder.load_classes(train)
    assert classes == layout.TABLE
    facts = (preparation.source, preparation.license, preparation.date, preparation.attempted)
    write_manifest(train, preparation.name, preparation.kind, classes, *facts)
    shard_set = open_shards(train)
    (train / "manifest.json").unlink()
    found = samples(train)
    assert len(shard_set) == len(found)
    assert shard_set.labels.tolist() == [int(label) for _, _, label, _ in found]
    assert [shard_set.read_image(i) for i in range(len(found))] == [data for _, data, _, _ in found]
    assert shard_set.classes[65].synset == "n01751748"


def test_all_forms_of_the_source_give_the_same_shards(source, train, tmp_path):
    images = layout.train_images()
    layout.unpack(images, tmp_path / "folders")
    (tmp_path / "folders" / ".DS_Store").touch()
    (tmp_path / "tars").mkdir()
    for synset, files in images.items():
        (tmp_path / "tars" / f"{synset}.tar").write_bytes(layout.pack(files))
    (tmp_path / "sorted.tar").write_bytes(layout.train_tar(images, sorted(images)))
    for form in ("--folder folders", "--folder tars", "--tar sorted.tar"):
        option, name = form.split()
        out = tmp_path / f"out_{name}"
        run(
            *("--split", "train", option, tmp_path / name, "--out", out),
            *("--expected-images", 1502, "--samples-per-shard", 100),
        )
        assert shards(out) == shards(train), form
    # So the archive may go on where the unpacked folder stopped.
    (out / "shards" / "00003_stats.json").unlink()
    run(
        *("--split", "train", "--tar", source / "train.tar", "--out", out),
        *("--expected-images", 1502, "--samples-per-shard", 100),
    )
    assert shards(out) == shards(train)


def test_parts_make_the_whole(source, train, tmp_path):
    command = ["--split", "train", "--tar", source / "train.tar", "--out", tmp_path]
    command += ["--expected-images", 1502, "--samples-per-shard", 100, "--parts", 3]
    children = [
        subprocess.Popen([sys.executable, SCRIPT, *map(str, command), "--part", str(k)])
        for k in (0, 2)
    ]
    assert [child.wait() for child in children] == [0, 0]
    assert sorted(set_folder.finished(tmp_path)) == [s for s in range(16) if s % 3 != 1]
    text = run(*command, "--part", 1)
    assert "of other parts" not in text
    assert shards(tmp_path) == shards(train)


def test_a_part_says_what_other_parts_owe(source, tmp_path):
    text = run(
        *("--split", "train", "--tar", source / "train.tar", "--out", tmp_path),
        *("--expected-images", 1502, "--samples-per-shard", 100, "--parts", 2),
    )
    assert "8 shards of other parts are not finished" in text


def test_killed_and_started_again(source, tmp_path):
    """Killed while indexing, at the start, and between shards; the rest is made, nothing else."""
    base = ["--split", "train", "--tar", source / "train.tar", "--expected-images", "1502"]
    base += ["--samples-per-shard", "20"]
    run(*base, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    command = [sys.executable, SCRIPT, *map(str, base), "--out", str(out)]
    signs = ["work", "run.yaml", "shards/*_stats.json", "shards/000[12]0_stats.json"]
    for sign in [*signs, "shards/00040_stats.json"]:
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not list(out.glob(sign)):
            time.sleep(0.0005)
        child.kill()
        assert child.wait() == -signal.SIGKILL, "ended before it was killed"
        done = set_folder.finished(out)
        whole, now = shards(tmp_path / "whole"), shards(out)
        assert all(now[f"{s:05d}.tar"] == whole[f"{s:05d}.tar"] for s in done)
        inodes = {s: (out / "shards" / f"{s:05d}.tar").stat().st_ino for s in done}
    assert 40 <= len(done) < 76
    run(*base, "--out", out)
    assert shards(out) == shards(tmp_path / "whole")
    assert len(shards(out)) == 76
    for shard, inode in inodes.items():
        assert (out / "shards" / f"{shard:05d}.tar").stat().st_ino == inode


def test_validation_labels_come_from_the_kit(source, tmp_path):
    out = tmp_path / "val"
    run(
        *("--split", "val", "--tar", source / "val.tar", "--devkit", source / "devkit.tar.gz"),
        *("--out", out, "--expected-images", layout.VAL, "--samples-per-shard", 50),
    )
    with tarfile.open(source / "devkit.tar.gz") as kit:
        read = {Path(m.name).name: kit.extractfile(m).read() for m in kit}
    meta = scipy.io.loadmat(io.BytesIO(read["meta.mat"]))["synsets"][:, 0]
    leaves = {
        int(row["ILSVRC2012_ID"][0, 0]): str(row["WNID"][0])
        for row in meta
        if row["num_children"][0, 0] == 0
    }
    assert len(meta) == 1860
    ids = [int(x) for x in read["ILSVRC2012_validation_ground_truth.txt"].split()]
    with tarfile.open(source / "val.tar") as tar:
        images = {m.name: tar.extractfile(m).read() for m in tar}
    ranks = sorted(leaves.values())
    expected = {
        (f"val/{name}", data, ranks.index(leaves[number]), leaves[number])
        for (name, data), number in zip(sorted(images.items()), ids, strict=True)
    }
    found = samples(out)
    assert {(a["source"], d, a["label"], a["synset"]) for _, d, _, a in found} == expected
    assert len(found) == layout.VAL
    assert any(leaves[number] != ranks[number - 1] for number in ids)


def test_validation_in_folders_gives_the_same_shards(source, tmp_path, monkeypatch):
    ids = {number: synset for synset, number in layout.devkit_ids().items()}
    with tarfile.open(source / "devkit.tar.gz") as kit:
        name = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
        truth = [ids[int(x)] for x in kit.extractfile(name).read().split()]
    # Every class must have an image, so each gets one more than the made-up archive has.
    extra = [s for s in SYNSETS if s not in truth]
    names = list(layout.val_images(layout.VAL + len(extra)).items())
    for synset, (name, data) in zip(truth + extra, names, strict=True):
        (tmp_path / "sorted" / synset).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sorted" / synset / name).write_bytes(data)
    (tmp_path / "flat").mkdir()
    for name, data in names:
        (tmp_path / "flat" / name).write_bytes(data)
    numbers = layout.devkit_ids()
    kit = layout.devkit(tmp_path / "kit.tar.gz", [numbers[s] for s in truth + extra])
    common = ["--split", "val", "--expected-images", len(names), "--samples-per-shard", 300]
    for name, more in (("sorted", []), ("flat", ["--devkit", kit])):
        run(*common, "--folder", tmp_path / name, "--out", tmp_path / f"{name}_out", *more)
    assert shards(tmp_path / "sorted_out") == shards(tmp_path / "flat_out")
    run(*common, "--folder", tmp_path / "sorted", "--out", tmp_path / "both", "--devkit", kit)
    assert shards(tmp_path / "both") == shards(tmp_path / "flat_out")
    # The kit knows better than the folders.
    swapped = [numbers[s] for s in [truth[1], truth[0], *truth[2:], *extra]]
    layout.devkit(kit, swapped)
    monkeypatch.setattr(sys, "argv", ["imagenet.py", "--devkit", str(kit), "--out"])
    sys.argv += [str(tmp_path / "x"), "--folder", str(tmp_path / "sorted"), *map(str, common)]
    with pytest.raises(DataError, match="2 images lie in another class folder than") as error:
        imagenet.main()
    assert f"{names[0][0]}: in {truth[0]}, but it is {truth[1]}" in str(error.value)


def test_a_finished_set_is_left_alone(source, train):
    before = {p: p.stat().st_mtime_ns for p in train.rglob("*.tar")}
    index = train / "work" / "images.npz"
    stamp = index.stat().st_mtime_ns
    run(
        *("--split", "train", "--tar", source / "train.tar", "--out", train),
        *("--expected-images", 1502, "--samples-per-shard", 100),
    )
    assert {p: p.stat().st_mtime_ns for p in train.rglob("*.tar")} == before
    assert index.stat().st_mtime_ns == stamp


def test_another_set_in_the_folder(source, train):
    command = [SCRIPT, "--split", "train", "--tar", source / "train.tar", "--out", train]
    command += ["--expected-images", "1502", "--samples-per-shard", "99"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 3
    assert "samples_per_shard: 100 there, 99 now" in done.stderr
