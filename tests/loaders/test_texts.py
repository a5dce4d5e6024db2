"""Prompts and captions."""

import json
import random
from collections import Counter

import pytest

from loaders.errors import ConfigError
from loaders.manifest import open_shards
from loaders.texts import (
    BadText,
    TextOptions,
    caption_text,
    label_text,
    load_templates,
    read_caption,
)
from tests.loaders.conftest import sample, write_tar


def test_presets():
    counts = {"clip_80": 80, "unicl_81": 81}
    for name in ("clip_80", "unicl_81", "simple", "clipart"):
        templates = load_templates(name)
        assert len(templates) == len(set(templates)) == counts.get(name, len(templates))
        assert all(t.format("cat") == t.replace("{}", "cat") for t in templates)
    assert set(load_templates("unicl_81")) - set(load_templates("clip_80")) == {"{}."}


def test_templates_from_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(["a {}", "{} {braces}"]))
    assert load_templates(str(path)) == ["a {}", "{} {braces}"]
    for wrong in ("[]", '["no place"]', '["{} and {}"]', '{"a": 1}', '"{}"', "no json"):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=r"mine\.json"):
            load_templates(str(path))
    with pytest.raises(ConfigError, match="clip_80, unicl_81"):
        load_templates("clip80")


def test_names_are_cleaned_and_everything_is_drawn_uniformly():
    assert label_text(["hot+rod, red, {}"], ["a {}."], random.Random(0)) == "a hot rod red {}."
    rng = random.Random(1)
    names, templates = ["a", "b", "c"], ["x {}", "y {}"]
    draws = Counter(label_text(names, templates, rng) for _ in range(6000))
    expected = {t.replace("{}", n) for n in names for t in templates}
    assert set(draws) == expected
    assert all(abs(count - 1000) < 5 * 1000**0.5 for count in draws.values())


@pytest.mark.parametrize(
    ("raw", "choice", "result"),
    [
        (" a cat\n", "txt", "a cat"),
        ({"alt": "a dog", "caption": "x"}, "json.alt", "a dog"),
        (None, "txt", BadText("no_caption")),
        ({}, "json.alt", BadText("no_caption")),
        ({"alt": 5}, "json.alt", BadText("caption_not_text")),
        ("", "txt", BadText("empty_caption")),
        (" \t\n", "txt", BadText("empty_caption")),
    ],
)
def test_captions(raw, choice, result):
    if isinstance(result, str):
        assert caption_text(raw, choice) == result
    else:
        with pytest.raises(BadText, match=result.reason):
            caption_text(raw, choice)


def test_captions_of_shards(tmp_path):
    members = sample("a", txt="größe".encode(), json=b'{"c": "from json"}')
    members += sample("b", txt=b"gr\xf6\xdfe", json=b"{broken") + sample("c", json=b"[1]")
    shards = open_shards(write_tar(tmp_path / "a.tar", members))
    assert read_caption(shards, 0, "txt") == "größe"
    assert read_caption(shards, 0, "json.c") == "from json"
    for index, choice, reason in (
        (1, "txt", "caption_not_utf8"),
        (1, "json.c", "bad_json"),
        (2, "json.c", "bad_json"),
        (2, "txt", "no_caption"),
    ):
        with pytest.raises(BadText, match=reason):
            read_caption(shards, index, choice)


@pytest.mark.parametrize(
    "wrong", [{"caption_source": "json."}, {"caption_source": "text"}, {"views": 0}]
)
def test_options_are_checked(wrong):
    with pytest.raises(ConfigError):
        TextOptions(["a {}"], **wrong)
