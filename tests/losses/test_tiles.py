"""One block of logits, walked in tiles, against whole matrices in float64."""

import math
import random

import pytest
import torch
from torch.nn import functional as F

from losses._tiles import Tiles


def make_block(seed):
    """x (n, D), y (m, D), dense logits with -inf where excluded, and what makes the tiles."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    n, m, width = rng.randint(0, 9), rng.randint(0, 9), rng.choice([1, 3, 8])
    x, y = (F.normalize(torch.randn(count, width).double(), dim=1) for count in (n, m))
    scale = torch.tensor(rng.choice([1.0, 14.3, 100.0, 400.0])).double()
    ids = tuple(torch.randint(-2, 3, (count,)) for count in (n, m))
    logits = scale * x @ y.T
    for i in range(n):
        for j in range(m):
            if ids[0][i] == ids[1][j] >= 0:
                logits[i, j] = -math.inf
    tile, keep = (rng.randint(1, 10), rng.randint(1, 10)), rng.choice([0, 100, 10**6])
    return x, y, logits, lambda: Tiles(x, y, scale, ids, tile, keep)


def softmax(logits, dim):
    """Softmax over `dim`; 0 where everything is -inf. With its logarithmic normaliser."""
    if 0 in logits.shape:
        return logits, logits.new_full((logits.shape[1 - dim],), -math.inf)
    normaliser = logits.logsumexp(dim, keepdim=True)
    empty = normaliser == -math.inf
    return (logits - normaliser.masked_fill(empty, 0)).exp(), normaliser.squeeze(dim)


@pytest.mark.parametrize("block", range(4))
def test_normalisers_and_weighted_gradients(block):
    empty = 0
    for seed in range(block * 50, block * 50 + 50):
        x, y, logits, make = make_block(seed)
        (by_row, rows), (by_column, columns) = softmax(logits, 1), softmax(logits, 0)
        tiles = make()
        found = tiles.forward()
        torch.testing.assert_close(found, (rows, columns), rtol=1e-12, atol=1e-12)
        g, h = torch.randn(len(x)).double(), torch.randn(len(y)).double()
        weights = g[:, None] * by_row + h * by_column
        # What a loss makes of a normaliser of nothing may be anything.
        g[rows == -math.inf], h[columns == -math.inf] = math.nan, math.inf
        gradients = tiles.backward(*found, g, h)
        expected = weights @ y, weights.T @ x
        torch.testing.assert_close(gradients, expected, rtol=1e-11, atol=1e-11, msg=str(seed))
        empty += int((rows == -math.inf).sum())
    assert empty > 5


@pytest.mark.parametrize("bias", [-10.0, 0.0, 30.0])
def test_sigmoid_sums_and_gradients(bias):
    bias = torch.tensor(bias).double()
    for seed in range(60):
        x, y, logits, make = make_block(seed)
        tiles = make()
        shifted = logits + bias
        expected = torch.logaddexp(shifted, torch.zeros_like(shifted)).sum()
        torch.testing.assert_close(tiles.softplus_sum(bias), expected, rtol=1e-12, atol=1e-12)
        weights = 1 / (1 + (-shifted).exp())
        gradients = tiles.sigmoid_gradients(bias)
        expected = weights @ y, weights.T @ x, weights.sum()
        torch.testing.assert_close(gradients, expected, rtol=1e-11, atol=1e-11, msg=str(seed))
