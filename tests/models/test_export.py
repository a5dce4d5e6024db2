"""Every export, reloaded by the library it is meant for and compared with the run's own model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from loaders import tokenizers, views
from loaders.errors import ConfigError, run_cli
from models import weights
from models.export import export, main
from tests.engine import run_folder
from tests.engine.run_folder import TEXTS

SIZES = {"vit": 32, "swin": 32, "resnet": 48}
# Above the bound of 100, so that the exported value has to be the bounded one.
SCALE = {"logit_scale_init": 6.0, "logit_scale_max": 100.0}


def equal(ours, theirs):
    torch.testing.assert_close(ours, F.normalize(theirs, dim=-1), rtol=0, atol=1e-5)
    assert ours.std() > 0.01


def noise(size):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))


def photo(width=90, height=61):
    """A smooth random picture that is neither square nor of the model's size."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(7, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def eval_pixels(size):
    image = views.build_eval(size, size)(photo())
    return views.normalize(image, (0.4, 0.5, 0.6), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("image", SIZES)
@torch.no_grad()
def test_open_clip_folder(image, tmp_path):
    model = run_folder.write(tmp_path / "run", image, **SCALE)
    how = export(tmp_path / "run", "open_clip", tmp_path / "out")
    name = f"local-dir:{tmp_path / 'out'}"
    assert name in how
    assert ("holds this folder's absolute path" in how) == (image != "resnet")
    theirs, _, transform = open_clip.create_model_and_transforms(name)
    theirs.eval()
    assert type(theirs).__name__ == "CustomTextCLIP"
    images = noise(SIZES[image])
    equal(model.encode_image(images)["feature"], theirs.encode_image(images))
    ids = open_clip.get_tokenizer(name)(TEXTS)
    assert torch.equal(ids, tokenizers.build("clip", 77)(TEXTS))
    assert ids[-1, 76] == 49407  # cut: the last text has more than 77 tokens
    equal(model.encode_text(ids)["feature"], theirs.encode_text(ids))
    stored = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert {value.ndim for name, value in stored.items() if "num_batches" in name} <= {0}
    assert theirs.logit_scale.shape == stored["logit_scale"].shape == ()
    assert theirs.logit_scale.exp().item() == pytest.approx(100)
    assert torch.equal(transform(photo()), eval_pixels(SIZES[image]))
    back = weights.load(tmp_path / "out").model
    assert torch.equal(back.encode_image(images)["feature"], model.encode_image(images)["feature"])


def test_open_clip_folder_of_a_named_architecture_holds_no_path(tmp_path):
    run_folder.write(tmp_path / "run", "resnet")
    assert "absolute" not in export(tmp_path / "run", "open_clip", tmp_path / "out")
    config = (tmp_path / "out" / "open_clip_config.json").read_text()
    assert json.loads(config)["model_cfg"]["vision_cfg"]["timm_model_name"] == "test_resnet"
    assert str(tmp_path) not in config
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "open_clip_config.json", "open_clip_model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("pooling", ["first", "mean"])
@torch.no_grad()
def test_open_clip_folder_with_a_hugging_face_text_tower(pooling, tmp_path):
    text = run_folder.bert_text(tmp_path / "tokenizer", pooling)
    model = run_folder.write(tmp_path / "run", "vit", text)
    export(tmp_path / "run", "open_clip", tmp_path / "out")
    name = f"local-dir:{tmp_path / 'out'}"
    theirs = open_clip.create_model(name).eval()
    texts = ["", "a photo", "word " * 30, "[SEP] in a text"]
    ids = open_clip.get_tokenizer(name)(texts)
    assert torch.equal(ids, tokenizers.build(str(tmp_path / "tokenizer"), 40)(texts))
    equal(model.encode_text(ids)["feature"], theirs.encode_text(ids))


@pytest.mark.parametrize("image", SIZES)
@torch.no_grad()
def test_hugging_face_folder(image, tmp_path):
    model = run_folder.write(tmp_path / "run", image, **SCALE)
    export(tmp_path / "run", "hf", tmp_path / "out")
    theirs = VisionTextDualEncoderModel.from_pretrained(tmp_path / "out")
    pixels = noise(SIZES[image])
    ours = model.encode_image(pixels)["feature"]
    equal(ours, theirs.get_image_features(pixels).pooler_output)

    processor = VisionTextDualEncoderProcessor.from_pretrained(tmp_path / "out")
    batch = processor(
        text=TEXTS, images=[photo()], padding=True, truncation=True, return_tensors="pt"
    )
    ids = tokenizers.build("clip", 77)(TEXTS)
    assert batch["input_ids"].shape == (len(TEXTS), 77)
    features = model.encode_text(ids)["feature"]
    equal(features, theirs.get_text_features(ids).pooler_output)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    equal(features, theirs.get_text_features(**inputs).pooler_output)
    torch.testing.assert_close(
        theirs(pixel_values=pixels, **inputs).logits_per_image,
        100 * ours @ features.T,
        rtol=0,
        atol=1e-3,
    )


def test_hugging_face_image_processor_and_tokenizer(tmp_path):
    run_folder.write(tmp_path / "run")
    export(tmp_path / "run", "hf", tmp_path / "out")
    for source in (AutoImageProcessor, AutoProcessor):
        processor = source.from_pretrained(tmp_path / "out")
        processor = getattr(processor, "image_processor", processor)
        pixels = processor(photo(), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels, eval_pixels(32))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == 77
    texts = [*TEXTS, "the <|endoftext|> in a caption!", "ends with !"]
    rows = tokenizer(texts, truncation=True)["input_ids"]
    for row, ours in zip(rows, tokenizers.build("clip", 77)(texts).tolist(), strict=True):
        assert row == ours[: ours.index(49407) + 1]


@torch.no_grad()
def test_hugging_face_folder_with_bert(tmp_path):
    text = run_folder.bert_text(tmp_path / "tokenizer", "first")
    model = run_folder.write(tmp_path / "run", "vit", text)
    export(tmp_path / "run", "hf", tmp_path / "out")
    theirs = VisionTextDualEncoderModel.from_pretrained(tmp_path / "out")
    texts = ["", "a photo", "word " * 30, "[SEP] in a text"]
    ids = tokenizers.build(str(tmp_path / "tokenizer"), 40)(texts)
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")(
        texts, padding=True, truncation=True, return_tensors="pt"
    )
    assert torch.equal(batch["input_ids"], ids)
    projected = theirs.get_text_features(**batch).pooler_output
    equal(model.encode_text(ids)["feature"], projected)
    expected = model.text_projection(model.encode_text(ids)["pooled"])
    torch.testing.assert_close(projected, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("image", SIZES)
@torch.no_grad()
def test_timm_checkpoint(image, tmp_path):
    trunk = run_folder.write(tmp_path / "run", image).image.trunk
    export(tmp_path / "run", "timm", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    settings = run_folder.IMAGES[image]
    name = {"swin_tiny": "swin_tiny_patch4_window7_224"}.get(settings["name"], settings["name"])
    arguments = {"num_classes": 0, **settings.get("kwargs", {})}
    if image != "resnet":
        arguments["img_size"] = 32
    reloaded = [
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0),
        timm.create_model(name, checkpoint_path=file, **arguments),
        timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **arguments
        ),
    ]
    images = noise(SIZES[image])
    expected = trunk.forward_features(images)
    for theirs in reloaded:
        features = theirs.eval().forward_features(images)
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    config = timm.data.resolve_model_data_config(reloaded[0])
    transform = timm.data.create_transform(**config)
    torch.testing.assert_close(transform(photo()), eval_pixels(SIZES[image]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("text", ["transformer", "hf"])
@torch.no_grad()
def test_plain_files(text, tmp_path):
    section = None
    if text == "hf":  # by name: the files must not need what the name stands for
        section = run_folder.bert_text(tmp_path / "tokenizer", "mean")
        encoder = tmp_path / "encoder"
        encoder.mkdir()
        (encoder / "config.json").write_text(json.dumps(section.pop("hf_config")))
        section |= {"hf_name": str(encoder), "pretrained": False}
    model = run_folder.write(tmp_path / "run", "resnet", section, **SCALE)
    export(tmp_path / "run", "pt", tmp_path / "pt")
    content = torch.load(tmp_path / "pt" / "run.pt", weights_only=True)
    assert list(content) == [
        "state_dict", "config", "step", "tokenizer", "image", "training_git",
    ]  # fmt: skip
    assert content["step"] == 7
    assert content["config"]["text"]["name"] == text
    assert content["tokenizer"] == (str(tmp_path / "tokenizer") if text == "hf" else "clip")
    assert content["image"] == {
        "size": 48, "resize": 48, "interpolation": "bicubic", "mean": [0.4, 0.5, 0.6],
        "std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    export(tmp_path / "run", "safetensors", tmp_path / "st")
    state = load_file(tmp_path / "st" / "model.safetensors")
    expected = model.state_dict()
    for other in (content["state_dict"], state):
        assert other.keys() == expected.keys()
        assert all(torch.equal(other[key], expected[key]) for key in expected)
    described = json.loads((tmp_path / "st" / "config.json").read_text())
    assert described == {key: content[key] for key in described}
    if text == "hf":
        shutil.rmtree(encoder)
    ids = torch.arange(1, 7)[None] * 9
    for path, name in ((tmp_path / "pt" / "run.pt", "run"), (tmp_path / "st", "st")):
        loaded = weights.load(path)
        assert (loaded.name, loaded.step) == (name, 7)
        assert torch.equal(loaded.model.scale(), model.scale())
        ours = model.encode_text(ids)["feature"]
        assert torch.equal(loaded.model.encode_text(ids)["feature"], ours)


@torch.no_grad()
def test_late_interaction_in_every_format(tmp_path):
    """What has no word for it refuses; the trunk alone does not need one."""
    model = run_folder.write(tmp_path / "run", "vit", similarity="late", token_dim=10)
    for name in ("open_clip", "hf"):
        with pytest.raises(
            ConfigError, match=r"cannot express model\.similarity=late, only cosine"
        ):
            export(tmp_path / "run", name, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    export(tmp_path / "run", "timm", tmp_path / "timm")
    timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0)
    images, ids = noise(32), tokenizers.build("clip", 77)(TEXTS)
    expected = model.encode_image(images), model.encode_text(ids)
    for name, file in (("pt", "run.pt"), ("safetensors", "model.safetensors")):
        export(tmp_path / "run", name, tmp_path / name)
        loaded = weights.load(tmp_path / name / file).model
        found = loaded.encode_image(images), loaded.encode_text(ids)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert loaded.cfg == model.cfg.without_pretrained()


def test_what_a_format_cannot_express_is_named_and_leaves_nothing(tmp_path):
    mean = run_folder.bert_text(tmp_path / "tokenizer", "mean")
    electra = {**mean, "hf_config": {**run_folder.BERT, "model_type": "electra"}}
    run_folder.write(tmp_path / "mean", "vit", mean)
    run_folder.write(tmp_path / "electra", "vit", electra)
    run_folder.write(tmp_path / "mobile", "mobilenetv3_small_050")
    for run, name, words in (
        ("mean", "hf", "'bert' with pooling 'mean'"),
        ("electra", "hf", "'electra'"),
        ("electra", "open_clip", "'electra': open_clip wraps only bert"),
        ("mobile", "open_clip", "'mobilenetv3_small_050': open_clip expects .* width 288"),
    ):
        with pytest.raises(ConfigError, match=words):
            export(tmp_path / run, name, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_the_path_of_objects_stays_in_our_formats_and_is_left_out_of_others_by_name(tmp_path):
    regions = {"width": 6, "count": 3, "blocks": 1}
    model = run_folder.write(tmp_path / "run", "vit", regions=regions)
    images, values = noise(SIZES["vit"]), (torch.randn(2, 3, 6), torch.ones(2, 3) > 0)
    expected = model.encode_image(images)["feature"]
    words = "left out: model.regions, which only training uses"
    for name in ("safetensors", "open_clip"):
        own = name == "safetensors"
        assert (words in export(tmp_path / "run", name, tmp_path / name)) != own
        back = weights.load(tmp_path / name).model
        assert torch.equal(back.encode_image(images)["feature"], expected)
        assert back.cfg.regions == (model.cfg.regions if own else None)
        if own:
            found, wanted = (one.encode_regions(*values)["feature"] for one in (back, model))
            assert torch.equal(found, wanted)


@torch.no_grad()
def test_a_model_that_is_told_what_was_done_to_images(tmp_path):
    """Ours keep it whole, timm's is the tower alone, and the others have no such part."""
    sizes = {"width": 5, "hidden": 11}
    model = run_folder.write(tmp_path / "run", "resnet", augmentation=sizes)
    images = noise(SIZES["resnet"])
    told = torch.rand(3, 13, generator=torch.Generator().manual_seed(1))
    for name, file in (("pt", "run.pt"), ("safetensors", ".")):
        export(tmp_path / "run", name, tmp_path / name)
        back = weights.load(tmp_path / name / file).model
        for parameters in (None, told):
            ours, theirs = (m.encode_image(images, parameters)["feature"] for m in (model, back))
            assert torch.equal(ours, theirs)
    export(tmp_path / "run", "timm", tmp_path / "timm")
    trunk = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0)
    pooled = trunk.eval()(images)
    torch.testing.assert_close(model.encode_image(images)["pooled"], pooled, rtol=0, atol=1e-5)
    for name in ("open_clip", "hf"):
        words = rf"--format {name} cannot express model\.augmentation={{'width': 5.*only null"
        with pytest.raises(ConfigError, match=words):
            export(tmp_path / "run", name, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_command_line_and_an_output_that_exists(tmp_path, capsys):
    run_folder.write(tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "step_0000007"
    arguments = ["--checkpoint", str(step), "--format", "pt", "--output", str(tmp_path / "out")]
    main(arguments)
    written = tmp_path / "out" / "run.pt"
    assert f'models.load("{written}")' in capsys.readouterr().out
    before = written.read_bytes()
    with pytest.raises(SystemExit) as caught:
        run_cli(lambda: main(arguments))
    assert caught.value.code == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert written.read_bytes() == before


@pytest.mark.parametrize("module", ["models.export", "engine.export"])
def test_help_and_a_wrong_flag_are_answered_before_anything_installed_is_imported(module):
    """`-S` hides all installed packages, torch among them."""
    for arguments, code, words in (
        (["--help"], 0, "--output DIR"),
        (["--format", "onnx"], 2, "invalid choice: 'onnx'"),
    ):
        done = subprocess.run(
            [sys.executable, "-S", "-m", module, *arguments],
            cwd=Path(__file__).parents[2], capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert words in (done.stderr if code else done.stdout)
        moved = "`python -m engine.export` is now `python -m models.export`" in done.stderr
        assert moved == (module == "engine.export")
