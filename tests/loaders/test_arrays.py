"""Arrays as members of samples: found, read, padded; and what is wrong with them is counted."""

import io

import numpy as np
import pytest
import torch
import webdataset

from loaders import arrays, tarreader
from loaders.arrays import ArrayShape, BadArray
from loaders.batch import TripletDataset, make_loader
from loaders.errors import DataError
from loaders.labels import LabelSpace
from loaders.manifest import MissingMember, open_shards
from loaders.texts import TextOptions
from loaders.views import build_eval
from tests.loaders.conftest import encoded, sample, write_tar
from tests.loaders.test_batch import letters, make_order

SHAPE = ArrayShape("objects", rows=4, width=3)


def npy(table, **options):
    file = io.BytesIO()
    np.save(file, table, **options)
    return file.getvalue()


def table(rows, dtype="<f4", width=3):
    return (np.arange(rows * width).reshape(rows, width) / 7).astype(dtype)


def with_objects(key, data, seed=0):
    return [*sample(key, seed, txt=b"a text"), (f"{key}.objects.npy", data)]


def dataset(shards, **options):
    options = {"seed": 0, "arrays": [SHAPE]} | options
    view = build_eval(16, 16)
    return TripletDataset(
        [shards], LabelSpace([shards]), [view], TextOptions(["a {}"]), letters, **options
    )


@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
def test_tables_are_padded_cut_and_masked(tmp_path, dtype):
    """By the real loader, of a tar that webdataset's own writer made."""
    path = tmp_path / "0.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for rows in range(9):
            parts = {"jpg": encoded(rows), "txt": f"text {rows}", "objects.npy": table(rows, dtype)}
            writer.write({"__key__": f"k/{rows:03d}", **parts})
    shards = open_shards(path)
    loader = make_loader(dataset(shards), make_order([shards]), 0, 1, 4, 0, 2, workers=0)
    seen = set()
    for batch in loader:
        assert batch["bad"] == []
        assert (batch["objects"].shape, batch["objects"].dtype) == ((4, 4, 3), torch.float32)
        assert (batch["objects_mask"].shape, batch["objects_mask"].dtype) == ((4, 4), torch.bool)
        for uid, found, mask in zip(
            batch["uid"], batch["objects"], batch["objects_mask"], strict=True
        ):
            rows = min(int(uid), 4)
            assert mask.tolist() == [True] * rows + [False] * (4 - rows)
            assert torch.equal(found[:rows], torch.from_numpy(table(int(uid), dtype)[:4]).float())
            assert not found[rows:].any()
            seen.add(int(uid))
    assert seen == set(range(9))  # of none to more rows than are stated


def test_a_tar_without_arrays_has_an_index_without_their_columns(tmp_path):
    plain = tarreader.open_index(write_tar(tmp_path / "a.tar", sample("k", txt=b"a")))
    mixed = with_objects("one", npy(table(2))) + sample("two")
    index = tarreader.open_index(write_tar(tmp_path / "b.tar", mixed))
    assert set(index.dtype.names) - set(plain.dtype.names) == {"objects_offset", "objects_size"}
    assert index["objects_offset"][1] == tarreader.ABSENT
    for name in ("a", "b"):  # and the stored one is taken again
        (file,) = (tmp_path / ".index").glob(f"{name}.tar.*.v2.npy")
        stamp = file.stat().st_mtime_ns
        tarreader.open_index(tmp_path / f"{name}.tar")
        assert file.stat().st_mtime_ns == stamp
    shards = open_shards([str(tmp_path / "a.tar"), str(tmp_path / "b.tar")], "image_text")
    for i in (0, 2):
        with pytest.raises(MissingMember, match=r"has no \.objects\.npy") as caught:
            shards.read_array(i, "objects")
        assert caught.value.reason == "no_objects"
    assert np.array_equal(arrays.parse(shards.read_array(1, "objects")), table(2))


def test_an_index_of_the_earlier_form_is_made_again(tmp_path):
    """It has no columns for arrays, whether the tar has arrays or not."""
    path = write_tar(tmp_path / "a.tar", with_objects("k", npy(table(2))))
    index = tarreader.build_index(path)
    facts, folder = path.stat(), tmp_path / ".index"
    folder.mkdir()
    names = [name for name in index.dtype.names if "objects" not in name]
    old = folder / f"a.tar.{facts.st_size}.{facts.st_mtime_ns}.v1.npy"
    np.save(old, np.array(index[names].tolist(), [(name, index.dtype[name]) for name in names]))
    assert open_shards(path, "image_text").read_array(0, "objects") == npy(table(2))
    assert not old.exists()


def header(text, version=b"\x01\x00"):
    text = text.encode("latin-1")
    size = len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + text


def claim(dtype="'<f4'", shape="(2, 3)", order="False", data=24):
    text = f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}"
    return header(text + "\n") + b"\0" * data


class Evil:
    def __reduce__(self):
        raise AssertionError("pickled")


