"""Byte order marks, Windows line ends and empty last lines, in every text that others write."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.archives import elevater_targets, imagenet_devkit
from data_prep.checks.report_collect import captions_of
from data_prep.checks.verify_shard import _text_faults
from eval.sources.shards import ShardSource, WebdatasetSource
from loaders.errors import DataError
from loaders.manifest import open_shards, write_manifest
from loaders.plain_text import decode_text, read_text, text_lines
from loaders.texts import load_templates, read_captions
from tests.loaders.conftest import sample, write_tar

MARK = b"\xef\xbb\xbf"


def windows(text: str) -> bytes:
    """A text as an editor of Windows saves it."""
    return MARK + text.replace("\n", "\r\n").encode()


def test_texts_and_lines(tmp_path):
    assert decode_text(windows("a\nb")) == decode_text(b"a\rb") == "a\nb"
    assert decode_text(b"a\xef\xbb\xbf") == "a\ufeff"  # inside, it is the text's own
    assert text_lines("\ufeffa\r\n\r\nb\r\n \r\n\r\n") == ["a", "", "b"]
    assert text_lines(" \n") == text_lines("") == []
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 at byte 0; save it as UTF-8"):
        read_text(tmp_path / "a.txt")


def test_class_names_labels_and_templates(tmp_path):
    root = tmp_path / "root"
    for n, label in enumerate((MARK + b"0\r\n", b"1\r\n", b" 2")):
        write_tar(root / "test" / f"{n}.tar", sample("k", n, cls=label))
    (root / "classnames.txt").write_bytes(windows("cat\ndog\nhot rod\n\n"))
    (root / "zeroshot_classification_templates.txt").write_bytes(windows("a {c}.\nthe {c}.\n\n"))
    shards = open_shards(root / "test")
    assert (shards.kind, shards.labels.tolist()) == ("image_label", [0, 1, 2])
    assert [entry.names for entry in shards.classes] == [("cat",), ("dog",), ("hot rod",)]
    source = WebdatasetSource(root / "test")
    assert (source.names, source.templates) == (["cat", "dog", "hot rod"], ["a {}.", "the {}."])
    (tmp_path / "mine.json").write_bytes(windows('["a {}."]\n'))
    assert load_templates(str(tmp_path / "mine.json")) == ["a {}."]


def test_captions_and_manifests(tmp_path):
    members = sample("a", txt=windows("two\nlines\n"), json=windows('{"c": "\ufeffone\\r\\ntwo"}'))
    path = write_tar(tmp_path / "shards" / "0.tar", members)
    about = {"source": "-", "license": "-", "date": "2026-01-31", "attempted": 1}
    write_manifest(tmp_path, "s", "image_text", None, **about)
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(MARK + manifest.read_bytes())
    shards = open_shards(tmp_path)
    assert shards.read_text(0) == "two\nlines\n"
    assert read_captions(shards, 0, "txt") == ["two\nlines"]
    assert read_captions(shards, 0, "json.c") == ["one\ntwo"]
    assert ShardSource(tmp_path).texts(0) == captions_of(path) == ["two", "lines"]
    faults = _text_faults({"text": memoryview(MARK + b"\r\n")}, needs_caption=True)
    assert list(faults) == ["caption: empty"]


def test_lists_that_data_preparation_reads(tmp_path):
    numbers = np.random.default_rng(0).permutation(40) + 1
    texts = {
        "train_mapping.txt": "".join(f"day video_{n // 2} {n}\n" for n in range(40)),
        "train_rand.txt": ",".join(map(str, numbers)),
    }
    splits = []
    for name, encode in (("as_published", str.encode), ("saved_again", windows)):
        (tmp_path / name).mkdir()
        for file, text in texts.items():
            (tmp_path / name / file).write_bytes(encode(text))
        splits.append(elevater_targets.kitti_splits(tmp_path / name))
    assert splits[0] == splits[1]
    assert sum(map(len, splits[0].values())) == 40
    truth = windows("1\n2\n2\n\n")
    assert imagenet_devkit._parse_truth(Path("kit"), truth, 2) == [1, 2, 2]


def test_settings_in_json(tmp_path):
    from engine import deepspeed_engine

    (tmp_path / "ds.json").write_bytes(windows(json.dumps({"bf16": {"enabled": True}}, indent=1)))
    assert deepspeed_engine.read_json(tmp_path / "ds.json") == {"bf16": {"enabled": True}}
