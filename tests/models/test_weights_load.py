"""`load` tells apart what it is given, and refuses what it must not or cannot open."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from loaders.errors import DataError
from models.config import IMAGENET_MEAN, ModelConfig
from models.export import export
from models.weights import load
from tests.engine import run_folder
from tests.models.reference import ReferenceUniCL

WEIGHTS = "checkpoints/step_0000007/model.safetensors"


@pytest.fixture
def run(tmp_path):
    run_folder.write(tmp_path / "my run")
    return tmp_path / "my run"


def test_run_and_checkpoint_folders(run):
    for path in (run, str(run / "checkpoints" / "step_0000007")):
        loaded = load(path)
        assert (loaded.name, loaded.step) == ("my run", 7)
        assert loaded.cfg["name"] == "tiny"
        assert loaded.path == run / "checkpoints" / "step_0000007"
        expected = hashlib.sha256((run / WEIGHTS).read_bytes()).hexdigest()
        assert loaded.checkpoint_hash == expected


@pytest.mark.parametrize("names", ["image_encoder text_encoder", "visual text"])
def test_official_unicl_file_in_both_namings(names, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 90, "context_length": 12, "width": 64, "layers": 1, "heads": 1}
    reference = ReferenceUniCL(sizes, embed_dim=16).eval()
    tops = dict(zip(("image_encoder", "text_encoder"), names.split(), strict=True))
    state = {}
    for key, value in reference.state_dict().items():
        top, dot, rest = key.partition(".")
        state[tops.get(top, top) + dot + rest] = value
    torch.save({"model": state}, tmp_path / "swin_t.pth")
    loaded = load(tmp_path / "swin_t.pth")
    assert (loaded.name, loaded.step) == ("swin_t", None)
    assert loaded.path == tmp_path / "swin_t.pth"
    image = ModelConfig.from_dict(loaded.cfg["model"]).image
    assert (image.name, image.mean) == ("swin_tiny", IMAGENET_MEAN)
    ids = torch.tensor([[88, 5, 6, 89, 0]])
    with torch.no_grad():
        ours = loaded.model.encode_text(ids)["feature"]
        padded = torch.nn.functional.pad(ids, (0, 7))
        torch.testing.assert_close(ours, reference.encode_text(padded), rtol=0, atol=1e-5)


def test_exported_files_without_their_run(run, tmp_path):
    whole = load(run)
    export(run, "pt", tmp_path / "a")
    export(run, "safetensors", tmp_path / "b")
    run.rename(tmp_path / "elsewhere")
    for path, name in (
        (tmp_path / "a" / "my run.pt", "my run"),
        (tmp_path / "b", "b"),
        (tmp_path / "b" / "model.safetensors", "model"),
    ):
        loaded = load(path)
        assert (loaded.name, loaded.step) == (name, 7)
        assert loaded.cfg["model"]["text"] == {
            **loaded.cfg["model"]["text"], **whole.cfg["model"]["text"],
        }  # fmt: skip
        for key, value in whole.model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[key], value)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(run, value, tmp_path):
    export(run, "pt", tmp_path / "a")
    content = torch.load(tmp_path / "a" / "my run.pt", weights_only=True)
    content["state_dict"]["text_projection.weight"][3, 4] = value
    torch.save(content, tmp_path / "a" / "my run.pt")
    state = load_file(run / WEIGHTS)
    state["model.text_projection.weight"][3, 4] = value
    save_file(state, run / WEIGHTS)
    for path in (run, tmp_path / "a" / "my run.pt"):
        with pytest.raises(DataError, match=r"NaN or infinite weights in text_projection\.weight;"):
            load(path)


class Unsafe:
    """Stands for the argument objects that training scripts pickle along."""


def test_files_that_could_run_code(tmp_path):
    torch.save({"state_dict": {}, "args": Unsafe()}, tmp_path / "unsafe.pt")
    with pytest.raises(DataError, match=r"could run code: .*Unsafe.*torch\.save\(torch\.load"):
        load(tmp_path / "unsafe.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-B-32.pt")
    with pytest.raises(DataError, match=r"TorchScript archive.*torch\.jit\.load"):
        load(tmp_path / "ViT-B-32.pt")


def test_what_the_message_about_archives_says_is_true(tmp_path):
    """Its conversion, applied to an archive, gives a file that is read."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "archive.pt")
    state = torch.jit.load(tmp_path / "archive.pt", "cpu").state_dict()
    torch.save({k: v.float() for k, v in state.items()}, tmp_path / "state.pt")
    with pytest.raises(DataError, match=r"not recognised.*\['bias', 'weight'\]"):
        load(tmp_path / "state.pt")


def test_what_is_not_a_model_of_ours(run, tmp_path):
    export(run, "timm", tmp_path / "timm")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    whole = (run / WEIGHTS).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    for name, words in (
        ("timm", "a folder for timm or transformers"),
        ("absent", "no such file or folder"),
        ("text.pt", "not a PyTorch checkpoint"),
        ("text.safetensors", "not a safetensors file"),
        ("cut.safetensors", "not a safetensors file"),
        ("list.pt", "expected a dict of weights, found list"),
    ):
        with pytest.raises(DataError, match=words):
            load(tmp_path / name)
