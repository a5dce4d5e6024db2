"""What the registry and the sources refuse, and what they say."""

import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml

from eval.sources import base
from eval.sources.presence import absent_splits, those_present
from eval.sources.registry import REPOSITORY, EvalDataset, Registry
from eval.sources.splits import EvalSplit, subset_ids
from loaders import texts
from loaders.errors import ConfigError, DataError
from tests.eval.conftest import drawing, write_set


@pytest.fixture
def row(world):
    """A function that returns a row of the toy registry with some keys changed."""

    def make(name, **changes):
        rows = yaml.safe_load((world / "registry.yaml").read_text())["datasets"]
        return EvalDataset(name=name, **{**rows[name], **changes})

    return make


def test_shipped_registry_is_consistent():
    registry = Registry()
    for row in registry.datasets.values():
        assert ("train" in row.splits) == bool({"linear_probe", "detection"} & set(row.tasks))
        if isinstance(row.templates, str) and row.templates not in ("prompts", "source"):
            assert texts.load_templates(row.templates)
        if row.prompts:
            subset = subset_ids(row.subset) if row.subset else None
            table = base.read_table(row.prompts, subset)
            assert len(table.candidates) == row.classes, row.name
            assert (row.templates == "prompts") == bool(table.templates)
        assert "{" not in row.obtain.replace("{00000", ""), row.obtain
    assert len(registry.select(["quickstart"], "zero_shot")) == 3
    assert [r.name for r in registry.select(["quickstart"], "linear_probe")] == [
        "openclipart_classes"
    ]


def test_shipped_rows_are_those_of_elevater_with_its_sizes_and_metrics():
    registry = Registry()
    published = yaml.safe_load((REPOSITORY / "data_prep/elevater_sets.yaml").read_text())
    assert registry.collections["elevater20"] == list(published)
    names = {"accuracy": "top1", "mean-per-class": "mean_per_class", "roc_auc": "roc_auc"}
    names["11point_mAP"] = "map_11_point"
    for name, facts in published.items():
        row = registry.datasets[name]
        sizes = {split: entry["samples"] for split, entry in row.splits.items()}
        assert sizes == {split: facts["sizes"][split] for split in ("train", "test")}
        assert row.tasks["zero_shot"][0] == row.tasks["linear_probe"][0] == names[facts["metric"]]
        assert row.squash == (name == "kitti-distance")
        assert (row.protocol, row.resize_ratio, row.classes) == ("elevater", 1, facts["classes"])
        source = "torchvision" if facts["torchvision"] and name != "fer-2013" else "folder"
        command = f"--set {name} --split test --from {source} --root ROOT --out data/eval/{name}"
        assert command in row.command("test")
    assert len(set(registry.collections["clip27"])) == 27
    voc = registry.datasets["voc-2007-classification"]
    assert voc.multilabel
    assert not voc.labelled_only


def test_imagenet_has_both_published_protocols():
    registry = Registry()
    names = ["imagenet1k", "imagenet_r"]
    for protocol, templates, resize in ((None, 81, 256), ("unicl", 81, 256), ("elevater", 80, 224)):
        for row in registry.select(names, "zero_shot", protocol):
            assert len(texts.load_templates(row.templates)) == templates
            assert round(224 * row.resize_ratio) == resize
    with pytest.raises(ConfigError, match="dtd has no protocol unicl; it has its own only"):
        registry.select(["dtd"], "zero_shot", "unicl")
    assert registry.datasets["imagenet1k"].split_name("test") == "val"
    r, a = (registry.datasets[name] for name in ("imagenet_r", "imagenet_a"))
    assert len(subset_ids(r.subset)) == len(subset_ids(a.subset)) == 200


def test_class_texts_are_those_of_training_except_elevaters():
    """ "Bonaire, Saint Eustatius and Saba" is scored with its comma in ELEVATER."""
    registry = Registry()
    names, rng = ["a, b+c", "x"], random.Random(7)
    training = [texts.label_text([name], ["{}"], rng) for name in names]
    assert registry.datasets["imagenet1k"].class_texts(names) == training == ["a b c", "x"]
    assert registry.datasets["openclipart_classes"].class_texts(names) == training
    assert registry.datasets["country211"].class_texts(names) == names
    (row,) = registry.select(["imagenet1k"], "zero_shot", "elevater")
    assert row.class_texts(names) == names


