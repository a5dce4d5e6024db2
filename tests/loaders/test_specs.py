"""What a person means by a path, and the names of sources that would be alike."""

import argparse
import os

import pytest

from loaders.errors import DataError
from loaders.manifest import open_shards
from loaders.source_names import distinguish
from loaders.specs import as_path
from tests.loaders.conftest import sample, write_tar


def source(folder, name=None):
    """An opened set of one tar without a manifest."""
    write_tar(folder / "0.tar", sample("a", txt=b"x"))
    return open_shards(folder, name=name)


def named(*sources):
    distinguish(sources)
    return [one.name for one in sources]


def test_names_are_those_of_the_folders_unless_they_clash(tmp_path):
    apart = [source(tmp_path / name) for name in ("imagenet/train", "cc3m")]
    assert named(*apart) == ["train", "cc3m"]
    alike = [source(tmp_path / name) for name in ("imagenet/train", "cc3m/train", "cc3m")]
    assert named(*alike) == ["imagenet/train", "cc3m/train", "cc3m"]
    deep = [source(tmp_path / name) for name in ("x/b/train", "y/b/train", "c/train")]
    assert named(*deep) == ["x/b/train", "y/b/train", "c/train"]


def test_equal_names_of_manifests_give_way_to_folders(tmp_path):
    sets = [source(tmp_path / name, "web") for name in ("first", "second")]
    other = source(tmp_path / "elsewhere" / "second")
    assert named(*sets, other) == ["first", f"{tmp_path.name}/second", "second"]


def test_one_folder_twice_is_refused_and_a_link_is_a_way_out(tmp_path):
    for tar in ("0", "1"):
        write_tar(tmp_path / "cc3m" / f"{tar}.tar", sample(tar, txt=b"x"))
    os.symlink(tmp_path / "cc3m", tmp_path / "again")
    parts = [open_shards(tmp_path / "cc3m" / f"{tar}.tar") for tar in ("0", "1")]
    with pytest.raises(DataError, match=r"both named cc3m and lie in .*/cc3m; join"):
        distinguish(parts)
    assert named(parts[0], open_shards(tmp_path / "again" / "1.tar")) == ["cc3m", "again"]


def test_addresses_are_refused_and_tilde_is_the_home_folder(tmp_path, monkeypatch):
    for spec in ("s3://b/a.tar", "https://h/{0..3}.tar", "pipe:cat a.tar"):
        with pytest.raises(DataError, match="download first"):
            open_shards(spec)
    with pytest.raises(argparse.ArgumentTypeError, match="download first"):
        as_path("gs://b/results")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("~/results") == tmp_path / "results"
    source(tmp_path / "set")
    assert len(open_shards("~/set/{0..0}.tar")) == 1
