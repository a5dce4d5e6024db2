"""Images read by name from folders, zips and tars."""

import multiprocessing
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.archives.image_source import ImagesByName, image_extension, open_images
from data_prep.sets.shard_writer import Unusable
from loaders.errors import DataError
from tests.loaders.conftest import encoded, write_tar

FILES = {"b/2.png": b"two", "a.jpg": b"one", "b/c/3": b""}


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images/", b"")  # a folder entry, as in the official zips
        for name, data in files.items():
            file.writestr(name, data)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.fixture(params=["folder", "zip", "tar"])
def source(request, tmp_path):
    make = {
        "folder": lambda: write_folder(tmp_path / "images", FILES),
        "zip": lambda: write_zip(tmp_path / "images", FILES),
        "tar": lambda: write_tar(tmp_path / "images", list(FILES.items()), tarfile.GNU_FORMAT),
    }
    return open_images(make[request.param]())


def test_names_and_contents(source):
    assert source.names() == ["a.jpg", "b/2.png", "b/c/3"]
    assert {name: source.read(name) for name in source.names()} == FILES
    for absent in ("b", "c", "a.jpg/x"):
        with pytest.raises(DataError, match=f"no file '{absent}'"):
            source.read(absent)


BIG = {str(n): bytes([n]) * 300_000 for n in range(8)}


def read_often(source, answers=None) -> bool:
    same = all(source.read(name) == data for _ in range(40) for name, data in BIG.items())
    return same if answers is None else answers.put(same)


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_processes_do_not_disturb_each_other(tmp_path, form):
    """After a fork, processes that share an open file would move each other's position."""
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "images", "w") as file:
            for name, data in BIG.items():
                file.writestr(name, data)
    else:
        write_tar(tmp_path / "images", list(BIG.items()))
    source = open_images(tmp_path / "images")
    assert source.read("3") == BIG["3"]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    children = [context.Process(target=read_often, args=(source, answers)) for _ in range(3)]
    for child in children:
        child.start()
    assert read_often(source)
    assert [answers.get(timeout=60) for _ in children] == [True] * 3
    for child in children:
        child.join()


def test_a_source_can_be_pickled(source):
    copy = pickle.loads(pickle.dumps(source))
    assert {name: copy.read(name) for name in copy.names()} == FILES


def test_links_in_a_folder_are_followed_once(tmp_path):
    place = write_folder(tmp_path / "x", {"a/1.jpg": b"a"})
    write_folder(tmp_path / "elsewhere", {"2.jpg": b"b"})
    (place / "b").symlink_to(tmp_path / "elsewhere")
    (place / "a" / "up").symlink_to(place)
    (place / "gone").symlink_to(tmp_path / "nothing")
    assert open_images(place).names() == ["a/1.jpg", "b/2.jpg"]


def test_damaged_archives_are_refused(tmp_path):
    data = bytearray(write_zip(tmp_path / "a.zip", {"1.jpg": bytes(range(256)) * 40}).read_bytes())
    (tmp_path / "cut.zip").write_bytes(data[:-30])
    with pytest.raises(DataError, match=r"cut\.zip: damaged or incomplete zip"):
        open_images(tmp_path / "cut.zip")
    data[data.index(b"1.jpg") + 60] ^= 0xFF
    (tmp_path / "flipped.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"cannot read '1\.jpg' from the zip"):
        open_images(tmp_path / "flipped.zip").read("1.jpg")
    whole = write_tar(tmp_path / "a.tar", [("1.jpg", bytes(5000))]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:3000])
    with pytest.raises(DataError, match="truncated"):
        open_images(tmp_path / "cut.tar")
    (tmp_path / "a.jpg").write_bytes(np.random.default_rng(0).bytes(3000))
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        tar.add(tmp_path / "a.jpg", "a.jpg")
    with pytest.raises(DataError, match="compressed tar; unpack it first"):
        open_images(tmp_path / "a.tgz")
    with pytest.raises(DataError, match="No such file"):
        open_images(tmp_path / "nothing")


def test_extension_goes_by_content():
    for form, extension in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        assert image_extension(encoded(0, form=form)) == extension
    for data in (encoded(0, form="GIF"), encoded(0, form="BMP"), b"", b"RIFF0000WAVE"):
        with pytest.raises(Unusable, match="not a jpeg, png or webp image"):
            image_extension(data)


def test_equal_names_are_told_apart_by_their_folder(tmp_path):
    place = write_folder(tmp_path / "x", {"a/1.jpg": b"a", "b/1.jpg": b"b", "ba/1.jpg": b"c"})
    images = ImagesByName([place])
    assert [images.read(p) for p in images.locate(["a/1.jpg", "b/1.jpg"])] == [b"a", b"b"]
    with pytest.raises(DataError, match=r"1 images are there more than once, first c/1\.jpg"):
        images.locate(["a/1.jpg", "c/1.jpg"])