def test_collections_with_unknown_members_say_so():
    for name in ("unicl14", "unicl18"):
        with pytest.raises(ConfigError, match=rf"{name} cannot.*could read names the members"):
            Registry().select([name], "zero_shot")


def test_data_root_moves_benchmark_sets_only(monkeypatch, tmp_path):
    def folders(registry):
        row = registry.datasets["dtd"]
        return row.folder("test"), registry.datasets["emoji_twemoji"].folder("test")

    shipped = REPOSITORY / "data/quickstart/emoji_twemoji"
    monkeypatch.delenv("UNICL_EVAL_DATA", raising=False)
    usual = REPOSITORY / "data/eval/dtd/test"
    assert folders(Registry()) == (usual, shipped)
    assert folders(Registry(data_root=tmp_path)) == (tmp_path / "dtd/test", shipped)
    monkeypatch.setenv("UNICL_EVAL_DATA", str(tmp_path / "env"))
    assert folders(Registry()) == (tmp_path / "env/dtd/test", shipped)
    assert f"--out {tmp_path}/env/dtd/test" in Registry().datasets["dtd"].obtain


def test_unknown_names_are_refused_with_the_nearest():
    registry = Registry()
    with pytest.raises(ConfigError, match="did you mean emoji_twemoji"):
        registry.select(["emoji_twemojis"], "zero_shot")
    with pytest.raises(ConfigError, match="openclipart_captions has no task zero_shot"):
        registry.select(["openclipart_captions"], "zero_shot")


def test_registry_row_with_an_unknown_key_is_refused(world, tmp_path):
    content = yaml.safe_load((world / "registry.yaml").read_text())
    content["datasets"]["toy_classes"]["clases"] = 3
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(DataError, match=r"toy_classes: .*clases"):
        Registry(tmp_path / "bad.yaml")


def test_wrong_count_names_both_numbers(row, world):
    splits = {"test": {"path": str(world / "drawn_test"), "samples": 20}}
    with pytest.raises(DataError, match=r"holds 19 labelled samples.*expects 20"):
        EvalSplit(row("toy_classes", splits=splits), "test", 32)
    with pytest.raises(DataError, match=r"3 classes occur.*expects 4"):
        EvalSplit(row("toy_classes", classes=4), "test", 32).class_names()


def test_absent_sets_are_passed_over_only_when_optional(row, tmp_path, capsys):
    splits = {"test": {"path": str(tmp_path / "nowhere"), "samples": None}}
    there, needed = row("toy_captions"), row("toy_captions", splits=splits)
    optional = replace(needed, optional=True)
    with pytest.raises(DataError, match="nowhere is not there; obtain it with: make toys"):
        those_present([there, needed], "retrieval", [])
    assert those_present([there], "retrieval", []) == [there]
    assert capsys.readouterr().out == ""
    # One line, whatever is missing, and each command in it once.
    others = [replace(optional, name="b"), replace(optional, name="c", obtain_split="make c")]
    assert those_present([optional, there, *others], "retrieval", ["quickstart"]) == [there]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("obtain them with: toy_captions, b: make toys; c: make c")
    with pytest.raises(DataError, match="nowhere"):  # named on the command line
        those_present([optional], "retrieval", ["toy_captions"])


def test_zero_shot_does_not_ask_for_the_training_split(row, world, tmp_path):
    splits = {"test": {"path": str(world / "drawn_test"), "samples": None}}
    splits["train"] = {"path": str(tmp_path / "nowhere"), "samples": None}
    half = row("toy_classes", splits=splits, optional=True)
    assert absent_splits(half) == absent_splits(half, "knn") == ["train"]
    assert absent_splits(half, "zero_shot") == []


def test_unreadable_image_and_missing_caption_name_shard_and_key(row, tmp_path):
    good = drawing(0, np.random.default_rng(0))
    samples = [{"png": good, "txt": "a"}, {"png": b"no image", "txt": "b"}, {"png": good}]
    write_set(tmp_path / "bad", "image_text", samples)
    splits = {"test": {"path": str(tmp_path / "bad"), "samples": None}}
    split = EvalSplit(row("toy_captions", splits=splits), "test", 32)
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
    split = EvalSplit(row("toy_captions", splits=splits), "test", 32)
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
        split = EvalSplit(row("toy_captions", splits=splits), "test", 32)
        hashes.append(split.content_hash)
    assert hashes[0] != hashes[1]
