"""What is found at the start, and what is not loaded for it."""

import json
import subprocess
import sys

import pytest

from loaders.left_out import left_out
from tests.commands import CONFIG, ROOT

WRONG = {
    "trian.steps=3": "the nearest is 'train'",
    "train.step=3": "the nearest is 'train.steps'",
    "model.image.sise=32": "did you mean 'size'",
    "loss.name=uncl": "loss.name='uncl' is unknown",
}
SCRIPT = """
import json, sys
from engine import config
from loaders.errors import ConfigError

said = []
for override in sys.argv[2:]:
    try:
        config.load(sys.argv[1], ["train.steps=3", override])
    except ConfigError as error:
        said.append(str(error))
print(json.dumps([said, [name for name in ("torch", "timm", "wandb") if name in sys.modules]]))
"""


def test_wrong_keys_are_refused_before_torch_is_loaded():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, CONFIG, *WRONG],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    said, loaded = json.loads(done.stdout)
    for words, text in zip(WRONG.values(), said, strict=True):
        assert words in text
    assert loaded == []


def test_a_package_is_left_out_for_a_while(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with left_out("colorsys"), pytest.raises(ImportError):
        import colorsys
    import colorsys

    with left_out("colorsys"):
        import colorsys as again

        assert again is colorsys
