"""What the documents say of other programs, run as typed on a small export and small data.

`DIR`, `D`, `RUN` and `T` are folders of these names; `N` and `B` are numbers.
"""

import json
import logging
import re
import shlex
import subprocess
from pathlib import Path

import clip_benchmark.cli
import datasets
import numpy as np
import open_clip
import open_clip_train.main
import pytest
import safetensors.torch
import timm
import torch
import webdataset
from transformers import VisionTextDualEncoderModel

from loaders import manifest, views
from models import export, weights
from tests.eval import conftest, peers

ROOT = Path(__file__).parents[2]
DOCUMENTS = "\n".join(
    path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
)
LIBRARIES = {
    "open_clip": open_clip, "timm": timm, "torch": torch, "safetensors": safetensors,
    "VisionTextDualEncoderModel": VisionTextDualEncoderModel, "webdataset": webdataset,
    "datasets": datasets,
}  # fmt: skip
# Each of our exports is read by the line that begins with this.
READERS = {
    "pt": "torch.load(", "safetensors": "safetensors.", "open_clip": "open_clip.",
    "hf": "VisionTextDualEncoderModel.", "timm": "timm.",
}  # fmt: skip
SAMPLES = 32


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the run `NAME` (also called `RUN`) and the data set `D`."""
    home = tmp_path_factory.mktemp("home")
    conftest.write_run(home / "NAME", seed=0)
    (home / "RUN").symlink_to("NAME")
    random = np.random.default_rng(1)
    names = conftest.NAMES
    samples = [
        {"png": conftest.drawing(i % 3, random), "txt": f"a {names[i % 3]} {i}", "cls": i % 3}
        for i in range(SAMPLES)
    ]
    conftest.write_set(home / "D", "image_text", samples)
    return home


def block(begins: str) -> list[str]:
    """Lines of the only block of code that has this text; continued ones joined."""
    (found,) = (b for b in re.findall(r"```\w*\n(.*?)```", DOCUMENTS, re.DOTALL) if begins in b)
    return found.replace("\\\n", " ").splitlines()


def evaluated(line: str):
    return eval(line, dict(LIBRARIES))


@torch.no_grad()
def top1(home, names) -> float:
    """Share of the first tar's images that the run's towers put in their class."""
    model = weights.load(home / "NAME").model
    shards, view = manifest.open_shards(str(home / "D")), views.build_eval(*2 * [conftest.SIZE])
    pixels = [view(views.decode(shards.read_image(i))) for i in range(SAMPLES // 2 + 1)]
    images = model.encode_image(views.normalize(torch.stack(pixels), peers.MEAN, peers.STD))
    texts = model.encode_text(peers.tokenizer()([f"a photo of a {name}." for name in names]))
    best = (images["feature"] @ texts["feature"].T).argmax(1).numpy()
    return float((best == shards.labels[: len(best)]).mean())


@pytest.mark.parametrize("form", READERS)
def test_exports_are_read_by_the_documented_line(form, home, tmp_path, monkeypatch):
    (line,) = re.findall(
        rf"^\| `{form}` \|.*\| `({re.escape(READERS[form])}.*)` \|$", DOCUMENTS, re.M
    )
    monkeypatch.chdir(tmp_path)
    export.export(home / "NAME", form, "DIR")
    assert evaluated(line)


def test_shards_are_read_by_the_documented_lines(home, monkeypatch, tmp_path):
    monkeypatch.chdir(home)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    lines = block("webdataset.WebDataset(")
    assert len(lines) == 2
    captions = [[sample["txt"] for sample in evaluated(line)] for line in lines]
    assert captions[0] == captions[1]
    assert len(captions[0]) == SAMPLES


def test_training_by_open_clip_as_typed(home, monkeypatch):
    monkeypatch.chdir(home)
    exporting, training = block("open_clip_train.main")
    words = shlex.split(exporting)
    assert words[:3] == ["python", "-m", "models.export"]
    export.main(words[3:])
    training = re.sub(r"\bN\b", "16", re.sub(r"\bB\b", "4", training))
    words = shlex.split(training)
    assert words[:3] == ["python", "-m", "open_clip_train.main"]
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        open_clip_train.main.main(words[3:])
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    log = next(home.glob("logs/*/out.log")).read_text()
    assert "[16/16 (100%)]" in log
    assert len(list(home.glob("logs/*/checkpoints/epoch_1.pt"))) == 1


def test_clip_benchmark_as_typed(home, monkeypatch):
    """Its command counts what our towers give for the same images and texts."""
    monkeypatch.chdir(home)
    if not (home / "DIR").exists():
        export.export("NAME", "open_clip", "DIR")
    *shell, command = block("clip_benchmark eval")
    for line in shell:
        subprocess.run(["bash", "-c", line], check=True)
    monkeypatch.setattr("sys.argv", shlex.split(command))
    clip_benchmark.cli.main()
    found = json.loads(Path("T.json").read_text())["metrics"]
    assert found["acc1"] == pytest.approx(top1(home, conftest.NAMES))
    assert 0 < found["acc1"] < 1
