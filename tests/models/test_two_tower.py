import math

import pytest
import torch

import models
from loaders.errors import ConfigError
from models.image_timm import PRESETS
from tests.models.reference import random_captions

SMALL_TEXT = {"width": 64, "layers": 2, "heads": 4, "context_length": 16, "vocab_size": 100}


# All stages of Swin-T, with a quarter of its channels.
SWIN = {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}


def build_small(image="resnet18", size=32, **settings):
    torch.manual_seed(0)
    tower = {"name": image, "size": size, "kwargs": SWIN if image == "swin_tiny" else {}}
    return models.build({"image": tower, "text": SMALL_TEXT, "embed_dim": 24, **settings})


def inputs(count=3, size=32):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 3, size, size, generator=generator)
    return images, random_captions(count, 16, 100, pad_id=0, generator=generator)


def numbers(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "visual", "total"),
    [("swin_tiny", 27_519_354, 91_340_667), ("swin_base", 86_743_224, 150_695_609)],
)
def test_parameter_counts_are_the_published_ones(name, visual, total):
    """Swin-B's two numbers are printed in ELEVATER's submission example."""
    with torch.device("meta"):
        model = models.build({"image": {"name": name}})
    assert numbers(model.image) == visual
    assert numbers(model.text) == 63_165_952
    assert numbers(model) == total


@pytest.mark.parametrize("name", [*PRESETS, "nfnet_f0", "tf_efficientnet_lite0"])
def test_no_tensor_is_zero_dimensional(name):
    with torch.device("meta"):
        model = models.build({"image": {"name": name}, "text": SMALL_TEXT})
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert [key for key, tensor in tensors if tensor.ndim == 0] == []
    assert model.logit_scale.shape == (1,)


def test_batch_norm_still_counts_its_steps():
    model = build_small()
    model.train().encode_image(inputs()[0])
    assert model.image.trunk.bn1.num_batches_tracked.tolist() == [1]


def test_shapes_and_unit_length():
    model = build_small().eval()
    images, ids = inputs()
    image, text = model.encode_image(images), model.encode_text(ids)
    for feature in (image["feature"], text["feature"]):
        assert feature.shape == (3, model.embed_dim) == (3, 24)
        assert feature.dtype == torch.float32
        torch.testing.assert_close(feature.norm(dim=-1), torch.ones(3))
    unit = text["projected"] / text["projected"].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(unit, text["feature"])
    assert text["projected"].norm(dim=-1).max() < 0.9  # so it is what was before the unit length
    assert image["pooled"].shape == (3, model.image_width) == (3, 512)
    assert image["projected"].equal(model.image_projection(image["pooled"]))
    assert image["tokens"].shape == (3, 1, 512)
    assert text["pooled"].shape == (3, model.text_width) == (3, 64)
    assert text["tokens"].shape == (3, int(ids.argmax(dim=1).max()) + 1, 64)
    positions = torch.arange(text["tokens"].shape[1])
    assert torch.equal(text["mask"], positions <= ids.argmax(dim=1)[:, None])
    outputs = model(images, ids)
    for got, wanted in zip(
        outputs, (image["feature"], text["feature"], model.scale()), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_every_parameter_gets_a_gradient_and_its_module_is_called():
    """ZeRO-3 gathers a module's own parameters in hooks on its call."""
    model = build_small("vit_tiny_patch16_224")
    called = set()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    images, ids = inputs()
    image, text, scale = model(images, ids)
    (scale * (image @ text.T)).square().sum().backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()} - {""}
    assert owners <= called


def test_scale_is_bounded_in_the_forward_pass_only():
    model = build_small(logit_scale_init=math.log(1 / 0.07), logit_scale_max=100.0)
    assert model.scale().shape == (1,)
    assert model.scale().item() == pytest.approx(1 / 0.07, rel=1e-6)
    model.scale().backward()
    assert model.logit_scale.grad.item() == pytest.approx(1 / 0.07, rel=1e-6)
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
    assert model.scale().item() == pytest.approx(100.0, rel=1e-6)
    assert model.logit_scale.item() == 6.0
    assert build_small(logit_scale_init=0.0, logit_scale_min=5.0).scale().item() == pytest.approx(5)
    assert build_small(logit_scale_init=6.0).scale().item() == pytest.approx(math.exp(6), rel=1e-6)


