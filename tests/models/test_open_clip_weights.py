"""open_clip's own models, saved in their own formats, loaded by ours: equal features."""

import copy
import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from loaders import tokenizers
from loaders.errors import DataError
from models.config import ModelConfig
from models.formats.open_clip_config import CLIP_MEAN, CLIP_STD
from models.formats.open_clip_weights import text_from_clip, text_to_clip
from models.weights import load
from tests.engine import run_folder

TEXT = {"width": 64, "layers": 2, "heads": 4, "context_length": 20}
VIT = {"width": 128, "layers": 2, "patch_size": 8, "image_size": 32, "head_width": 32}
TIMM = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}
OWN_EPS = {**TEXT, "norm_kwargs": {"eps": 1e-3}}
BERT = {
    "hf_model_name": "FOLDER", "hf_tokenizer_name": "FOLDER", "hf_proj_type": "linear",
    "context_length": 40,
}  # fmt: skip
MODELS = {
    "vit": {"vision_cfg": VIT, "text_cfg": TEXT},
    # Heads of width 64, as all of OpenAI's.
    "vit quickgelu": {
        "quick_gelu": True, "vision_cfg": {**VIT, "head_width": 64},
        "text_cfg": {**TEXT, "heads": 1},
    },
    "vit, text apart": {"custom_text": True, "vision_cfg": VIT, "text_cfg": OWN_EPS},
    "timm resnet": {"vision_cfg": {**TIMM, "image_size": 48}, "text_cfg": TEXT},
    # After construction, so the norm stays before the pooling.
    "timm vit, other pooling": {
        "quick_gelu": True,
        "vision_cfg": {**TIMM, "timm_model_name": "test_vit", "image_size": 160},
        "text_cfg": TEXT,
    },
    "modified resnet": {
        "vision_cfg": {"layers": [3, 4, 6, 3], "width": 64, "image_size": 64}, "text_cfg": TEXT,
    },
    "bert mean": {"vision_cfg": VIT, "text_cfg": {**BERT, "hf_pooler_type": "mean_pooler"}},
    "bert first": {
        "vision_cfg": VIT, "text_cfg": {**BERT, "hf_pooler_type": "cls_last_hidden_state_pooler"},
    },
}  # fmt: skip
PREPROCESS = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bicubic"}
TEXTS = ["", "a photo of a dog", "one two three " * 20]


def create(folder, name="vit", preprocess=None):
    """A random open_clip model and its configuration file in `folder`."""
    folder.mkdir(exist_ok=True)
    run_folder.bert_text(folder, "first")
    (folder / "config.json").write_text(json.dumps(run_folder.BERT))
    model = {"embed_dim": 48, **copy.deepcopy(MODELS[name])}
    if "hf_model_name" in model["text_cfg"]:
        model["text_cfg"]["hf_model_name"] = str(folder)
    config = {"model_cfg": model, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    theirs = run_folder.randomize(
        open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    )
    with torch.no_grad():
        theirs.logit_scale.fill_(3.5)
    return theirs


@torch.no_grad()
def compare(theirs, loaded, tokenizer):
    size = loaded.model.cfg.image.size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(4))
    text = ModelConfig.from_dict(loaded.cfg["model"]).text
    ids = tokenizers.build(text.tokenizer, text.context_length)(TEXTS)
    assert torch.equal(ids, tokenizer(TEXTS))
    for ours, expected in (
        (loaded.model.encode_image(images), theirs.encode_image(images)),
        (loaded.model.encode_text(ids), theirs.encode_text(ids)),
    ):
        expected = F.normalize(expected, dim=-1)
        torch.testing.assert_close(ours["feature"], expected, rtol=0, atol=1e-5)
        assert expected.std(dim=0).mean() > 1e-4  # rows differ
    assert loaded.model.logit_scale.tolist() == [3.5]
    assert loaded.step is None
    assert not loaded.model.training


