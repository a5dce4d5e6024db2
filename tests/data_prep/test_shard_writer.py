"""Writing shards: bytes as tarfile's, order, determinism, parts, statistics, unusable samples."""

import hashlib
import io
import json
import math
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sets import set_folder
from data_prep.sets.shard_writer import Unusable, end_tar, permutation, write_member, write_shards
from loaders.errors import DataError

SIZE = 8


def begin(out, samples, size=SIZE, **identity):
    shards = -(-samples // size)
    preparation = set_folder.Preparation(
        "test", "toy", "image_text", "here", "none", "2022-04-07", shards, size, samples, identity
    )
    return set_folder.begin(out, preparation)


def read(i):
    """Members of sample i; sizes go over several blocks, and over none."""
    return {"jpg": bytes([i % 256]) * (i * 37 % 1500), "txt": b"caption %d" % i}


def hashes(out):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.rglob("*.tar")}


def split_mix(state):
    """SplitMix64's output function, in Python integers (Steele et al. 2014, figure 17)."""
    mask = 2**64 - 1
    value = state & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


@given(count=st.integers(0, 300), seed=st.integers(0, 2**20))
@settings(max_examples=50, deadline=None)
def test_permutation_sorts_by_split_mix(count, seed):
    key = [split_mix((i + 1 + seed * 2**40) * 0x9E3779B97F4A7C15) for i in range(count)]
    expected = sorted(range(count), key=key.__getitem__)
    assert permutation(count, seed).tolist() == expected
    assert permutation(count, seed).dtype == np.int64


