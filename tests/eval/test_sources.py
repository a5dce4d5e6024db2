"""What the registry and the sources refuse, and what they say."""

import shutil

import numpy as np
import pytest
import yaml

from eval import sources
from loaders import texts
from loaders.errors import ConfigError, DataError
from tests.eval.conftest import drawing, write_set


@pytest.fixture
def row(world):
    """A function that returns a row of the toy registry with some keys changed."""

    def make(name, **changes):
        rows = yaml.safe_load((world / "registry.yaml").read_text())["datasets"]
        return sources.EvalDataset(name=name, **{**rows[name], **changes})

    return make


def test_shipped_registry_is_consistent():
    registry = sources.Registry()
    assert set(registry.collections["quickstart"]) == set(registry.datasets)
    for row in registry.datasets.values():
        assert ("train" in row.splits) == ("linear_probe" in row.tasks)
        assert row.templates is None or texts.load_templates(row.templates)
    assert len(registry.select(["quickstart"], "zero_shot")) == 3
    assert [r.name for r in registry.select(["quickstart"], "linear_probe")] == [
        "openclipart_classes"
    ]


def test_unknown_names_are_refused_with_the_nearest():
    registry = sources.Registry()
    with pytest.raises(ConfigError, match="did you mean emoji_twemoji"):
        registry.select(["emoji_twemojis"], "zero_shot")
    with pytest.raises(ConfigError, match="openclipart_captions has no task zero_shot"):
        registry.select(["openclipart_captions"], "zero_shot")


def test_registry_row_with_an_unknown_key_is_refused(world, tmp_path):
    content = yaml.safe_load((world / "registry.yaml").read_text())
    content["datasets"]["toy_classes"]["clases"] = 3
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(DataError, match=r"toy_classes: .*clases"):
        sources.Registry(tmp_path / "bad.yaml")


def test_wrong_count_names_both_numbers(row, world):
    splits = {"test": {"path": str(world / "drawn_test"), "samples": 20}}
    with pytest.raises(DataError, match=r"holds 19 labelled samples.*expects 20"):
        sources.EvalSplit(row("toy_classes", splits=splits), "test", 32)
    with pytest.raises(DataError, match=r"3 classes occur.*expects 4"):
        sources.EvalSplit(row("toy_classes", classes=4), "test", 32).class_names()


def test_absent_set_is_skipped_only_when_optional(row, tmp_path, capsys):
    splits = {"test": {"path": str(tmp_path / "nowhere"), "samples": None}}
    with pytest.raises(DataError, match="nowhere is not there; obtain it with: make toys"):
        sources.present(row("toy_captions", splits=splits))
    assert not sources.present(row("toy_captions", splits=splits, optional=True))
    assert "obtain it with: make toys" in capsys.readouterr().out
    assert sources.present(row("toy_captions"))


def test_unreadable_image_and_missing_caption_name_shard_and_key(row, tmp_path):
    good = drawing(0, np.random.default_rng(0))
    samples = [{"png": good, "txt": "a"}, {"png": b"no image", "txt": "b"}, {"png": good}]
    write_set(tmp_path / "bad", "image_text", samples)
    splits = {"test": {"path": str(tmp_path / "bad"), "samples": None}}
    split = sources.EvalSplit(row("toy_captions", splits=splits), "test", 32)
    assert split[0].shape == (3, 32, 32)
    with pytest.raises(DataError, match=r"00000.tar, key 000000001: unreadable image"):
        split[1]
    with pytest.raises(DataError, match=r"00001.tar, key 000010000: no_caption"):
        split.distinct_texts()


def test_distinct_texts_merge_case_and_spaces_only(row, tmp_path):
    good = drawing(0, np.random.default_rng(0))
    captions = ["A cat", "a  cat ", "a cat.", "A CAT", "dog"]
    write_set(tmp_path / "set", "image_text", [{"png": good, "txt": c} for c in captions])
    splits = {"test": {"path": str(tmp_path / "set"), "samples": None}}
    split = sources.EvalSplit(row("toy_captions", splits=splits), "test", 32)
    distinct, owner = split.distinct_texts()
    assert distinct == ["A cat", "a cat.", "dog"]
    assert owner.tolist() == [0, 0, 1, 0, 2]


def test_cache_key_follows_the_pixels(row, tmp_path):
    """Two sets with equal file names, sizes and counts, but other images, must not be confused."""
    hashes = []
    for seed in (0, 1):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        images = np.random.default_rng(seed).bytes(60)
        write_set(tmp_path / "set", "image_text", [{"png": images, "txt": "a"}] * 4)
        splits = {"test": {"path": str(tmp_path / "set"), "samples": None}}
        split = sources.EvalSplit(row("toy_captions", splits=splits), "test", 32)
        hashes.append(split.content_hash)
    assert hashes[0] != hashes[1]
