"""A full disk: finished shards stay valid, and the message says how much is needed."""

import hashlib
import shutil
import subprocess

import numpy as np
import pytest

from data_prep.sets import set_folder
from data_prep.sets.shard_writer import write_shards
from loaders.errors import DataError

SIZE, SHARDS = 4, 10
SET = set_folder.Preparation(
    "test", "toy", "image_text", "here", "none", "2022-04-07", SHARDS, SIZE, SIZE * SHARDS
)


def tars(out):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.rglob("*.tar")}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB; as `remount(size)` it grows."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(size, *more):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},{','.join(more)}", "tmpfs", path]
        return subprocess.run(command, capture_output=True, text=True)

    done = mount("1m", "nr_inodes=100")
    if done.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {done.stderr.strip()}")
    yield path, lambda size: mount(size, "remount")
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_keeps_finished_shards(small_disk):
    path, remount = small_disk
    out, whole = path / "set", path.parent / "whole"

    def big(i):
        return {"jpg": bytes([i]) * 50_000, "cls": b"0"}

    for place in (whole, out):
        set_folder.begin(place, SET)
    write_shards(whole, np.arange(40), big)
    with pytest.raises(DataError, match="the disk is full") as error:
        write_shards(out, np.arange(40), big)
    message = str(error.value)
    size = next(whole.rglob("*.tar")).stat().st_size
    assert f"{len(tars(out))} shards are finished and valid" in message
    assert f"{10 - len(tars(out))} are missing" in message
    assert f"about {(10 - len(tars(out))) * size / 1e9:.3f} GB, " in message
    assert f"{shutil.disk_usage(out).free / 1e9:.3f} GB are free" in message
    assert len(tars(out)) == 4
    for name, digest in tars(out).items():
        assert tars(whole)[name] == digest
    assert remount("5m").returncode == 0
    write_shards(out, np.arange(40), big)
    assert tars(out) == tars(whole)


def test_a_disk_that_is_full_at_once(small_disk):
    path, _ = small_disk
    set_folder.begin(path / "set", SET)

    def big(i):
        return {"jpg": bytes(400_000)}

    with pytest.raises(DataError, match="0 shards are finished and valid") as error:
        write_shards(path / "set", np.arange(40), big)
    # Two of four samples fitted: a shard is known to need twice as much.
    assert "10 are missing and need about 0.016 GB or more" in str(error.value)
    (path / "filler").write_bytes(bytes(shutil.disk_usage(path).free))
    with pytest.raises(DataError, match=r"run\.yaml: the disk is full"):
        set_folder.begin(path / "other", SET)
    assert [p.name for p in (path / "other").iterdir()] == ["shards"]
