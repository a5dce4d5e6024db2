"""LaCLIP: CLIP on one text a step, and the mean over all texts; values computed elsewhere."""

import itertools
import random

import pytest
import torch
from torch.nn import functional as F

import losses
from losses._gather import Gather
from losses.laclip import Method
from tests.losses import dense

PAIRS = torch.full((2,), -1)
SETS = ((10, 80), (40, 60), (20, 100))  # texts of two images, in degrees
PER_SET = (0.18018617345401888, 0.4817093660578535, 0.17623674224670305)
# The loss when image 0 has a text of the row's set and image 1 one of the column's.
CHOICES = [
    [0.180186173454, 0.279456769614, 0.137101184184],
    [0.358246674448, 0.481709366058, 0.305521639440],
    [0.221074776242, 0.326189385915, 0.176236742247],
]


def directions(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], 1)


def worked():
    return {"image": directions(0, 90), "scale": torch.full((2,), 2.0).double()}


def several(count):
    """The method with as many texts as wanted."""
    method = losses.build("laclip")
    method.texts = Method.texts[:count]
    return method


def test_worked_values_of_each_choice_and_their_mean():
    """What is trained on average is the mean over the choices, which is less than over the sets."""
    found = []
    for one, other in itertools.product(range(3), repeat=2):
        text = directions(SETS[one][0], SETS[other][1])
        out = losses.build("clip")({**worked(), "text": text}, PAIRS, Gather())
        assert out["contrastive_loss"].item() == pytest.approx(CHOICES[one][other], abs=1e-11)
        found.append(out["contrastive_loss"].item())
    assert sum(found) / 9 == pytest.approx(0.2739691901779682, abs=1e-12)


def test_worked_value_of_several_texts():
    texts = {name: directions(*degrees) for name, degrees in zip(Method.texts, SETS, strict=False)}
    out = several(3)({**worked(), **texts}, PAIRS, Gather())
    assert out["contrastive_loss"].item() == pytest.approx(0.27937742725285847, abs=1e-12)
    assert out["contrastive_loss"].item() == pytest.approx(sum(PER_SET) / 3, abs=1e-12)
    assert out["sample_loss"].mean().item() == pytest.approx(0.27937742725285847, abs=1e-12)


def test_worked_gradient_of_four_pairs():
    image, text = directions(0, 50, 120, 200).requires_grad_(), directions(10, 70, 100, 230)
    features = {"image": image, "text": text, "scale": torch.full((4,), 1.5).double()}
    loss = losses.build("clip")(features, torch.full((4,), -1), Gather())["contrastive_loss"]
    assert loss.item() == pytest.approx(0.5965186230413771, abs=1e-13)
    expected = [
        [-0.155530265, 0.064298755], [0.028087029, -0.079345801],
        [0.075816253, -0.094881022], [0.075764885, 0.143552369],
    ]  # fmt: skip
    (found,) = torch.autograd.grad(loss, image)
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-9
    )


def case(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    size = rng.randint(1, 20), rng.choice([2, 6, 16])
    names = ("image", *Method.texts)
    features = {name: F.normalize(torch.randn(size).double(), dim=1) for name in names}
    return features | {"scale": torch.full(size[:1], rng.choice([1.0, 14.3, 100.0])).double()}


@pytest.mark.parametrize("block", range(5))
def test_values_and_gradients_equal_dense_float64(block):
    for seed in range(10 * block, 10 * block + 10):
        ours, theirs = (
            {name: value.clone().requires_grad_() for name, value in case(seed).items()}
            for _ in range(2)
        )
        labels = torch.zeros(len(ours["image"]), dtype=torch.int64)
        out = losses.build("laclip")(ours, labels, Gather())
        own = torch.full_like(labels, -1)
        expected = sum(
            dense.unicl(theirs["image"], theirs[name], own, theirs["scale"][0]) / 5
            for name in Method.texts
        )
        torch.testing.assert_close(out["contrastive_loss"], expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(out["sample_loss"].mean(), expected.detach())
        gradients = (
            torch.autograd.grad(loss, list(leaves.values()))
            for loss, leaves in ((out["contrastive_loss"], ours), (expected, theirs))
        )
        for name, actual, wanted in zip(ours, *gradients, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11, msg=name)


def test_one_text_or_equal_texts_are_clip():
    features = case(1)
    labels = torch.zeros(len(features["image"]), dtype=torch.int64)
    text = features["original"]
    clip = losses.build("clip")({**features, "text": text}, labels, Gather())["contrastive_loss"]
    alone = several(1)(features, labels, Gather())["contrastive_loss"]
    assert torch.equal(alone, clip)
    equal = losses.build("laclip")(
        {**features, **dict.fromkeys(Method.texts, text)}, labels, Gather()
    )
    torch.testing.assert_close(equal["contrastive_loss"], clip, rtol=1e-13, atol=0)
