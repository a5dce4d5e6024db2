"""The tar index against the standard library's tarfile and the webdataset package."""

import gzip
import multiprocessing
import os
import pickle
import subprocess
import tarfile

import numpy as np
import pytest
import webdataset

from loaders import tarreader
from loaders.errors import DataError
from tests.loaders.conftest import encoded, sample, write_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def awkward_members(form: str) -> list[tuple[str, bytes]]:
    """Odd sizes, capital extensions, folders, long and non-ASCII names, names to be ignored."""
    long = "folder/" * 18 + "x" * (60 if form == "ustar" else 300)
    members = [("__meta__", b"m"), ("README", b"no dot"), ("a/.hidden.jpg", b"h")]
    for n, key in enumerate(["a/0001", "./a/0002", long, "b.dir/k"]):
        members += sample(key, n, txt=b"t" * (511 + n), cls=b" 7\n", seg_png=b"")
    members += [("up.JPG", encoded(9)), ("up.Txt", "ü".encode())]
    return [*members, ("größe.webp", encoded(3, form="WEBP"))] if form != "ustar" else members


@pytest.mark.parametrize("form", FORMATS)
def test_members_equal_those_of_tarfile(tmp_path, form):
    path = write_tar(tmp_path / "a.tar", awkward_members(form), FORMATS[form])
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]
    assert [(m.name, m.offset, m.size) for m in tarreader.iterate_members(path)] == expected


@pytest.mark.parametrize("form", FORMATS)
def test_samples_equal_those_of_webdataset(tmp_path, form):
    members = [m for m in awkward_members(form) if ".hidden" not in m[0]]
    path = write_tar(tmp_path / "a.tar", members, FORMATS[form])
    index, reader = tarreader.open_index(path), tarreader.ShardReader()
    expected = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [os.fsdecode(bytes(row["key"])) for row in index] == [s["__key__"] for s in expected]
    for row, other in zip(index, expected, strict=True):
        for part, names in (("image", tarreader.IMAGE_EXTENSIONS), ("text", ("txt",))):
            want = next((other[name] for name in names if name in other), None)
            size = int(row[f"{part}_size"])
            offset = int(row[f"{part}_offset"])
            assert (reader.read(str(path), offset, size) if offset >= 0 else None) == want
        assert row["label"] == int(other.get("cls", b"-1"))


def test_directories_and_links_are_skipped(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"n{ord(kind)}.jpg")
            info.type, info.linkname = kind, "l" * 200
            tar.addfile(info)
    write_tar(tmp_path / "b.tar", sample("k"))
    joined = path.read_bytes().rstrip(b"\0")
    joined += bytes(-len(joined) % 512) + (tmp_path / "b.tar").read_bytes()
    path.write_bytes(joined)
    assert [m.name for m in tarreader.iterate_members(path)] == ["k.jpg"]


def test_label_comes_from_cls_or_an_integer_in_json(tmp_path):
    jsons = [b'{"label": 4}', b'{"label": "cat"}', b'{"label": true}', b'{"label": ', b"{}"]
    members = [m for n, text in enumerate(jsons) for m in sample(f"k{n}", json=text)]
    members += sample("both", cls=b"2", json=b'{"label": 5}')
    labels = tarreader.build_index(write_tar(tmp_path / "a.tar", members))["label"]
    assert labels.tolist() == [4, -1, -1, -1, -1, 2]


def broken(path, what):
    good = write_tar(path, sample("one", cls=b"1") + sample("two", 1, cls=b"2"))
    data = bytearray(good.read_bytes())
    second = data.index(b"two.jpg")
    if what == "truncated":
        data = data[: second + 700]
    elif what == "no end mark":
        data = data[:second]
    elif what == "empty file":
        data = b""
    elif what == "only end mark":
        data = bytes(10240)
    elif what == "checksum":
        data[second] ^= 1
    elif what == "compressed":
        data = gzip.compress(data)
    elif what in ("huge size", "negative size"):
        size = (b"\x80" + b"\x7f" * 11) if what == "huge size" else b"\xff" * 12
        data[second + 124 : second + 136] = size
        data[second + 148 : second + 156] = b" " * 8
        data[second + 148 : second + 156] = b"%06o\0 " % sum(data[second : second + 512])
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("truncated", "truncated.*'two.jpg'.*sample 'two'.*again"),
        ("no end mark", "truncated after member 'one.cls'"),
        ("empty file", "empty file"),
        ("only end mark", "empty: no sample"),
        ("checksum", "damaged"),
        ("compressed", "unpack"),
        ("huge size", "truncated.*two"),
        ("negative size", "impossible size"),
    ],
)
def test_damaged_tars_are_named(tmp_path, what, words):
    with pytest.raises(DataError, match=words) as caught:
        tarreader.build_index(broken(tmp_path / "bad.tar", what))
    assert "bad.tar" in str(caught.value)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (sample("a") + sample("b") + sample("a"), "'a' occurs twice"),
        (sample("a") + sample("a"), r"two members .\.jpg"),
        (sample("../a"), "leaves the archive"),
        (sample("/a"), "leaves the archive"),
        (sample("a", cls=b"cat"), "'a'.*one class number"),
        ([("a.txt", b"x")], "no sample with an image"),
    ],
)
def test_unusable_members_are_named(tmp_path, members, words):
    with pytest.raises(DataError, match=words):
        tarreader.build_index(write_tar(tmp_path / "a.tar", members))


