import hashlib
from collections import OrderedDict

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import models
from loaders.errors import DataError
from models.weights import load_official_unicl, load_run
from tests.models.reference import ReferenceUniCL, random_captions

TEXT = {"vocab_size": 120, "context_length": 20, "width": 128, "layers": 2, "heads": 2}
KLITE_NAMES = {
    "image_encoder": "visual",
    "text_encoder": "text",
    "image_projection": "vision_projection",
}


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    return ReferenceUniCL(TEXT, embed_dim=48).eval()


def rename(state, names):
    renamed = OrderedDict()
    for key, value in state.items():
        top, dot, rest = key.partition(".")
        renamed[names.get(top, top) + dot + rest] = value
    return renamed


def save(tmp_path, state, wrapper="model"):
    path = tmp_path / "release.pth"
    torch.save({wrapper: state} if wrapper else state, path)
    return path


@pytest.mark.parametrize(
    ("names", "wrapper", "prefix"),
    [({}, "model", ""), (KLITE_NAMES, "state_dict", "model._orig_mod.module."), ({}, None, "")],
)
def test_official_checkpoint_gives_the_references_features(
    reference, tmp_path, capsys, names, wrapper, prefix
):
    state = rename(reference.state_dict(), names)
    assert any(key.endswith("relative_position_index") for key in state)
    assert any(key.endswith("attn_mask") for key in state)
    state = {f"{prefix}{key}": value for key, value in state.items()}
    model = load_official_unicl(save(tmp_path, state, wrapper))
    matched = len(model.state_dict())
    assert f"{matched} of {matched} tensors matched" in capsys.readouterr().out
    assert model.cfg.image.name == "swin_tiny"
    assert (model.text_width, model.embed_dim) == (128, 48)
    assert model.logit_scale.shape == (1,)
    assert model.logit_scale.item() == 3.25

    generator = torch.Generator().manual_seed(1)
    images = torch.randn(1, 3, 224, 224, generator=generator)
    ids = random_captions(4, 20, 120, pad_id=0, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_image(images)["feature"],
            reference.encode_image(images),
            rtol=0,
            atol=1e-5,
        )
        torch.testing.assert_close(
            model.encode_text(ids)["feature"], reference.encode_text(ids), rtol=0, atol=1e-5
        )


@pytest.fixture(scope="module")
def state(reference):
    return dict(reference.state_dict())


IN_PROJ = "text_encoder.resblocks.1.attn.in_proj_weight"
DOWNSAMPLE = "image_encoder.layers.0.downsample.reduction.weight"


def test_missing_keys_are_refused_with_their_names(state, tmp_path):
    kept = {key: value for key, value in state.items() if key not in (IN_PROJ, DOWNSAMPLE)}
    with pytest.raises(DataError, match="missing: ") as caught:
        load_official_unicl(save(tmp_path, kept))
    assert str(caught.value).count(IN_PROJ) == 1  # once, though q, k and v all come from it
    assert DOWNSAMPLE in str(caught.value)


def test_unexpected_key_is_refused_with_its_name(state, tmp_path):
    path = save(tmp_path, {**state, "image_encoder.head.weight": torch.zeros(10, 768)})
    with pytest.raises(DataError, match=r"unexpected: image_encoder\.head\.weight"):
        load_official_unicl(path)


def test_wrong_shape_is_refused_with_name_and_shapes(state, tmp_path):
    key = "text_encoder.ln_final.weight"
    with pytest.raises(DataError, match=r"wrong shape: .*ln_final\.weight .*\(64,\).*\(128,\)"):
        load_official_unicl(save(tmp_path, {**state, key: torch.zeros(64)}))


def test_partial_load_on_request_keeps_what_fits(state, tmp_path, capsys):
    kept = {key: value for key, value in state.items() if key != IN_PROJ}
    model = load_official_unicl(save(tmp_path, kept), allow_partial=True)
    assert f"missing: {IN_PROJ}" in capsys.readouterr().out
    torch.testing.assert_close(
        model.text_projection.weight.data, state["text_projection"].T, rtol=0, atol=0
    )


