"""Class texts and templates of the 20 sets of ELEVATER: complete, well formed, pinned."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "prompts" / "elevater"
SETS = yaml.safe_load((ROOT / "data_prep" / "elevater_sets.yaml").read_text(encoding="utf-8"))
PINNED = {  # sha256 of texts and templates, a line each
    "caltech-101": "2c70106d9c043da2",
    "cifar-10": "87d688ae349ae508",
    "cifar-100": "6dd2338a4a35bb6e",
    "country211": "e7cc4a1ca126a4dd",
    "dtd": "f8643cbd8ba944ed",
    "eurosat_clip": "c01158c651926b80",
    "fer-2013": "044a54e2eefbf456",
    "fgvc-aircraft-2013b-variants102": "f8640b068c230ee8",
    "food-101": "6444358fe1f4c6d7",
    "gtsrb": "d78ad628aff0e127",
    "hateful-memes": "e4502ce75ffc11e6",
    "kitti-distance": "b44c2b38a9319415",
    "mnist": "d11e3e6b1ee856b3",
    "oxford-flower-102": "9362b6e0d025f913",
    "oxford-iiit-pets": "6ed2c95638a05e92",
    "patch-camelyon": "3fbc98cb5b116c70",
    "rendered-sst2": "84f4a23388becc72",
    "resisc45_clip": "475677c6af59883e",
    "stanford-cars": "9dfd3864e9b6ae3b",
    "voc-2007-classification": "737e6a92e5c56526",
}


def load(name):
    return json.loads((PROMPTS / f"{name}.json").read_text(encoding="utf-8"))


def texts(content):
    return [entry["names"][0] for entry in content["classes"]]


def test_the_twenty_sets():
    assert len(SETS) == 20
    assert {path.stem for path in PROMPTS.iterdir()} == set(SETS)
    assert [name for name in SETS if load(name)["multilabel"]] == ["voc-2007-classification"]


@pytest.mark.parametrize("name", SETS)
def test_counts_and_form(name):
    content, row = load(name), SETS[name]
    assert content["name"] == name
    assert content["title"] == row["title"]
    assert content["license"].startswith("MIT (openai/CLIP")
    assert "ELEVATER toolkit" in content["source"]
    assert [entry["id"] for entry in content["classes"]] == list(range(row["classes"]))
    assert len(content["templates"]) == row["templates"]
    assert len(set(content["templates"])) == row["templates"]
    names = [text for entry in content["classes"] for text in entry["names"]]
    assert all(text and text == text.strip() for text in names)
    assert len(set(names)) == len(names)
    assert all(entry["synset"] is None for entry in content["classes"])


@pytest.mark.parametrize("name", SETS)
def test_templates_have_one_gap(name):
    for template in load(name)["templates"]:
        assert template.count("{}") == 1
        assert template.replace("{}", "").count("{") == template.replace("{}", "").count("}") == 0
        assert template.format("dog").count("dog") == 1
        assert (template == "{}") == (name == "kitti-distance")


@pytest.mark.parametrize("name", SETS)
def test_texts_are_the_pinned_ones(name):
    content = load(name)
    digest = hashlib.sha256("\n".join([*texts(content), *content["templates"]]).encode())
    assert digest.hexdigest()[:16] == PINNED[name]


def test_orders_that_are_elevaters_own():
    cifar = texts(load("cifar-100"))
    assert cifar[:3] == ["chimpanzee", "trout", "skunk"]
    assert cifar != sorted(cifar)
    emotions = texts(load("fer-2013"))
    assert emotions == sorted(emotions)
    assert SETS["fer-2013"]["integers"] != emotions  # Kaggle numbers them otherwise
    assert sorted(SETS["fer-2013"]["integers"]) == emotions
    assert texts(load("caltech-101"))[37:39] == ["centered face", "off-center face"]
    countries = list(SETS["country211"]["aliases"].items())
    assert [text for _, text in countries] == texts(load("country211"))
    assert [code for code, _ in countries] == sorted(code for code, _ in countries)


@pytest.mark.parametrize("name", SETS)
def test_rows_are_complete(name):
    row = SETS[name]
    assert set(row["sizes"]) == {"train", "val", "test"}
    assert row["sizes"]["train"] > 0
    assert row["sizes"]["test"] > 0
    index = row["archive"]["index"]
    assert {split for split in index if index[split]} == {
        s for s in row["sizes"] if row["sizes"][s]
    }
    given = set(row["torchvision"] or {}) - {"class"}
    assert given <= {split for split, size in row["sizes"].items() if size}
    assert row["metric"] in ("accuracy", "mean-per-class", "11point_mAP", "roc_auc")
    assert set(row["aliases"].values()) <= set(texts(load(name)))
    assert all(isinstance(alias, str) for alias in row["aliases"])  # YAML reads a bare NO as false
