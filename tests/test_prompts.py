import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from timm.data import ImageNetInfo

PROMPTS = Path(__file__).parents[1] / "prompts"
TEMPLATES = json.loads((PROMPTS / "templates.json").read_text(encoding="utf-8"))
IMAGENET = json.loads((PROMPTS / "imagenet1k.json").read_text(encoding="utf-8"))
CLASSES = IMAGENET["classes"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_preset_is_usable(name):
    preset = TEMPLATES[name]
    assert preset["source"]
    assert preset["license"]
    templates = preset["templates"]
    assert len(set(templates)) == len(templates)
    for template in templates:
        assert template.count("{}") == 1
        assert "{" not in template.format("dog")
        assert "dog" in template.format("dog")


def test_template_counts():
    counts = {name: len(preset["templates"]) for name, preset in TEMPLATES.items()}
    assert counts.pop("clipart") in range(8, 13)
    assert counts == {"clip_80": 80, "unicl_81": 81, "simple": 1}
    clip, unicl = TEMPLATES["clip_80"]["templates"], TEMPLATES["unicl_81"]["templates"]
    assert set(unicl) - set(clip) == {"{}."}
    assert set(clip) <= set(unicl)
    assert set(TEMPLATES["simple"]["templates"]) <= set(clip)


def test_imagenet_classes_follow_the_sorted_synsets():
    assert [entry["id"] for entry in CLASSES] == list(range(1000))
    synsets = [entry["synset"] for entry in CLASSES]
    assert synsets == sorted(set(synsets))
    assert synsets == ImageNetInfo("imagenet-1k").label_names()
    known = {"n01440764": "tench", "n02123045": "tabby cat", "n15075141": "toilet paper"}
    assert {e["synset"]: e["names"][0] for e in CLASSES if e["synset"] in known} == known


def test_imagenet_names():
    names = [name for entry in CLASSES for name in entry["names"]]
    assert len(names) == 1000
    assert all(name == name.strip() and name for name in names)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    assert digest == IMAGENET["names_sha256"]
    repeated = {name: count for name, count in Counter(names).items() if count > 1}
    assert repeated == {"missile": 2, "sunglasses": 2}
