"""MoCo's loss against loops over the keys, and what the queue holds from step to step."""

import random

import pytest
import torch
from torch.nn import functional as F

import losses
from losses._gather import Gather
from losses.moco import moco_loss
from tests.losses import dense

DIMS = {"embed_dim": 6, "image_width": 6, "text_width": 6, "num_classes": 5}
QUERY = torch.tensor([[1, 0]], dtype=torch.float64)
KEY = torch.tensor([[0.8, 0.6]], dtype=torch.float64)
NEGATIVES = torch.tensor([[0, 1], [-1, 0], [0.6, 0.8]], dtype=torch.float64)
ALL = torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(1.0, 0.889272445220), (0.2, 0.326651665037), (0.07, 0.055854202061)],
)
def test_worked_values(temperature, expected):
    (loss,) = moco_loss(QUERY, KEY, NEGATIVES, ALL, temperature)
    assert abs(loss.item() - expected) < 1e-11


@pytest.mark.parametrize("block", range(6))
def test_values_and_gradients_equal_loops_in_float64(block):
    for seed in range(10 * block, 10 * block + 10):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        rows, slots, width = rng.randint(1, 9), rng.randint(1, 20), rng.choice([2, 5, 16])
        query, key, slot = (
            F.normalize(torch.randn(n, width).double(), dim=1) for n in (rows, rows, slots)
        )
        filled = torch.rand(slots) < rng.choice([0.0, 0.5, 1.0])
        temperature = rng.choice([1.0, 0.2, 0.07])
        ours, theirs = (query.clone().requires_grad_() for _ in range(2))
        loss = moco_loss(ours, key, slot, filled, temperature).mean()
        expected = dense.moco(theirs, key, slot[filled], temperature)
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
        (gradient,), (reference,) = (
            torch.autograd.grad(value, leaf) for value, leaf in ((loss, ours), (expected, theirs))
        )
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


def test_an_empty_queue_gives_no_loss_and_no_gradient():
    query = QUERY.clone().requires_grad_()
    (loss,) = moco_loss(query, KEY, NEGATIVES, ~ALL, 0.07)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, query)[0].abs().max() == 0


def test_a_step_meets_the_keys_of_earlier_steps_only():
    torch.manual_seed(0)
    method = losses.build("moco", {"queue": 10, "projection": 4}, DIMS).double()
    remembered = []
    for _ in range(5):
        query, key = (F.normalize(torch.randn(4, 4).double(), dim=1) for _ in range(2))
        out = method({"query": query, "key": key}, torch.zeros(4, dtype=torch.int64), Gather())
        held = torch.tensor(remembered, dtype=torch.float64).view(-1, 4)
        expected = dense.moco(query, key, held, 0.2)
        torch.testing.assert_close(out["contrastive_loss"], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(out["sample_loss"].mean(), expected, rtol=1e-10, atol=1e-12)
        method.step_end()
        remembered = (remembered + key.tolist())[-10:]


def test_momentum_is_a_share():
    assert losses.build("moco", {"queue": 2}, DIMS).decay(7) == 0.999
    with pytest.raises(ValueError, match="between 0 and 1"):
        losses.build("moco", {"momentum": 1.2}, DIMS)
