"""Label spaces, caption groups and the paper's convention."""

import hashlib

import numpy as np
import pytest
import torch

from loaders.errors import ConfigError, DataError
from loaders.labels import LabelSpace, caption_group, from_paper_labels
from loaders.manifest import ClassEntry, ShardInfo, ShardSet

SHARD = [ShardInfo("none.tar", 1, 1, None)]


def source(name, *classes, kind="image_label"):
    entries = [ClassEntry(i, synset, names) for i, (synset, names) in enumerate(classes)]
    return ShardSet(name, kind, entries, SHARD)


A = source("a", ("n1", ("cat", "kitty")), ("n2", ("dog",)))
TEXT = source("captions", ("n1", ("cat",)), kind="image_text")
B = source("b", ("n3", ("emu",)), ("n1", ("house cat", "cat")), ("n4", ("owl",)))


def test_disjoint_ranges():
    space = LabelSpace([A, TEXT, B])
    assert [space.to_global(0, i) for i in range(2)] == [0, 1]
    assert [space.to_global(2, i) for i in range(3)] == [2, 3, 4]
    assert space.num_classes == 5
    assert space.names(0) == ["cat", "kitty"]
    assert space.names(3) == ["house cat", "cat"]
    with pytest.raises(IndexError):
        space.to_global(1, 0)  # a caption source has no training classes


def test_merge_by_synset_joins_ids_and_names():
    space = LabelSpace([A, TEXT, B], merge="synset")
    assert [space.to_global(0, i) for i in range(2)] == [0, 1]
    assert [space.to_global(2, i) for i in range(3)] == [2, 0, 3]
    assert space.num_classes == 4
    assert space.names(0) == ["cat", "kitty", "house cat"]
    assert A.classes[0].names == ("cat", "kitty")  # the source keeps its own


def test_what_cannot_be_merged():
    with pytest.raises(DataError, match=r"c: class 0 \(gnu\) has no synset"):
        LabelSpace([A, source("c", (None, ("gnu",)))], merge="synset")
    with pytest.raises(ConfigError, match="'names'"):
        LabelSpace([A], merge="names")


def test_caption_groups_follow_the_normalised_text():
    assert caption_group(" A  red\n\tBall ") == caption_group("a red ball")
    groups = [caption_group(f"caption {i}") for i in range(20000)]
    assert len(set(groups)) == 20000
    assert max(groups) <= -2
    assert min(groups) >= -2 - 2**62 >= np.iinfo(np.int64).min
    assert torch.tensor(groups, dtype=torch.int64).tolist() == groups
    first = int.from_bytes(hashlib.blake2b(b"a red ball", digest_size=8).digest(), "big")
    assert caption_group("a red ball") == -2 - first // 4  # the same in every process


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_paper_labels_are_converted_into_a_new_array(make):
    theirs = make([0, 1, 0, 7])
    assert from_paper_labels(theirs).tolist() == [-1, 0, -1, 6]
    assert theirs.tolist() == [0, 1, 0, 7]
    with pytest.raises(DataError, match="negative"):
        from_paper_labels(make([0, -1]))