HOSTILE = {
    "empty": (b"", "not_an_array"),
    "text": (b"no array", "not_an_array"),
    "a zip": (b"PK\x03\x04" + b"\0" * 30, "not_an_array"),
    "cut in the header": (npy(table(2))[:20], "not_an_array"),
    "a version of the future": (header("{}", b"\x09\x00"), "not_an_array"),
    "a header of four gigabytes": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "not_an_array"),
    "a long header": (header("(" * 60_000), "not_an_array"),
    "a deep header": (header("[" * 9_000), "not_an_array"),
    "a call in the header": (claim(dtype="__import__('os').abort()"), "not_an_array"),
    "a shape that is no tuple": (claim(shape="7"), "not_an_array"),
    "keys that are missing": (header("{'descr': '<f4'}\n"), "not_an_array"),
    "pickled objects": (npy(np.array([[{}]], object), allow_pickle=True), "array_type"),
    "a pickle that claims floats": (claim(data=0) + b"\x80\x04cos\nsystem\n", "array_length"),
    "records": (npy(np.zeros((2, 3), [("a", "<f4")])), "array_type"),
    "float64": (npy(table(2, "<f8")), "array_type"),
    "big endian": (npy(table(2, ">f4")), "array_type"),
    "integers": (npy(np.zeros((2, 3), np.int64)), "array_type"),
    "a vector": (npy(np.zeros(6, np.float32)), "array_shape"),
    "three axes": (npy(np.zeros((1, 2, 3), np.float32)), "array_shape"),
    "a number": (npy(np.float32(1)), "array_shape"),
    "no columns": (npy(np.zeros((2, 0), np.float32)), "array_shape"),
    "by column": (npy(np.asfortranarray(table(2))), "array_shape"),
    "a negative shape": (claim(shape="(-2, -3)"), "array_shape"),
    "a terabyte that is not there": (claim(shape=f"({10**11}, 3)"), "array_length"),
    "a shape beyond all numbers": (claim(shape=f"({10**30}, 3)"), "array_length"),
    "less than it says": (npy(table(2))[:-4], "array_length"),
    "more than it says": (npy(table(2)) + b"\0" * 4, "array_length"),
    "nan": (npy(np.full((2, 3), np.nan, np.float32)), "array_not_finite"),
    "infinite": (npy(np.full((2, 3), np.inf, np.float16)), "array_not_finite"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_arrays_are_refused_for_a_reason(what):
    data, reason = HOSTILE[what]
    with pytest.raises(BadArray) as caught:
        arrays.parse(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_versions_of_the_format(version):
    file = io.BytesIO()
    np.lib.format.write_array(file, table(3, "<f2"), version)
    assert np.array_equal(arrays.parse(file.getvalue()), table(3, "<f2"))


def test_training_counts_bad_arrays_and_goes_on(tmp_path):
    """All of them in one tar, around good samples: each costs itself."""
    members = []
    for number, (data, _) in enumerate(HOSTILE.values()):
        members += with_objects(f"bad{number:02d}", data)
        for other in range(3):
            members += with_objects(f"good{number:02d}-{other}", npy(table(2)))
    members += with_objects("wide", npy(table(2, width=5))) + sample("none", txt=b"a")
    shards = open_shards(write_tar(tmp_path / "a.tar", members))
    made, reasons = dataset(shards), []
    for i in range(len(shards)):
        found = made[0, i, i]
        assert shards.key(found["uid"]).startswith("good")
        own = [bad.reason for bad in found["bad"] if bad.key == shards.key(i)]
        reasons += own[:1]
    expected = [reason for _, reason in HOSTILE.values()] + ["array_width", "no_objects"]
    assert reasons == expected


def test_a_member_of_ten_gigabytes_is_not_read(tmp_path):
    """A hole in a real file: 10 GB that occupy no space."""
    path = write_tar(tmp_path / "a.tar", with_objects("k", npy(table(2))))
    data = bytearray(path.read_bytes())
    start = data.index(b"k.objects.npy")
    data[start + 124 : start + 136] = b"\x80" + (10 * 2**30).to_bytes(11, "big")
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data[: start + 512])
    with path.open("r+b") as file:
        file.truncate(start + 512 + 10 * 2**30)
        file.seek(0, 2)
        file.write(bytes(1024))
    shards = open_shards(path, "image_text")
    with pytest.raises(MissingMember) as caught:
        arrays.read(shards, 0, SHAPE)
    assert caught.value.reason == "member_too_large"


@pytest.mark.parametrize("kind", ["image_text", "image_label"])
def test_a_set_without_them_is_refused_before_a_run(tmp_path, kind):
    members = [m for i in range(12) for m in sample(f"{i:02d}", i, txt=b"a", cls=b"0")]
    (tmp_path / "classnames.txt").write_text("cat\n")
    shards = open_shards(write_tar(tmp_path / "0.tar", members), kind)
    with pytest.raises(DataError, match=r"no_objects as all.*\.objects\.npy;.*--arrays objects="):
        dataset(shards).try_sources()
    dataset(shards, arrays=()).try_sources()


def test_another_width_than_the_model_s_is_said(tmp_path):
    members = [m for i in range(12) for m in with_objects(f"{i:02d}", npy(table(2, width=5)))]
    shards = open_shards(write_tar(tmp_path / "0.tar", members))
    with pytest.raises(DataError, match=r"array_width as all.*another width than the model's"):
        dataset(shards).try_sources()


def test_samples_without_arrays_are_as_before(tmp_path):
    """A method that needs none neither reads them nor draws other random numbers."""
    members = [m for i in range(4) for m in with_objects(f"{i}", npy(table(2)), i)]
    shards = open_shards(write_tar(tmp_path / "0.tar", members))
    plain, full = dataset(shards, arrays=())[3, 1, 2], dataset(shards)[3, 1, 2]
    assert set(full) - set(plain) == {"objects", "objects_mask"}
    for name in ("image", "text"):
        assert torch.equal(plain[name], full[name])
    assert plain["seed"] == full["seed"]


def test_a_stored_index_whose_arrays_lie_is_made_again(tmp_path):
    path = write_tar(tmp_path / "a.tar", with_objects("k", npy(table(2))))
    good = np.array(tarreader.open_index(path))
    stored = next((tmp_path / ".index").iterdir())
    for column, value in (
        ("objects_offset", -7), ("objects_offset", 10**9), ("objects_size", 2**40),
        ("objects_offset", -1),
    ):  # fmt: skip
        lie = good.copy()
        lie[column] = value
        np.save(stored, lie)
        assert np.array_equal(tarreader.open_index(path), good), column