@pytest.mark.parametrize(
    ("name", "suffix"), [*((name, "safetensors") for name in MODELS), ("vit", "bin")]
)
def test_folder(name, suffix, tmp_path):
    folder = tmp_path / "some model"
    theirs = create(folder, name, PREPROCESS)
    state = {key: value.contiguous() for key, value in theirs.state_dict().items()}
    if suffix == "bin":
        torch.save(state, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(state, folder / "open_clip_model.safetensors")
    loaded = load(folder)
    compare(theirs, loaded, open_clip.get_tokenizer(f"local-dir:{folder}"))
    assert loaded.name == loaded.cfg["name"] == "some model"
    image = ModelConfig.from_dict(loaded.cfg["model"]).image
    assert (image.mean, image.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


@pytest.mark.parametrize("name", ["vit quickgelu", "modified resnet"])
def test_openai_state_dict(name, tmp_path):
    """Alone, in half precision, with the three sizes that OpenAI's archives hold."""
    theirs = create(tmp_path / "config", name)
    if name == "modified resnet":
        # open_clip's own reader of such state dicts, which makes QuickGELU the activation.
        theirs = open_clip.model.build_model_from_openai_state_dict(
            theirs.state_dict(), cast_dtype=None
        ).eval()
    theirs = theirs.half().float()
    sizes = {"input_resolution": 64 if "resnet" in name else 32, "context_length": 20,
             "vocab_size": 49408}  # fmt: skip
    state = {key: value.half() for key, value in theirs.state_dict().items()}
    state |= {key: torch.tensor(value) for key, value in sizes.items()}
    torch.save(state, tmp_path / "RN-or-ViT.pt")
    loaded = load(tmp_path / "RN-or-ViT.pt")
    compare(theirs, loaded, open_clip.get_tokenizer(f"local-dir:{tmp_path / 'config'}"))
    image = ModelConfig.from_dict(loaded.cfg["model"]).image
    assert (image.mean, image.std) == (CLIP_MEAN, CLIP_STD)
    assert (CLIP_MEAN, CLIP_STD) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    assert loaded.name == "RN-or-ViT"


def test_training_checkpoint_of_open_clip_beside_its_configuration(tmp_path):
    theirs = create(tmp_path)
    state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": state}, tmp_path / "epoch_3.pt")
    loaded = load(tmp_path / "epoch_3.pt")
    compare(theirs, loaded, open_clip.get_tokenizer(f"local-dir:{tmp_path}"))
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(DataError, match=r"which activation.*Put open_clip_config\.json beside"):
        load(tmp_path / "epoch_3.pt")


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("vision_cfg", {"pool_type": "avg"}, r"vision_cfg\.pool_type is 'avg'"),
        ("vision_cfg", {"ls_init_value": 1e-4}, r"vision_cfg\.ls_init_value"),
        ("vision_cfg", {"layers": [1, 1, 1, 1], "head_width": 64}, r"\(1, 1, 1, 1\).* is none of"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, r"vision_cfg\.head_width is 32"),
        ("vision_cfg", {**TIMM, "timm_proj": "mlp"}, r"vision_cfg\.timm_proj is 'mlp'"),
        ("vision_cfg", {**TIMM, "timm_model_name": "resnet5O"}, r"'resnet5O' is neither"),
        ("text_cfg", {"pool_type": "last"}, r"text_cfg\.pool_type is 'last'"),
        ("text_cfg", {"no_causal_mask": True}, r"text_cfg\.no_causal_mask"),
        ("text_cfg", {"proj_bias": True}, r"text_cfg\.proj_bias"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, r"hf_proj_type is 'mlp'"),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "lower"}}, r"tokenizer_kwargs\.clean"),
        ("text_cfg", {"norm_kwargs": {"bias": False}}, r"norm_kwargs .*\['bias'\]"),
        ("model_cfg", {"init_logit_bias": -10}, "init_logit_bias"),
        ("model_cfg", {"multimodal_cfg": {"width": 4}}, "multimodal_cfg"),
        ("preprocess_cfg", {"resize_mode": "squash"}, r"preprocess_cfg\.resize_mode is 'squash'"),
    ],
)
def test_what_our_towers_cannot_express_is_named(part, change, words, folder):
    path = folder / "open_clip_config.json"
    before = path.read_text()
    config = json.loads(before)
    sections = {**config, **config["model_cfg"]}
    sections[part].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match=words):
        load(folder)
    path.write_text(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An open_clip folder that loads as it is."""
    folder = tmp_path_factory.mktemp("vit")
    save_file(create(folder).state_dict(), folder / "open_clip_model.safetensors")
    load(folder)
    return folder


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = create(tmp_path).state_dict()
    path = tmp_path / "open_clip_model.safetensors"
    for change, words in (
        ({"visual.ln_post.weight": None}, r"missing: image\.trunk\.norm\.weight"),
        ({"text_projection": None}, "have no 'text_projection'"),
        ({"logit_bias": torch.zeros(1)}, r"unexpected: text\.encoder\.logit_bias"),
        ({"ln_final.weight": torch.zeros(5)}, r"final_layer_norm\.weight \(has \(5,\), needed"),
    ):
        changed = {key: value for key, value in {**state, **change}.items() if value is not None}
        save_file(changed, path)
        with pytest.raises(DataError, match=words):
            load(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"none of open_clip_model\.safetensors"):
        load(tmp_path)


def test_text_names_there_and_back(tmp_path):
    theirs = create(tmp_path, "vit, text apart").text.state_dict()
    theirs.pop("text_projection")
    back = text_to_clip(text_from_clip(theirs))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)
