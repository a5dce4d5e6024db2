"""One model under every wrapping that others save: the same features, or a refusal with names."""

import argparse
import copy
import json

import open_clip
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from loaders.errors import DataError
from models.formats import weight_files
from models.formats.checkpoint_layout import plain_names
from models.weights import load
from tests.engine import run_folder

TEXT = {"width": 32, "layers": 1, "heads": 2, "context_length": 8, "vocab_size": 90}
VISION = {"width": 32, "layers": 1, "patch_size": 8, "image_size": 16, "head_width": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the configuration of `theirs`."""
    folder = tmp_path_factory.mktemp("model")
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    content = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def theirs():
    return run_folder.randomize(open_clip.CLIP(16, VISION, TEXT))


@torch.no_grad()
def compare(theirs, loaded):
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    ids = torch.tensor([[88, 5, 6, 89, 0, 0, 0, 0], [88, 7, 8, 9, 10, 11, 12, 89]])
    for ours, expected in (
        (loaded.model.encode_image(images), theirs.encode_image(images, normalize=True)),
        (loaded.model.encode_text(ids), theirs.encode_text(ids, normalize=True)),
    ):
        torch.testing.assert_close(ours["feature"], expected, rtol=0, atol=1e-5)
        assert expected.std(dim=0).mean() > 1e-3  # rows differ


def same(state, path):
    """Whether a file is read as `state`."""
    found = plain_names(weight_files.read(path)[0], path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def held(name):
    """The model as an attribute of the program that trains it, as in a LightningModule."""

    def wrap(model):
        holder = nn.Module()
        setattr(holder, name, model)
        return holder

    return wrap


def part_compiled(model):
    model.visual = torch.compile(model.visual)
    model.visual.transformer = nn.DataParallel(model.visual.transformer)
    return model


def named(wrapper):
    """For the wrappers of torch.distributed that need a process group to be made."""

    def wrap(model):
        state = model.state_dict()
        return argparse.Namespace(
            state_dict=lambda: {
                name.replace("resblocks.", f"resblocks.{wrapper}."): value
                for name, value in state.items()
            }
        )

    return wrap


WRAPPERS = {
    "compiled": [torch.compile],
    "parallel": [nn.DataParallel],
    "compiled, parallel": [torch.compile, nn.DataParallel],
    "parallel, compiled": [nn.DataParallel, torch.compile],
    "lightning": [held("model")],
    "lightning, any name, compiled": [torch.compile, held("net")],
    "parts compiled": [part_compiled, held("clip"), nn.DataParallel, held("model")],
    "saved as a model": [held("state_dict_of")],
    "fsdp": [named("_fsdp_wrapped_module._checkpoint_wrapped_module")],
}
LIGHTNING = {
    "epoch": 3, "global_step": 7, "pytorch-lightning_version": "2.5.0", "loops": {},
    "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}],
    "lr_schedulers": [], "hparams_name": "kwargs", "hyper_parameters": {"lr": 1e-3},
}  # fmt: skip
# DeepSpeed 0.19.8, runtime/engine.py, _save_checkpoint.
DEEPSPEED = {"optimizer": None, "param_shapes": [{"x": torch.Size([2])}], "ds_version": "0.19.8"}
CONTAINERS = {
    "bare": lambda state: state,
    "open_clip, timm": lambda state: {"epoch": 3, "arch": "x", "state_dict": state},
    "swin": lambda state: {"model": state, "max_accuracy": 0.0},
    "scripts": lambda state: {"model_state_dict": state, "epoch": torch.tensor(3)},
    "nested": lambda state: {"model": {"state_dict": state}},
    "lightning": lambda state: {"state_dict": state, **LIGHTNING},
    "deepspeed": lambda state: {"module": state, **DEEPSPEED},
}


def wrapped(theirs, wrappers):
    model = copy.deepcopy(theirs)
    for wrap in WRAPPERS[wrappers]:
        model = wrap(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert state.keys() != theirs.state_dict().keys()
    return state


@pytest.mark.parametrize("wrappers", WRAPPERS)
def test_wrapped_models_give_the_plain_ones_features(wrappers, folder, theirs):
    state = wrapped(theirs, wrappers)
    torch.save(state, folder / "epoch=3.ckpt")
    compare(theirs, load(folder / "epoch=3.ckpt"))
    save_file(state, folder / "weights.safetensors")
    same(theirs.state_dict(), folder / "weights.safetensors")


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_of_wrapped_models(container, folder, theirs):
    state = wrapped(theirs, "lightning, any name, compiled")
    torch.save(CONTAINERS[container](state), folder / "epoch=3.ckpt")
    same(theirs.state_dict(), folder / "epoch=3.ckpt")


@pytest.mark.parametrize("averaged", ["state_dict_ema", "model_ema"])
def test_averaged_weights_are_named_and_never_taken(averaged, folder, theirs, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    ema = {name: value * 0.5 for name, value in theirs.state_dict().items()}
    path = folder / "last.pth"
    torch.save({"state_dict": theirs.state_dict(), averaged: ema}, path)
    same(theirs.state_dict(), path)
    assert f"'state_dict' is read, the averaged weights in '{averaged}' are not" in (
        capsys.readouterr().out
    )
    torch.save({averaged: theirs.state_dict()}, path)
    same(theirs.state_dict(), converted(path, f"only averaged weights.*'{averaged}'"))
    torch.save(AveragedModel(theirs).state_dict(), path)
    with pytest.raises(DataError, match="n_averaged"):
        load(path)


def converted(path, words):
    """The file NEW.pt that the line of Python at the end of the refusal of `path` writes."""
    with pytest.raises(DataError, match=words) as caught:
        load(path)
    line = str(caught.value)
    line = line[
        line.rindex("import pathlib") if "import pathlib" in line else line.index("torch.save(") :
    ]
    exec(line, {"torch": torch})
    return path.parent / "NEW.pt"


def test_what_could_be_meant_twice_is_refused_with_names(folder, theirs, monkeypatch):
    monkeypatch.chdir(folder)
    state, path = theirs.state_dict(), folder / "twice.pt"
    half = {name: value * 0.5 for name, value in state.items()}

    def under(prefix, state):
        return {f"{prefix}{name}": value for name, value in state.items()}

    loss = {"criterion.weight": torch.ones(2), "criterion.logit_scale": torch.ones(())}
    for content, words in (
        ({"model": half, "state_dict": state}, r"'state_dict' and 'model'"),
        ({"student": state, "teacher": half}, r"lie in 'student' and 'teacher'"),
        (under("module.a.", state) | under("b.", half), r"2 models .* 'a\.' and 'b\.'"),
        (state | under("ema.", half), r"2 models .* '' and 'ema\.'"),
        (under("model.", state) | under("model.ema.", half), r"'model\.' and 'model\.ema\.'"),
        (under("model.", state) | loss, r"begin with 'model\.', but .* 'criterion\.weight'"),
    ):
        torch.save(content, path)
        same(state, converted(path, words))
    torch.save(under("_orig_mod.", state) | {"logit_scale": torch.ones(())}, path)
    with pytest.raises(DataError, match=r"'_orig_mod\.logit_scale' and 'logit_scale' are one name"):
        load(path)


def test_the_line_for_a_refused_file_names_its_own_entry(folder, theirs, monkeypatch):
    monkeypatch.chdir(folder)
    state, path = theirs.state_dict(), folder / "refused.ckpt"
    settings = argparse.Namespace(lr=1e-3)
    for content, words in (
        ({"state_dict": state, "hyper_parameters": OmegaConf.create({"a": [1, {"b": 2}]})},
         r"DictConfig.*\['state_dict'\]"),
        ({"optimizer": {"state": {}}, "model_state_dict": state, "args": settings},
         r"Namespace.*\['model_state_dict'\]"),
        ({"weights": state, "args": settings}, r"Namespace.*\['weights'\]"),
        ({"model": theirs}, r"CLIP.*\['model'\]\.state_dict\(\)"),
        (theirs, r"CLIP.*weights_only=False\)\.state_dict\(\)"),
        ({**state, "args": settings}, r"Namespace.*torch\.is_tensor"),
    ):  # fmt: skip
        torch.save(content, path)
        same(state, converted(path, words))


@pytest.fixture
def run(tmp_path):
    run_folder.write(tmp_path / "run", text={**run_folder.TEXT, "vocab_size": 90})
    return tmp_path / "run"


def equal(loaded, run):
    expected = load(run).model.state_dict()
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_files_within_a_run_load_or_name_the_folder(run, monkeypatch):
    checkpoint = run / "checkpoints" / "step_0000007"
    loaded = load(checkpoint / "model.safetensors")
    assert (loaded.name, loaded.step, loaded.path) == ("run", 7, checkpoint)
    equal(loaded, run)
    monkeypatch.chdir(checkpoint)
    assert load("model.safetensors").path == load(".").path == checkpoint
    universal = checkpoint.with_suffix(".universal") / "zero" / "model.x"
    universal.mkdir(parents=True)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"module": {}}, checkpoint / name)
    torch.save({"param": torch.ones(1)}, universal / "fp32.pt")
    for path in (*checkpoint.glob("*_states.pt"), universal / "fp32.pt", universal):
        with pytest.raises(DataError, match=f"give (the folder )?{checkpoint}$"):
            load(path)
    for path in (run / "config.yaml", run / "checkpoints" / "LAST_GOOD", run / "checkpoints"):
        with pytest.raises(DataError, match=f"give (the folder )?{run}$"):
            load(path)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["5GB", "30KB"])
def test_what_zero_to_fp32_wrote(safe, size, run):
    """Its file names and its splitting are huggingface_hub's; our method's tensors lie among it."""
    model = load(run).model
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    name = "model{suffix}.safetensors" if safe else "pytorch_model{suffix}.bin"
    out = run.parent / "out"
    for folder in (run / "checkpoints" / "step_0000007" / "fp32", out):
        folder.mkdir()
        save_torch_state_dict(
            {**state, "method.bank": torch.zeros(2)}, folder, filename_pattern=name,
            max_shard_size=size, safe_serialization=safe,
        )  # fmt: skip
        if folder == out:
            with pytest.raises(DataError, match=rf"put the run's config\.yaml .*into {out}$"):
                load(out)
            (out / "config.yaml").write_text((run / "config.yaml").read_text())
        loaded = load(folder)
        equal(loaded, run)
        assert loaded.step == (None if folder == out else 7)
    if size == "30KB":
        parts = sorted(out.glob("*-of-*"))
        assert len(parts) > 1
        with pytest.raises(DataError, match=f"one of {len(parts)} parts .* give the folder {out}"):
            load(parts[0])
        before = load(out).checkpoint_hash
        (save_file if safe else torch.save)({"model.x": torch.ones(1)}, parts[-1])
        with pytest.raises(DataError, match=f"{parts[-1].name}: has no 'model"):
            load(out)
        parts[-1].unlink()
        with pytest.raises(DataError, match=f"names the part '{parts[-1].name}', which is not"):
            load(out)
        assert len(before) == 64
        index = next(out.glob("*.index.json"))
        index.write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
        with pytest.raises(DataError, match="which is not beside it"):
            load(index)


def test_the_hash_of_a_sharded_model_is_that_of_its_parts(run):
    state = {f"model.{name}": value for name, value in load(run).model.state_dict().items()}
    hashes = set()
    (run / "fp32").mkdir()
    for scale in (1.0, 2.0):
        state["model.logit_scale"] = torch.full((1,), scale)
        save_torch_state_dict(state, run / "fp32", max_shard_size="30KB")
        hashes.add(load(run / "fp32").checkpoint_hash)
    assert len(hashes) == 2


def test_a_checkpoint_of_anothers_deepspeed_names_the_command(tmp_path):
    (tmp_path / "zero_to_fp32.py").write_text("")
    (tmp_path / "global_step3").mkdir()
    for path in (tmp_path, tmp_path / "global_step3"):
        with pytest.raises(DataError, match=rf"zero_to_fp32\.py {tmp_path} OUT"):
            load(path)
