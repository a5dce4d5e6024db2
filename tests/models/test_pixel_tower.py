"""One tower for pictures and drawn texts: the invariants of CLIPPO, also under DeepSpeed."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import losses
import models
from engine import build as plans
from engine import checkpoint, compilation, config, deepspeed_engine, optim
from engine.step import Stepper
from loaders import tokenizers, views
from loaders.errors import ConfigError
from losses._gather import Gather
from models import weights
from models.config import ModelConfig
from models.export import export
from tests import multiprocess
from tests.commands import ROOT
from tests.engine import run_folder, tiny

SIZE = 48
IMAGE = {
    "name": "vit_tiny_patch16_224", "size": SIZE, "mean": [0.4, 0.5, 0.6],
    "kwargs": {"embed_dim": 16, "depth": 2, "num_heads": 2, "class_token": False,
               "global_pool": "map"},
}  # fmt: skip
TEXT = {"name": "pixels", "tokenizer": "rendered"}
MODEL = {"kind": "one_tower", "image": IMAGE, "text": TEXT, "embed_dim": 8}
TEXTS = ["a cat", "two dogs", "", "A Cat", "a cat", "x", "yes", "no"]


def build(dtype=torch.float32):
    torch.manual_seed(0)
    return models.build(MODEL).to(dtype)


def rendered(texts=TEXTS):
    return tokenizers.build("rendered", image_size=SIZE)(texts)


def photos(count=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, SIZE, SIZE, generator=generator).to(dtype)


def numbers(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_shipped_configuration_has_as_many_parameters_as_published():
    """ViT-B/16 of the paper: 93,474,817, none of them for texts alone."""
    cfg = config.load(ROOT / "configs/clippo_vit_base_yfcc14m.yaml")
    with torch.device("meta"):
        model = models.build(plans.model_config(cfg))
    assert numbers(model) == 93_474_817
    assert numbers(model.image) + numbers(model.projection) + 1 == numbers(model)
    assert {name.split(".")[0] for name in model.state_dict()} == {
        "image", "projection", "logit_scale",
    }  # fmt: skip


@torch.no_grad()
def test_a_text_is_encoded_as_its_picture():
    model = build().eval()
    ids = rendered()
    text = model.encode_text(ids)
    pixels = views.normalize(ids.expand(-1, 3, -1, -1), IMAGE["mean"], ModelConfig().image.std)
    image = model.encode_image(pixels)
    for name, value in image.items():
        assert torch.equal(text[name], value), name
    assert text["tokens"].shape == (8, 9, 16)  # 3 x 3 patches, no class token
    assert torch.equal(text["mask"], torch.ones(8, 9, dtype=torch.bool))
    assert torch.equal(text["mask"], model.text_mask(ids))
    assert (model.image_width, model.text_width, model.embed_dim) == (16, 16, 8)
    assert not model.text_has_dropout
    # Equal texts, and equal ones but for case: cosine 1, false negatives of each other.
    cosines = text["feature"] @ text["feature"].T
    torch.testing.assert_close(cosines[0, [3, 4]], torch.ones(2), rtol=0, atol=1e-6)
    assert cosines[0, 1] < 1 - 1e-4


@torch.no_grad()
def test_swapping_the_sides_leaves_the_loss_as_it_is():
    """So pairs of two texts need nothing of their own: both may be drawn."""
    model = build().eval()
    image, text = model.encode_image(photos())["feature"], model.encode_text(rendered())["feature"]
    labels, scale = torch.full((8,), -1), model.scale()
    there, back = (
        losses.unicl.unicl_loss(*sides, labels, scale) for sides in ((image, text), (text, image))
    )
    torch.testing.assert_close(there, back)
    logits = scale.double() * image.double() @ text.double().T
    target = torch.arange(8)
    dense = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert there.item() == pytest.approx(dense.item(), rel=1e-6)


def test_the_gradient_is_the_sum_of_the_two_passes():
    """Against two towers with equal weights, one for each side, in float64."""
    model, copies = build(torch.float64), [build(torch.float64) for _ in range(2)]
    ids, images, target = rendered(), photos(dtype=torch.float64), torch.arange(8)

    def loss(image, text, scale):
        logits = scale * image["feature"].double() @ text["feature"].double().T
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    loss(model.encode_image(images), model.encode_text(ids), model.scale()).backward()
    sides = copies[0].encode_image(images), copies[1].encode_text(ids)
    loss(*sides, copies[0].scale()).backward()
    parts = [dict(copy.named_parameters()) for copy in copies]
    for name, parameter in model.named_parameters():
        both = [part[name].grad for part in parts if part[name].grad is not None]
        assert len(both) == (1 if name == "logit_scale" else 2)
        torch.testing.assert_close(parameter.grad, sum(both), rtol=1e-5, atol=1e-7)
        assert parameter.grad.abs().max() > 0, name


def test_checkpointing_recomputes_and_changes_no_gradient():
    def gradients(enable):
        model, calls = build().train(), []
        model.set_grad_checkpointing(enable)
        model.image.trunk.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        image, text, scale = model(photos(), rendered())
        (scale * image @ text.T).square().sum().backward()
        assert len(calls) == (4 if enable else 2)
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)


def test_kernels_alone_decay():
    """As in the published program: neither positions nor the query of the pooling."""
    model = build()
    assert model.no_weight_decay() == {
        "logit_scale", "image.trunk.pos_embed", "image.trunk.attn_pool.latent",
    }  # fmt: skip
    method = losses.build("clip", {}, {})
    decayed, kept = optim.parameter_groups(model, method, 0.1)
    kernels = [p for name, p in model.named_parameters() if name.endswith(".weight") and p.ndim > 1]
    assert {*map(id, decayed["params"])} == {*map(id, kernels)}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "two_tower"}, r"kind=two_tower does not go with model\.text\.name=pixels"),
        ({"text": {**TEXT, "name": "hf", "hf_name": "x"}}, "name: hf does not go with tokenizer"),
        ({"text": {"name": "pixels"}}, "does not go with tokenizer: clip; .* tokenizer: rendered"),
        ({"image": {**IMAGE, "kwargs": {"img_size": 32}}}, "img_size is not allowed"),
    ],
)
def test_models_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        models.build({**MODEL, **changes})


@pytest.mark.parametrize("name", ["declip", "zerovl"])
def test_methods_that_alter_words_refuse_pictures(name):
    with pytest.raises(ValueError, match="rendered"):
        losses.find(name).check_model(ModelConfig.from_dict(MODEL))


@torch.no_grad()
def test_exports(tmp_path):
    """Ours say that texts are drawn; other libraries have nothing like it."""
    model = run_folder.write(tmp_path / "run", text=TEXT, kind="one_tower")
    ids = tokenizers.build("rendered", image_size=32)(TEXTS)
    expected = model.encode_text(ids)["feature"]
    export(tmp_path / "run", "pt", tmp_path / "pt")
    export(tmp_path / "run", "safetensors", tmp_path / "st")
    # A file of weights alone, beside the configuration.
    (tmp_path / "alone").mkdir()
    torch.save(model.state_dict(), tmp_path / "alone" / "model.pth")
    shutil.copy(tmp_path / "run" / "config.yaml", tmp_path / "alone")
    for path in ("run", "pt/run.pt", "st", "alone/model.pth"):
        loaded = weights.load(tmp_path / path)
        text = ModelConfig.from_dict(loaded.cfg["model"]).text
        assert (text.name, text.tokenizer) == ("pixels", "rendered")
        assert torch.equal(loaded.model.encode_text(ids)["feature"], expected)
    assert json.loads((tmp_path / "st" / "config.json").read_text())["tokenizer"] == "rendered"
    for format_name in ("open_clip", "hf", "timm"):
        with pytest.raises(ConfigError, match=r"cannot express model\.kind=one_tower"):
            export(tmp_path / "run", format_name, tmp_path / format_name)


@torch.no_grad()
def test_bfloat16_weights():
    single, half = build().eval(), build(torch.bfloat16).eval()
    for full, rounded in zip(single(photos(), rendered()), half(photos(), rendered()), strict=True):
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded, full, rtol=0.05, atol=0.03)


@pytest.mark.soak  # a minute of compiling
def test_one_graph_is_compiled_for_pictures_and_texts():
    model = build().eval()
    expected = model(photos(), rendered())
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compilation.compile_towers(model, 1, torch.device("cpu"))
    counters.clear()  # of the trial
    with torch.no_grad():
        for ours, theirs in zip(model(photos(), rendered()), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def batch(dtype=torch.float32):
    """As the loader makes it."""
    seeds = torch.arange(8)
    return {
        "image": photos(dtype=dtype)[:, None], "text": rendered()[:, None],
        "label": torch.tensor([-1, 0, 1, -1, 1, -1, 2, 0]), "seed": seeds, "step_seed": seeds * 0,
    }  # fmt: skip


def one_step(rank, world_size, cases, folder=None):
    """Loss and weights of each (stage, micro-batches, bf16)."""
    found = []
    for stage, pieces, bf16 in cases:
        module = deepspeed_engine.TrainModule(build(), losses.build("unicl", {}, {})).train()
        settings = tiny.deepspeed_settings(8, stage, world_size, pieces, bf16)
        if stage == 3:
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        optimizer = optim.build(module.model, module.method, tiny.OPTIM)
        device = torch.device("cpu")
        engine = deepspeed_engine.initialise(module, optimizer, settings, device)
        mine = tiny.cut(batch(torch.bfloat16 if bf16 else torch.float32), rank, world_size)
        stepper, seen = Stepper(engine, Gather(equal_rows=True), seed=3), []
        for step in range(2):
            out = stepper(step, [tiny.cut(mine, piece, pieces) for piece in range(pieces)])
            mean = out["loss"].reshape(1).clone()
            torch.distributed.all_reduce(mean)
            seen.append(mean.item() / world_size)
        if folder:
            checkpoint.save(engine, folder / f"{stage}", 2, {"train.global_batch": 8}, 1)
        state = {k: v.float().numpy() for k, v in deepspeed_engine.full_state(engine)}
        found.append((seen, state))
    return found


CASES = [(3, 2, False)]
MORE = [(1, 1, False), (2, 2, False), (3, 1, False), (1, 1, True)]


@pytest.mark.parametrize("more", [[], pytest.param(MORE, marks=pytest.mark.soak)])
def test_ranks_micro_batches_and_zero_stages_change_nothing(more, tmp_path):
    """A tower that is called twice in a step, its weights in parts or whole."""
    ((values, expected),) = multiprocess.run(one_step, 1, [(0, 1, False)])[0]
    cases = [*more, *CASES]
    two, _ = multiprocess.run(one_step, 2, cases, tmp_path)
    start = build().state_dict()
    assert any(np.abs(expected[f"model.{k}"] - v.numpy()).max() > 1e-2 for k, v in start.items())
    for (stage, pieces, bf16), (seen, state) in zip(cases, two, strict=True):
        np.testing.assert_allclose(seen, values, rtol=0.1 if bf16 else 2e-5)
        for key, value in ({} if bf16 else expected).items():
            close = {"rtol": 2e-5, "atol": 2e-4, "err_msg": f"{stage} {pieces} {key}"}
            np.testing.assert_allclose(state[key], value, **close)
    # What evaluation reads is what was trained.
    (tmp_path / "3" / "config.yaml").write_text(json.dumps({"model": MODEL}))
    saved = weights.load(checkpoint.last_good(tmp_path / "3")).model.state_dict()
    for key, value in saved.items():
        np.testing.assert_array_equal(value.numpy(), two[-1][1][f"model.{key}"])
