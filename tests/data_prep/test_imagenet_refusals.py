"""ImageNet sources that are refused: counts, sums, options, misordered folders, strange kits."""

import hashlib
import importlib.util
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep import imagenet
from data_prep.archives import imagenet_devkit, imagenet_set
from loaders.errors import ConfigError, DataError
from tests.data_prep import imagenet_layout as layout
from tests.data_prep.imagenet_layout import SYNSETS


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return layout.archives(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """Call the command with arguments it refuses; the message. Nothing may have been written."""

    def call(*arguments, error=DataError):
        out = tmp_path / "refused"
        monkeypatch.setattr(sys, "argv", ["imagenet.py", *map(str, arguments), "--out", str(out)])
        with pytest.raises(error) as caught:
            imagenet.main()
        assert not (out / "run.yaml").exists()
        return str(caught.value)

    return call


def installed(package):
    """Folder of an installed package, which takes seconds to import."""
    return Path(importlib.util.find_spec(package).origin).parent


def test_counts_are_checked(source, refused):
    message = refused("--split", "train", "--tar", source / "train.tar")
    assert "1502 images, expected 1281167 (train of ILSVRC2012)" in message
    message = refused(
        *("--split", "val", "--tar", source / "val.tar", "--devkit", source / "devkit.tar.gz")
    )
    assert f"{layout.VAL} images, expected 50000" in message
    message = refused("--split", "train", "--tar", source / "train.tar", "--expected-images", 7)
    assert "1502 images, expected 7" in message


def test_md5_is_checked(source, refused, tmp_path):
    path = source / "val.tar"
    message = refused(
        *("--split", "val", "--tar", path, "--devkit", source / "devkit.tar.gz", "--check-md5")
    )
    found = hashlib.md5(path.read_bytes()).hexdigest()
    assert f"md5 {found}, but the official archive has 29b22e2961454d5413ddabcf34fc5622" in message
    imagenet.check_md5(path, found)
    text = (installed("torchvision") / "datasets" / "imagenet.py").read_text()
    assert set(imagenet.MD5.values()) == set(re.findall(r'"([0-9a-f]{32})"', text))


def test_options_that_do_not_fit(source, refused, tmp_path):
    tar, kit = source / "train.tar", source / "devkit.tar.gz"
    for arguments, words in (
        (["--split", "train", "--tar", tar, "--devkit", kit], "--split val only"),
        (["--split", "train", "--folder", tmp_path, "--check-md5"], "name --tar"),
        (["--split", "train", "--tar", tmp_path], "name it with --folder"),
        (["--split", "train", "--folder", tar], "say --tar"),
        (["--split", "train", "--tar", tar, "--samples-per-shard", 0], "at least 1"),
        (["--split", "train", "--tar", tar, "--part", 2, "--parts", 2], "numbered 0 to 1"),
    ):
        assert words in refused(*arguments, error=ConfigError)
    message = refused("--split", "train", "--tar", tmp_path / "none.tar")
    assert message == f"{tmp_path / 'none.tar'}: no such file or folder"


def small(names, folder):
    """Class folders of these names with an image each."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "a.JPEG").write_bytes(b"\xff\xd8\xff")
    return folder


@pytest.mark.parametrize("low", [0, 1])
def test_numbered_folders_are_explained(low, refused, tmp_path):
    small(map(str, range(low, low + 1000)), tmp_path / "in")
    message = refused("--split", "train", "--folder", tmp_path / "in")
    assert f"1000 class folders named by number, from {low}" in message
    assert f"{low} is n01440764 (tench)" in message
    text = ", ".join(sorted(map(str, range(low, low + 1000)))[:4])
    assert f"sorted as text ({text}, …)" in message


def test_padded_numbers_are_explained(refused, tmp_path):
    small((f"{i:04d}" for i in range(1000)), tmp_path / "in")
    assert "named by number, from 0" in refused("--split", "val", "--folder", tmp_path / "in")


def test_named_folders_are_explained(refused, tmp_path):
    small(["goldfish", "tench", *SYNSETS[2:]], tmp_path / "in")
    message = refused("--split", "train", "--folder", tmp_path / "in")
    assert "2 class folders that are not named by WNID, such as n01440764: 'goldfish'" in message


def test_the_folder_above_is_explained(refused, tmp_path):
    small(["train", "val"], tmp_path / "in")
    message = refused("--split", "train", "--folder", tmp_path / "in")
    assert "holds train, val: name the folder of one split" in message


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (SYNSETS[:-1], "1 are missing, n15075141 (toilet paper); 0 are others"),
        ([*SYNSETS, "n00004475"], "0 are missing; 1 are others, n00004475"),
        (
            ["n00004475", *SYNSETS[1:]],
            "1000 class folders, but they are not the 1000 classes of ImageNet-1K",
        ),
        (SYNSETS[:100], "100 class folders, but they are not the 1000"),
    ],
)
def test_other_wnids_are_explained(names, words, refused, tmp_path):
    small(names, tmp_path / "in")
    assert words in refused("--split", "train", "--folder", tmp_path / "in")


def test_images_of_another_class_are_found(refused, tmp_path):
    images = layout.train_images()
    one, two = SYNSETS[10], SYNSETS[20]
    images[one], images[two] = images[two], images[one]
    wrong = len(images[one]) + len(images[two])
    message = refused("--split", "train", "--folder", layout.unpack(images, tmp_path / "in"))
    assert f"{wrong} images are named for another class than the one they lie in" in message
    assert one in message
    (tmp_path / "train.tar").write_bytes(layout.train_tar(images))
    assert "named for another class" in refused("--split", "train", "--tar", tmp_path / "train.tar")


def test_a_class_without_images_is_found(refused, tmp_path):
    images = layout.train_images()
    folder_ = layout.unpack(images, tmp_path / "in")
    (folder_ / SYNSETS[5] / "images").mkdir()
    for path in (folder_ / SYNSETS[5]).glob("*.JPEG"):
        path.rename(path.parent / "images" / path.name)
    message = refused("--split", "train", "--folder", folder_)
    assert f"no image (*.JPEG) in 1 of 1000 classes: {SYNSETS[5]}" in message


def test_the_wrong_split_is_explained(source, refused):
    message = refused("--split", "train", "--tar", source / "val.tar")
    assert "images that are not sorted into classes" in message
    assert "--split val --devkit" in message
    message = refused("--split", "val", "--tar", source / "train.tar", "--expected-images", 1502)
    assert "class archives; validation images are one archive or folder" in message


def test_validation_without_the_kit(source, refused, tmp_path):
    (tmp_path / "flat").mkdir()
    for name, data in layout.val_images(3).items():
        (tmp_path / "flat" / name).write_bytes(data)
    for arguments in (["--tar", source / "val.tar"], ["--folder", tmp_path / "flat"]):
        message = refused("--split", "val", *arguments)
        assert "their labels are in the development kit: --devkit" in message


@pytest.mark.parametrize(
    ("truth", "words"),
    [
        ([0, 999, 5], "IDs 0 to 999, expected 1 to 1000: they look 0-based"),
        ([1, 1001, 5], "IDs 1 to 1001, expected 1 to 1000: they are another list"),
        ([1, 2, "n01440764"], "line 3: b'n01440764' is no class ID"),
        ([1, -2, 3], "line 2: b'-2' is no class ID"),
        ([1, "", 3], "line 2: b'' is no class ID"),
        ([1, 2], "has 3 images, but the ground truth of"),
        ([1, 2, 3, 4], "has 4 lines; one of the two is not complete"),
    ],
)
def test_strange_ground_truth(truth, words, refused, tmp_path):
    (tmp_path / "val.tar").write_bytes(layout.pack(layout.val_images(3)))
    kit = layout.devkit(tmp_path / "kit.tar.gz", truth)
    message = refused("--split", "val", "--tar", tmp_path / "val.tar", "--devkit", kit)
    assert words in message


def test_ground_truth_of_another_editor(tmp_path):
    data = "\ufeff3\r\n1\r\n\r\n".encode()
    assert imagenet_devkit._parse_truth(tmp_path, data, 3) == [3, 1]


def test_strange_kits(source, refused, tmp_path):
    (tmp_path / "val.tar").write_bytes(layout.pack(layout.val_images(3)))
    val = ("--split", "val", "--tar", tmp_path / "val.tar", "--devkit")
    kit, ids = tmp_path / "kit.tar.gz", layout.devkit_ids()
    other = {**ids, "n00004475": ids["n01440764"]}
    del other["n01440764"]
    layout.devkit(kit, [1, 2, 3], other)
    assert "2 differences from the 1000 classes of ImageNet-1K" in refused(*val, kit)
    layout.devkit(kit, [1, 2, 3], {synset: number - 1 for synset, number in ids.items()})
    assert "with IDs 0 to 999" in refused(*val, kit)
    layout.devkit(kit, [1, 2, 3], meta=b"no matlab")
    assert "cannot read data/meta.mat" in refused(*val, kit)
    layout.devkit(kit, [1, 2, 3])
    kit.write_bytes(kit.read_bytes()[:5000])
    assert "cannot read the development kit" in refused(*val, kit)
    kit.write_bytes(b"no tar")
    assert "cannot read the development kit" in refused(*val, kit)
    assert "no data/meta.mat and no data/ILSVRC2012" in refused(*val, source / "val.tar")


def test_a_missing_validation_image_shifts_no_labels(refused, tmp_path):
    images = layout.val_images(4)
    del images["ILSVRC2012_val_00000002.JPEG"]
    (tmp_path / "val.tar").write_bytes(layout.pack(images))
    kit = layout.devkit(tmp_path / "kit.tar.gz", [1, 2, 3])
    message = refused("--split", "val", "--tar", tmp_path / "val.tar", "--devkit", kit)
    assert "ILSVRC2012_val_00000003.JPEG is image 2 by sorted name" in message


def test_the_real_set_is_known_by_its_first_images():
    names = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(50_000)]
    labels = np.zeros(50_000, np.int32)
    labels[:4] = [65, 970, 230, 809]
    imagenet_devkit.check_order(names, labels, SYNSETS)
    labels[1] = 971
    with pytest.raises(DataError, match=f"00000002.JPEG has class {SYNSETS[971]}, but it is n0919"):
        imagenet_devkit.check_order(names, labels, SYNSETS)
    imagenet_devkit.check_order(names[:49_999], labels[:49_999], SYNSETS)


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.1])
def test_an_archive_that_was_cut_short(source, keep, refused, tmp_path):
    data = (source / "train.tar").read_bytes()
    cut = tmp_path / "train.tar"
    cut.write_bytes(data[: int(len(data) * keep)])
    message = refused("--split", "train", "--tar", cut)
    assert "truncated" in message
    assert ".tar" in message.partition("truncated")[2]  # the member


def test_a_compressed_archive(source, refused, tmp_path):
    packed = tmp_path / "train.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(source / "train.tar", "train.tar")
    message = refused("--split", "train", "--tar", packed)
    assert f"unpack it once: gunzip -k {packed}" in message


def test_classes_of_the_table_are_timms():
    """The labels of the set are those of the class names: rank of the sorted WNIDs."""
    lines = (installed("timm") / "data" / "_info" / "imagenet_synsets.txt").read_text().split()
    table = imagenet_set.read_classes()
    assert [entry["synset"] for entry in table] == lines == sorted(SYNSETS)
    assert [entry["id"] for entry in table] == list(range(1000))
