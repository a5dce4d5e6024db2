"""What is recorded for a GPU, on a CPU: loss and gradients in one go."""

import pytest
import torch
from torch.nn import functional as F

from losses import _replay
from losses._block import WALK
from losses._gather import Gather
from tests.losses import dense


@pytest.mark.parametrize("labels", ["mixed", "captions", "one class"])
def test_value_and_gradients_equal_dense_float64(labels):
    torch.manual_seed(3)
    x, y = (F.normalize(torch.randn(37, 12, dtype=torch.float64), dim=1) for _ in range(2))
    scale = torch.tensor([9.0], dtype=torch.float64)
    leaves = [value.clone().requires_grad_() for value in (x, y, scale)]
    chosen = {
        "mixed": torch.randint(-3, 4, (37,)),
        "captions": torch.full((37,), -1),
        "one class": torch.zeros(37, dtype=torch.int64),
    }[labels]
    expected = dense.unicl(leaves[0], leaves[1], chosen, leaves[2])
    expected.backward()
    found = _replay.value_and_gradients(x, y, chosen, scale, Gather(), WALK)
    loss, sample_loss, positives, *grads = found
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(sample_loss.mean(), loss)
    same = (chosen[:, None] == chosen) & (chosen != -1)[:, None]
    torch.testing.assert_close(positives, same.sum(1).clamp(min=1))
    for grad, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(grad.reshape(leaf.shape), leaf.grad)