def test_members_that_lie_apart_are_mended_by_the_advice(tmp_path):
    """As people pack all images first; with the real tar, as the message says it."""
    folder, names = tmp_path / "files", ("a.jpg", "b-1.jpg", "b.jpg", "a.txt", "b-1.txt", "b.txt")
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(encoded(1) if name.endswith("jpg") else name.encode())
    subprocess.run(["tar", "-cf", tmp_path / "apart.tar", "-C", folder, *names], check=True)
    with pytest.raises(DataError, match=r"apart\.tar: sample key 'a' occurs") as caught:
        tarreader.build_index(tmp_path / "apart.tar")
    advice = str(caught.value).partition("sorts by name: ")[2]
    assert advice == "tar --sort=name -cf NEW.tar -C FOLDER ."
    command = advice.replace("NEW", str(tmp_path / "new")).replace("FOLDER", str(folder))
    subprocess.run(command.split(), check=True)
    index = tarreader.build_index(tmp_path / "new.tar")
    assert (len(index), (index["text_offset"] > 0).all()) == (3, True)


def test_other_extensions_are_told(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.img", b"x"), ("a.cap", b"x"), ("b.v1.jpg", b"x")])
    with pytest.raises(DataError) as caught:
        tarreader.build_index(path)
    text = str(caught.value)
    assert "its members end in '.cap', '.img', '.v1.jpg'. Read are images as .jpg" in text
    assert "captions as .txt or in .json, class numbers as .cls or in .json" in text


def test_sparse_members_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.major": "1"}
    path.write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match="sparse"):
        tarreader.build_index(path)


def test_index_is_kept_and_rebuilt_when_the_tar_changes(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample("one", cls=b"1"))
    first = tarreader.open_index(path)
    files = list((tmp_path / ".index").iterdir())
    stamp = files[0].stat().st_mtime_ns
    assert isinstance(first.base, np.memmap)  # mapped, not read
    tarreader.open_index(path)
    assert [f.stat().st_mtime_ns for f in (tmp_path / ".index").iterdir()] == [stamp]
    write_tar(path, sample("one", cls=b"5"))
    os.utime(path, ns=(1, 1))  # same size; another time
    assert tarreader.open_index(path)["label"].tolist() == [5]
    assert len(list((tmp_path / ".index").iterdir())) == 1  # the old one is gone
    kept = next((tmp_path / ".index").iterdir())
    kept.write_bytes(kept.read_bytes()[:40])
    assert tarreader.open_index(path)["label"].tolist() == [5]


def test_racing_processes_all_get_the_index(tmp_path):
    path = write_tar(
        tmp_path / "a.tar", [m for n in range(200) for m in sample(f"{n:04d}", jpg=b"")]
    )
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(count_samples, [path] * 8) == [200] * 8
    assert len(list((tmp_path / ".index").iterdir())) == 1


def count_samples(path):
    return len(tarreader.open_index(path))


def test_unwritable_folder_needs_the_environment_variable(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", sample("one"))
    (tmp_path / ".index").write_text("a file where the folder should be, also for root")
    monkeypatch.delenv("UNICL_INDEX_DIR", raising=False)
    with pytest.raises(DataError, match="UNICL_INDEX_DIR"):
        tarreader.open_index(path)
    monkeypatch.setenv("UNICL_INDEX_DIR", str(tmp_path / "elsewhere"))
    assert len(tarreader.open_index(path)) == 1
    assert len(list((tmp_path / "elsewhere").glob("*/a.tar.*.npy"))) == 1


def test_reader_bounds_its_descriptors_and_survives_pickling(tmp_path):
    paths = [str(write_tar(tmp_path / f"{n}.tar", sample("k", n))) for n in range(5)]
    reader = tarreader.ShardReader(limit=2)
    before = len(os.listdir("/proc/self/fd"))
    expected = [encoded(n) for n in range(5)]
    assert [reader.read(p, 512, len(e)) for p, e in zip(paths, expected, strict=True)] == expected
    assert len(os.listdir("/proc/self/fd")) == before + 2
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(paths[0], 512, 10) == expected[0][:10]
    with pytest.raises(DataError, match="shorter"):
        reader.read(paths[0], 10**6, 10)