@pytest.mark.parametrize(
    ("start", "target", "expected"),
    [
        (6.0, 50.0, 50.0),  # beyond the upper bound, wanted inside: comes back
        (6.0, 1000.0, None),  # wanted further out: stays where it is
        (0.0, 50.0, 50.0),  # below the lower bound, wanted inside
        (0.0, 1.0, None),
        (3.0, 50.0, 50.0),  # between the bounds nothing changes
    ],
)
def test_a_scale_beyond_its_bounds_can_come_back(start, target, expected):
    model = build_small(logit_scale_init=start, logit_scale_min=5.0, logit_scale_max=100.0)
    optimizer = torch.optim.Adam([model.logit_scale], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        (model.scale() - target).square().sum().backward()
        optimizer.step()
    if expected is None:
        assert model.logit_scale.item() == start
    else:
        assert model.scale().item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(("image", "size"), [("swin_tiny", 32), ("resnet18", 32)])
def test_gradient_checkpointing_changes_no_gradient(image, size):
    """In training mode, so that stochastic depth has to be replayed too."""

    def gradients(enable):
        model = build_small(image, size).train()
        model.set_grad_checkpointing(enable)
        recomputed = []
        hook = model.text.encoder.encoder.layers[0].mlp.register_forward_pre_hook
        hook(lambda *_: recomputed.append(1))
        torch.manual_seed(7)
        image_feature, text_feature, scale = model(*inputs(4, size))
        (scale * image_feature @ text_feature.T).square().sum().backward()
        assert len(recomputed) == (2 if enable else 1)
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)


def test_no_weight_decay_names_exist():
    model = build_small("swin_tiny")
    names = model.no_weight_decay()
    assert names <= dict(model.named_parameters()).keys()
    tables = {key for key, _ in model.named_parameters() if "relative_position_bias_table" in key}
    assert len(tables) == sum(SWIN["depths"])
    assert names == tables | {"logit_scale"}
    vit = build_small("vit_tiny_patch16_224").no_weight_decay()
    assert vit == {"logit_scale", "image.trunk.cls_token", "image.trunk.pos_embed"}


def test_bfloat16_weights():
    model = build_small("swin_tiny").to(torch.bfloat16).eval()
    single = build_small("swin_tiny").eval()
    images, ids = inputs()
    for half, full in zip(model(images, ids), single(images, ids), strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=0.05, atol=0.03)
    norm = model.text.encoder.final_layer_norm
    states = (1000 + torch.randn(5, 64)).to(torch.bfloat16)
    exact = torch.nn.functional.layer_norm(states.double(), (64,), eps=1e-12)
    assert torch.equal(norm(states), exact.to(torch.bfloat16))


LATE = {"similarity": "late", "token_dim": 10}
TRUNKS = {  # name -> size, tokens that are places, those before them
    "vit_tiny_patch16_224": (32, 4, 1),
    "vit_small_patch16_dinov3": (32, 4, 5),  # registers too
    "swin_tiny": (64, 4, 0),
    "resnet18": (64, 4, 0),
}


@pytest.mark.parametrize("name", TRUNKS)
@torch.no_grad()
def test_token_features_are_of_places_and_of_text(name):
    size, places, before = TRUNKS[name]
    model = build_small(name, size, **LATE).eval()
    images, ids = inputs(size=size)
    image, text = model.encode_image(images), model.encode_text(ids)
    projected = model.image_token_projection(image["tokens"][:, before:])
    expected = projected / projected.norm(dim=2, keepdim=True)
    assert image["token_features"].shape == (3, places, 10)
    torch.testing.assert_close(image["token_features"], expected)
    assert image["token_features"].dtype == text["token_features"].dtype == torch.float32

    used = text["tokens"].shape[1]
    assert used < 16
    projected = model.text_token_projection(text["tokens"])
    expected = projected / projected.norm(dim=2, keepdim=True)
    assert text["token_features"].shape == (3, 16, 10)
    torch.testing.assert_close(text["token_features"][:, :used], expected)
    assert not text["token_features"][:, used:].any()
    # Up to and with the end, which is the largest id.
    assert torch.equal(text["token_mask"], torch.arange(16) <= ids.argmax(dim=1)[:, None])
    # One text alone, cut elsewhere, is the same.
    shortest = ids.argmax(dim=1).argmin()
    alone = model.encode_text(ids[shortest][None])
    assert torch.equal(alone["token_mask"][0], text["token_mask"][shortest])
    valid = alone["token_mask"][0]
    torch.testing.assert_close(
        alone["token_features"][0, valid], text["token_features"][shortest, valid]
    )


def test_token_projections_are_there_for_late_interaction_only():
    with torch.device("meta"):
        names = {key for key, _ in build_small().named_parameters()}
        late = {key for key, _ in build_small(**LATE).named_parameters()}
    assert late - names == {"image_token_projection.weight", "text_token_projection.weight"}
    assert "token_features" not in build_small().eval().encode_image(inputs()[0])
    with pytest.raises(ConfigError, match="which tokens of 'pit_ti_224' are class tokens"):
        build_small("pit_ti_224", 224, **LATE)
