"""NT-Xent against the dense formula, and SimCLR with its head against layers of torch."""

import math
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import losses
from losses._gather import Gather
from losses.simclr import nt_xent
from losses.supcon import supcon_loss
from tests.losses import dense

FIRST = torch.tensor([[1, 0], [0.6, 0.8]], dtype=torch.float64)
SECOND = torch.tensor([[0.8, -0.6], [0, 1]], dtype=torch.float64)
DIMS = {"embed_dim": 6, "image_width": 6, "text_width": 6, "num_classes": 5}


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(1.0, 0.673576788887), (0.5, 0.430190277137), (0.1, 0.063779839762)],
)
def test_worked_values(temperature, expected):
    for pair in ((FIRST, SECOND), (SECOND, FIRST)):
        loss, each = nt_xent(*pair, temperature, Gather())
        assert abs(loss.item() - expected) < 1e-11
        assert torch.allclose(each.mean(), loss)


def test_worked_values_of_each_view():
    """At temperature 1 two views of the fixture have 0.818924715852, their partners 0.52...."""
    _, each = nt_xent(FIRST, SECOND, 1.0, Gather())
    mean = (0.818924715852 + 0.528228861922) / 2
    expected = torch.full((2,), mean, dtype=torch.float64)
    torch.testing.assert_close(each, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("block", range(6))
def test_values_and_gradients_equal_dense_float64(block):
    for seed in range(10 * block, 10 * block + 10):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        size = rng.randint(1, 40), rng.choice([2, 5, 16])
        temperature = rng.choice([1.0, 0.5, 0.1, 0.07, 0.01])
        # Not all of unit length: the formula does not assume it.
        leaves = [
            F.normalize(torch.randn(size).double(), dim=1) * rng.choice([1, 1.3]) for _ in "ab"
        ]
        copies = [[leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2)]
        loss, each = nt_xent(*copies[0], temperature, Gather())
        expected = dense.nt_xent(*copies[1], temperature)
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(each.mean(), expected, rtol=1e-11, atol=1e-12)
        for ours, theirs in zip(
            torch.autograd.grad(3 * loss, copies[0]),
            torch.autograd.grad(3 * expected, copies[1]),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_supcon_without_labels_is_simclr():
    torch.manual_seed(0)
    first, second = (F.normalize(torch.randn(9, 5).double(), dim=1) for _ in range(2))
    loss, each = nt_xent(first, second, 0.1, Gather())
    expected, _, _ = supcon_loss(first, second, torch.full((9,), -1), 0.1, Gather())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert each.shape == (9,)


def test_special_cases():
    same = F.normalize(torch.ones(8, 3).double(), dim=1)
    loss, _ = nt_xent(same, same, 0.1, Gather())
    assert abs(loss.item() - math.log(15)) < 1e-12  # all views equal: ln(2B - 1)
    loss, _ = nt_xent(FIRST[:1], SECOND[:1], 0.1, Gather())
    assert abs(loss.item()) < 1e-12  # one image: its views are all there is


def test_method_runs_each_view_through_the_head_on_its_own():
    torch.manual_seed(1)
    method = losses.build("simclr", {"hidden": 7, "projection": 4}, DIMS).double()
    layers = []
    for linear, norm in zip(method.head.layers, method.head.norms, strict=True):
        layers += [linear]
        layers += (
            [] if linear is method.head.layers[-1] else [nn.BatchNorm1d(7).double(), nn.ReLU()]
        )
        assert (len(list(norm.parameters())) > 0) == (linear is not method.head.layers[-1])
    plain = nn.Sequential(*layers)
    pooled = [torch.randn(10, 6).double() for _ in range(2)]
    expected = dense.nt_xent(*(F.normalize(plain(view), dim=1) for view in pooled), 0.1)
    features = dict(zip(method.images, pooled, strict=True))
    out = method(features, torch.randint(0, 3, (10,)), Gather())
    torch.testing.assert_close(out["contrastive_loss"], expected, rtol=1e-10, atol=0)
