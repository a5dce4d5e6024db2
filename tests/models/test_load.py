"""`models.load`: a model with the transform and tokenizer of evaluation, wherever it lies."""

import shutil

import pytest
import torch
from PIL import Image

import models
from loaders import tokenizers, views
from loaders.errors import ConfigError, DataError
from models.export import export
from models.transform import Transform
from tests.engine import run_folder
from tests.models import reference_folders
from tests.models.test_export import photo

TEXTS = ["a cat", "A photo of a dog.  "]
WORDS = {"width": 32, "layers": 2, "heads": 2, "context_length": 12}
KINDS = {
    "two_tower": {},
    "late": {"similarity": "late", "token_dim": 10},
    "one_tower of words": {"text": WORDS, "kind": "one_tower"},
    "one_tower of pictures": {
        "text": {"name": "pixels", "tokenizer": "rendered"}, "kind": "one_tower",
    },
    "reference": {"kind": "reference"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_model_with_the_transform_and_tokenizer_of_evaluation(kind, tmp_path):
    changes = dict(KINDS[kind])
    if kind == "reference":
        place, _ = reference_folders.make(tmp_path / "reference")
        changes["reference"] = {"folder": place, "neighbours": 3, "heads": 2}
    made = run_folder.write(tmp_path / "run", **changes)
    model, transform, tokenizer = models.load(tmp_path / "run")
    assert not model.training
    image, ids = transform(photo()), tokenizer(TEXTS)
    expected = views.build_eval(32, 32)(photo())
    assert torch.equal(image, views.normalize(expected, made.cfg.image.mean, made.cfg.image.std))
    text = made.cfg.text
    assert torch.equal(ids, tokenizers.build(text.tokenizer, text.context_length, 32)(TEXTS))
    found, wanted = (
        (m.encode_image(image[None])["feature"], m.encode_text(ids)["feature"])
        for m in (model, made)
    )
    assert all(map(torch.equal, found, wanted))
    if kind == "late":  # has a vector of an image and one of a text, but neither is trained
        with pytest.raises(ConfigError, match=r"model\.similarity=late compares tokens"):
            model(image[None], ids)
    else:
        image, text, scale = model(image[None], ids)
        assert torch.equal(image @ text.T, wanted[0] @ wanted[1].T)
        assert torch.equal(scale, made.scale())


@torch.no_grad()
def test_every_place_that_a_model_lies_in(tmp_path):
    run = tmp_path / "run"
    expected = run_folder.write(run).encode_text(tokenizers.build()(TEXTS))["feature"]
    checkpoint = run / "checkpoints" / "step_0000007"
    alone = tmp_path / "alone"  # weights of a run, its configuration beside them
    alone.mkdir()
    shutil.copy(checkpoint / "model.safetensors", alone)
    shutil.copy(run / "config.yaml", alone)
    places = [run, checkpoint, checkpoint / "model.safetensors", alone / "model.safetensors", alone]
    for name in ("pt", "safetensors", "open_clip"):
        export(run, name, tmp_path / name)
        places.append(tmp_path / name)
    places += [tmp_path / "pt" / "run.pt", tmp_path / "open_clip" / "open_clip_model.safetensors"]
    for place in places:
        model, transform, tokenizer = models.load(str(place))
        assert torch.equal(model.encode_text(tokenizer(TEXTS))["feature"], expected), place
        assert (transform.size, transform.mean) == (32, (0.4, 0.5, 0.6))


def test_a_folder_of_another_library_says_how_it_is_loaded(tmp_path):
    run_folder.write(tmp_path / "run")
    for name, call in (("hf", "VisionTextDualEncoderModel"), ("timm", "timm.create_model")):
        export(tmp_path / "run", name, tmp_path / name)
        with pytest.raises(DataError, match=rf"load it with.*{call}.*or give the run itself"):
            models.load(tmp_path / name)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "turned"])
def test_an_opened_image_becomes_what_its_file_becomes(mode, tmp_path):
    """Grey, transparent, with a palette, turned by EXIF data: as evaluation decodes the file."""
    image, path = photo(), tmp_path / ("x.jpg" if mode in ("CMYK", "turned") else "x.png")
    options = {}
    if mode == "RGBA":
        image.putalpha(Image.radial_gradient("L").resize(image.size))
    elif mode == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    else:
        image = image.convert(mode)
    image.save(path, **options)
    transform = Transform(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    decoded = views.decode(path.read_bytes())
    opened = Image.open(path)
    before = (opened.mode, opened.size)
    assert torch.equal(transform(opened), transform.normalize(transform.pixels(decoded)))
    assert (opened.mode, opened.size) == before
    assert opened.size == decoded.size or mode == "turned"