def test_permutation_is_the_published_generator():
    # First outputs of SplitMix64 with seed 1234567, from Vigna's splitmix64.c.
    state = 1234567
    outputs = [split_mix(state + i * 0x9E3779B97F4A7C15) for i in (1, 2, 3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_order_mixes_classes():
    """Of ImageNet's shape in small: a shard of one tenth holds nearly all classes."""
    labels = np.repeat(np.arange(100), 100)[permutation(10_000, 0)]
    assert min(len(set(labels[i : i + 1000])) for i in range(0, 10_000, 1000)) > 95


@given(name=st.text(min_size=1, max_size=60), size=st.integers(0, 3000))
@settings(max_examples=50, deadline=None)
def test_members_are_those_of_tarfile(name, size):
    name = name.replace("\0", "_").replace("/", "_").encode("utf-8", "ignore").decode() or "x"
    data, ours, theirs = b"\xff" * size, io.BytesIO(), io.BytesIO()
    if len(name.encode()) > 100:
        with pytest.raises(ValueError, match="too long"):
            write_member(ours, name, data)
        return
    written = write_member(ours, name, data)
    assert written == len(ours.getvalue())
    end_tar(ours)
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size = size
        tar.addfile(info, io.BytesIO(data))
    assert ours.getvalue() == theirs.getvalue()


def test_long_names_keep_their_folders():
    name, file = "a" * 80 + "/" + "b" * 60 + ".jpg", io.BytesIO()
    write_member(file, name, b"x")
    end_tar(file)
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        assert tar.getnames() == [name]


@pytest.mark.parametrize("count", [1, 5, 8, 29])
def test_shards_hold_the_samples_in_order(tmp_path, count):
    order = permutation(count, 3)
    begin(tmp_path, count)
    status = write_shards(tmp_path, order, read)
    assert status == {"success": count}
    found = []
    for shard, path in enumerate(sorted((tmp_path / "shards").glob("*.tar"))):
        assert path.name == f"{shard:05d}.tar"
        with tarfile.open(path) as tar:
            members = [(m, tar.extractfile(m).read()) for m in tar.getmembers()]
        for row in range(len(members) // 2):
            (image, data), (text, caption) = members[2 * row : 2 * row + 2]
            assert image.name == f"{shard:05d}{row}.jpg"
            assert text.name == f"{shard:05d}{row}.txt"
            assert (image.mtime, image.uid, image.gid, image.mode) == (0, 0, 0, 0o644)
            found.append((data, caption))
        assert path.stat().st_size % 10240 == 0
    assert found == [tuple(read(i).values()) for i in order]


def test_two_runs_and_any_parts_give_the_same_bytes(tmp_path):
    order = permutation(50, 0)
    for name, parts in (("one", 1), ("again", 1), ("three", 3)):
        begin(tmp_path / name, 50)
        for part in reversed(range(parts)):
            write_shards(tmp_path / name, order, read, part, parts)
            expected = {s for s in range(7) if s % parts >= part}
            assert set(set_folder.finished(tmp_path / name)) == expected
    assert hashes(tmp_path / "one") == hashes(tmp_path / "again") == hashes(tmp_path / "three")
    assert len(hashes(tmp_path / "one")) == 7


def test_statistics_have_img2datasets_keys(tmp_path):
    def sometimes(i):
        if i % 3 == 0:
            raise Unusable("grey" if i else "black")
        return read(i)

    begin(tmp_path, 20, size=10)
    status = write_shards(tmp_path, np.arange(20), sometimes)
    assert status == {"success": 13, "grey": 6, "black": 1}
    stats = json.loads((tmp_path / "shards" / "00000_stats.json").read_text())
    assert {k: stats[k] for k in ("count", "successes", "failed_to_resize", "status_dict")} == {
        "count": 10,
        "successes": 6,
        "failed_to_resize": 4,
        "status_dict": {"success": 6, "grey": 3, "black": 1},
    }
    assert stats["failed_to_download"] == 0
    assert stats["start_time"] <= stats["end_time"]
    with tarfile.open(tmp_path / "shards" / "00000.tar") as tar:
        # Keys keep the row of the sample, so they have gaps.
        assert tar.getnames()[::2] == [f"00000{i}.jpg" for i in (1, 2, 4, 5, 7, 8)]


def test_a_shard_without_samples_is_refused(tmp_path):
    def never(i):
        raise Unusable("not an image")

    begin(tmp_path, 4, size=2)
    with pytest.raises(DataError, match=r"none of 2 samples is usable: {'not an image': 2}"):
        write_shards(tmp_path, np.arange(4), never)
    assert set_folder.finished(tmp_path) == {}


def test_number_of_samples_must_be_that_of_the_set(tmp_path):
    begin(tmp_path, 20)
    with pytest.raises(ValueError, match="100 samples do not make 3 shards of 8"):
        write_shards(tmp_path, np.arange(100), read)


@given(size=st.integers(1, 20_000), shard=st.integers(0, 200_000), row=st.integers(0, 10**6))
def test_keys_are_those_of_img2dataset(size, shard, row):
    """img2dataset 1.47: ceil(log10(samples per shard)) digits of the row, five of the shard."""
    row %= size
    digits = math.ceil(math.log10(size))
    expected = "{:0{}d}".format(10**digits * shard + row, digits + 5)
    assert set_folder.sample_key(shard, row, size) == expected


def test_nothing_is_read_for_finished_shards(tmp_path):
    begin(tmp_path, 20)
    write_shards(tmp_path, np.arange(20), read)
    (tmp_path / "shards" / "00001_stats.json").unlink()
    (tmp_path / "manifest.json").touch()
    (tmp_path / "shards" / "sizes.json").touch()
    before, seen = hashes(tmp_path), []
    write_shards(tmp_path, np.arange(20), lambda i: seen.append(i) or read(i))
    assert seen == list(range(8, 16))
    assert hashes(tmp_path) == before
    # The set is open again, so what closed it is gone.
    assert not (tmp_path / "manifest.json").exists()
    assert not (tmp_path / "shards" / "sizes.json").exists()
    (tmp_path / "manifest.json").touch()
    write_shards(tmp_path, np.arange(20), lambda i: pytest.fail("read again"))
    assert (tmp_path / "manifest.json").exists()
