"""The part of a model that is told what was done to an image."""

import pytest
import torch
from torch.nn import functional as F

from loaders.recipes import IDENTITY_PARAMETERS
from models.augmentation import IDENTITY, AugmentationHead
from models.config import AugmentationConfig
from tests.models.test_two_tower import build_small, inputs, numbers

SIZES = {"width": 5, "hidden": 11}


def build():
    return build_small("test_resnet", augmentation=SIZES)


def told(count=3):
    return torch.rand(count, 13, generator=torch.Generator().manual_seed(8))


def awake(model):
    """The model with a last layer of the encoder that is not zero, as after training."""
    torch.manual_seed(1)
    torch.nn.init.normal_(model.augmentation.encoder[-1].weight)
    return model.eval()


def test_layers_are_two_perceptrons_around_the_pooled_feature():
    torch.manual_seed(0)
    head = AugmentationHead(AugmentationConfig(**SIZES), 7).double()
    torch.nn.init.normal_(head.encoder[-1].weight)
    state, pooled, alpha = head.state_dict(), torch.randn(4, 7).double(), told(4).double()

    def perceptron(name, x):
        hidden = F.gelu(x @ state[f"{name}.0.weight"].T + state[f"{name}.0.bias"])
        return hidden @ state[f"{name}.2.weight"].T + state[f"{name}.2.bias"]

    both = torch.cat([pooled, perceptron("encoder", alpha)], 1)
    torch.testing.assert_close(head(pooled, alpha), pooled + perceptron("head", both))
    assert numbers(head) == (13 * 5 + 5) + (5 * 5 + 5) + (12 * 11 + 11) + (11 * 7 + 7)


def test_the_identity_is_that_of_the_views():
    assert IDENTITY == IDENTITY_PARAMETERS
    model, (images, _) = awake(build()), inputs()
    plain = model.encode_image(images)["feature"]
    same = model.encode_image(images, torch.tensor(IDENTITY).expand(3, -1))["feature"]
    assert torch.equal(plain, same)
    assert (model.encode_image(images, told())["feature"] - plain).abs().max() > 1e-3


def test_it_starts_knowing_nothing_and_learns_at_once():
    model, (images, ids) = build().eval(), inputs()
    plain, other = (model.encode_image(images, a)["feature"] for a in (None, told()))
    assert torch.equal(plain, other)
    (other @ model.encode_text(ids)["feature"].T).diagonal().sum().backward()
    last = model.augmentation.encoder[-1]
    assert last.weight.abs().max() == last.bias.abs().max() == 0
    assert last.weight.grad.abs().max() > 0
    with torch.no_grad():
        last.weight -= last.weight.grad
    assert not torch.equal(model.encode_image(images, told())["feature"], plain)


def test_only_the_feature_of_an_image_depends_on_what_was_done():
    model, (images, ids) = awake(build()), inputs()
    one, other = (model.encode_image(images, a) for a in (None, told()))
    for name in ("pooled", "tokens"):
        assert torch.equal(one[name], other[name])
    plain = build_small("test_resnet").eval()
    assert torch.equal(model.encode_text(ids)["feature"], plain.encode_text(ids)["feature"])
    assert torch.equal(one["pooled"], plain.encode_image(images)["pooled"])


def test_a_model_without_it_is_as_it_was_and_says_so():
    plain, (images, _) = build_small("test_resnet"), inputs()
    assert not any("augmentation" in name for name in plain.state_dict())
    with pytest.raises(ValueError, match=r"it has no model\.augmentation"):
        plain.encode_image(images, told())


def test_bfloat16_weights():
    full, half = awake(build()), awake(build()).to(torch.bfloat16)
    images = inputs()[0]
    for alpha in (None, told()):
        found = half.encode_image(images, alpha)["feature"]
        assert found.dtype == torch.float32
        expected = full.encode_image(images, alpha)["feature"]
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.03)


def test_every_parameter_gets_a_gradient_and_its_module_is_called():
    """ZeRO-3 gathers a module's own parameters in hooks on its call."""
    model, called = build(), set()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    images, ids = inputs()
    image, text, scale = model(images, ids)
    (scale * (image @ text.T)).square().sum().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()} - {""}
    assert owners <= called
