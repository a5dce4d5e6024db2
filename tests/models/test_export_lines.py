"""The lines that `models.export` prints run as typed: model, transform and tokenizer, offline."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from loaders import tokenizers
from models import export
from models.transform import Transform
from tests.engine import run_folder
from tests.models.test_export import photo

ROOT = Path(__file__).parents[2]
TEXTS = ["A photo of a cat.", "word " * 90]


def of_ours(model, pixels, ids):
    return model.encode_image(pixels)["feature"], model.encode_text(ids)["feature"]


def of_open_clip(model, pixels, ids):
    return model.encode_image(pixels), model.encode_text(ids)


def of_transformers(model, pixels, ids):
    image, text = model.get_image_features(pixels), model.get_text_features(**ids)
    return image.pooler_output, text.pooler_output


def of_timm(model, pixels, ids):
    return (model(pixels),)


USES = {
    "pt": of_ours, "safetensors": of_ours, "open_clip": of_open_clip, "hf": of_transformers,
    "timm": of_timm,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run whose name has what a literal of Python must escape, and its model."""
    run = tmp_path_factory.mktemp("made") / 'it\'s a "run"'
    return run, run_folder.write(run)


@pytest.mark.parametrize("form", export.FORMATS)
@torch.no_grad()
def test_printed_lines_run_as_typed(form, made, tmp_path, capsys, monkeypatch):
    run, model = made
    place = tmp_path / 'my "out"'
    export.main(["--checkpoint", str(run), "--format", form, "--output", str(place)])
    lines = capsys.readouterr().out.partition("load it with\n")[2]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = {}
    exec(lines, found)
    assert (form in ("pt", "safetensors")) == (f'sys.path.insert(0, "{ROOT}")' in lines)
    assert not found["model"].training
    options = {"return_tensors": "pt"} if form == "hf" else {}
    pixels = found["transform"](photo(), **options)
    pixels = pixels["pixel_values"] if form == "hf" else pixels[None]
    torch.testing.assert_close(pixels[0], Transform.of(model.cfg)(photo()), rtol=0, atol=1e-6)
    expected = of_ours(model, pixels, tokenizers.build()(TEXTS))
    if form == "timm":
        assert "tokenizer" not in found
        expected = (F.normalize(model.encode_image(pixels)["pooled"], dim=-1),)
    options |= {"padding": True, "truncation": True} if form == "hf" else {}
    ids = None if form == "timm" else found["tokenizer"](TEXTS, **options)
    features = USES[form](found["model"], pixels, ids)
    for ours, theirs in zip(expected, features, strict=True):
        torch.testing.assert_close(ours, F.normalize(theirs, dim=-1), rtol=0, atol=1e-5)