def test_files_that_are_no_release(state, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_official_unicl(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(DataError):
        load_official_unicl(tmp_path / "text.pth")
    with pytest.raises(DataError, match=r"patch_embed.proj.weight"):
        load_official_unicl(save(tmp_path, {"conv1.weight": torch.zeros(3)}))
    shallow = {key: value for key, value in state.items() if ".layers.2.blocks.5." not in key}
    with pytest.raises(DataError, match=r"\(2, 2, 5, 2\)"):
        load_official_unicl(save(tmp_path, shallow))


class Unsafe:
    """Stands for the yacs configuration that Swin's training script pickles along."""


def test_pickled_objects_are_not_opened(state, tmp_path):
    path = tmp_path / "unsafe.pth"
    torch.save({"model": state, "config": Unsafe()}, path)
    with pytest.raises(DataError, match="could run code"):
        load_official_unicl(path)


RUN_CONFIG = {
    "model": {
        "image": {"name": "resnet18", "size": 32},
        "text": {"width": 32, "layers": 1, "heads": 2, "context_length": 8, "vocab_size": 50},
        "embed_dim": 16,
    },
    "data": {"seed": 3},
}


@pytest.fixture
def run(tmp_path):
    """A finished run with two checkpoints, the older of which LAST_GOOD does not name."""
    torch.manual_seed(0)
    folder = tmp_path / "run"
    model = models.build(RUN_CONFIG["model"])
    for step in (500, 1000):
        checkpoint = folder / "checkpoints" / f"step_{step:07d}"
        checkpoint.mkdir(parents=True)
        with torch.no_grad():
            model.logit_scale.fill_(step / 1000)
        weights = {f"model.{name}": value for name, value in model.state_dict().items()}
        save_file({**weights, "method.bank": torch.zeros(2)}, checkpoint / "model.safetensors")
    (folder / "checkpoints" / "LAST_GOOD").write_text("step_0001000\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(RUN_CONFIG))
    return folder, model.eval()


def test_load_run_from_run_and_from_checkpoint_folder(run):
    folder, model = run
    loaded = load_run(folder)
    weights = folder / "checkpoints" / "step_0001000" / "model.safetensors"
    assert loaded.step == 1000
    assert loaded.cfg == RUN_CONFIG
    assert loaded.checkpoint_hash == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert loaded.path == weights.parent
    assert not loaded.model.training
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(
        loaded.model.encode_image(images)["feature"], model.encode_image(images)["feature"]
    )
    older = load_run(folder / "checkpoints" / "step_0000500")
    assert older.step == 500
    assert older.model.logit_scale.item() == 0.5


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_load_run_refuses_other_weights(run, change):
    folder, _ = run
    weights = folder / "checkpoints" / "step_0001000" / "model.safetensors"
    state = load_file(weights)
    if change == "missing":
        del state["model.image.trunk.bn1.weight"]
    else:
        state["model.image.trunk.bn9.weight"] = torch.zeros(3)
    save_file(state, weights)
    with pytest.raises(DataError, match=r"image\.trunk\.bn[19]\.weight"):
        load_run(folder)


def test_load_run_refuses_what_is_incomplete(run, tmp_path):
    folder, _ = run
    with pytest.raises(DataError, match="neither a run folder"):
        load_run(tmp_path)
    config = folder / "config.yaml"
    changed = {**RUN_CONFIG, "model": {**RUN_CONFIG["model"], "embed_dim": 8}}
    config.write_text(yaml.safe_dump(changed))
    with pytest.raises(DataError, match=r"image_projection\.weight"):
        load_run(folder)
    (folder / "checkpoints" / "LAST_GOOD").unlink()
    with pytest.raises(DataError, match="no finished checkpoint"):
        load_run(folder)
    config.unlink()
    with pytest.raises(DataError, match=r"no config\.yaml"):
        load_run(folder / "checkpoints" / "step_0001000")
