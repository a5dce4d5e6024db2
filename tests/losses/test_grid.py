"""The core over ranks, one-sided and on grids, against the dense float64 formula on one process."""

import random

import numpy as np
import pytest
import torch

from losses._gather import grid_shape
from tests.losses import dense, virtual
from tests.losses.on_ranks import SHARES, case_batch, cases, core, results


def dense_values(image, text, labels, scale):
    """What one process with dense float64 matrices says of the whole batch."""
    loss, *gradients = dense.value_and_gradients(dense.unicl, image, text, labels, scale)
    logits, targets = scale * image @ text.T, dense.target_matrix(labels.tolist())
    positive = (targets * logits).sum(1) / targets.sum(1)
    sample_loss = 0.5 * (logits.logsumexp(1) + logits.logsumexp(0)) - positive
    return {
        "loss": loss,
        "sample_loss": sample_loss,
        "positives": targets.sum(1),
        **dict(zip(("image", "text", "scale"), gradients, strict=True)),
    }


def check(ranks, batch, where):
    """Compare what the ranks hold, put together, with the dense formula."""
    for key, value in dense_values(*batch).items():
        parts = [np.asarray(rank[key]) for rank in ranks]
        if key == "loss":  # the same on every rank
            actual, value = np.stack(parts), value.expand(len(parts))
        elif key == "scale":  # one parameter: averaged over ranks later
            actual = np.mean(parts, axis=0)
        else:
            actual = np.concatenate(parts)
        if key in ("image", "text"):  # averaged over ranks later
            actual = actual / len(parts)
        tolerance = 1e-11 * max(value.abs().max().item(), 1e-3)
        np.testing.assert_allclose(
            actual, value.numpy(), rtol=0, atol=tolerance, err_msg=f"{where} {key}"
        )


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_real_ranks_equal_the_dense_formula(world_size):
    ranks, used = results(world_size), set()
    for number, (kind, scale, share, *_) in enumerate(cases(world_size)):
        found = [rank["cases"][number] for rank in ranks]
        check(found, case_batch(kind, scale, sum(share)), (kind, scale, share))
        used.add(tuple(share))
    assert len(used) == len(SHARES[world_size])


@pytest.mark.parametrize("world_size", [4, 7, 8, 12, 16, 64])
def test_virtual_ranks_equal_the_dense_formula(world_size):
    rng = random.Random(world_size)
    for kind, scale in (("mixed", 14.3), ("groups", 400.0), ("captions", 1.0)):
        share = [rng.randint(0, 6) for _ in range(world_size)]
        batch = case_batch(kind, scale, sum(share))
        ranks = virtual.run(core, world_size, batch, share, (5, 4), 400)
        check(ranks, batch, (kind, scale, share))


def test_grid_with_the_least_traffic():
    shapes = {n: grid_shape(n) for n in (1, 2, 3, 4, 6, 7, 8, 12, 16, 64, 512)}
    assert shapes == {
        1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (2, 2), 6: (3, 2), 7: (7, 1), 8: (4, 2),
        12: (4, 3), 16: (4, 4), 64: (8, 8), 512: (32, 16),
    }  # fmt: skip


@pytest.mark.parametrize(("world_size", "expected"), [(2, 1.0), (3, 4 / 3), (4, 1.0)])
def test_received_elements(world_size, expected):
    """Features and their gradients over B * D; the rest is some numbers per row of the batch."""
    features, everything = results(world_size)[0]["received"]
    assert features == pytest.approx(expected)
    floats = expected * 24 * world_size * 8 * 4
    assert floats < everything < floats + 24 * 24 * world_size


def test_group_smaller_than_the_job_is_one_sided():
    losses = virtual.run(of_half, 8)
    assert losses[:4] == [losses[0]] * 4
    assert losses[4:] == [losses[4]] * 4
    assert losses[0] != losses[4]


def of_half(rank):
    """Loss among four of eight ranks; the other four have a batch of their own."""
    import torch.distributed as dist

    from losses.unicl import unicl_loss

    halves = [dist.new_group(list(range(first, first + 4))) for first in (0, 4)]
    image = torch.eye(8)[rank : rank + 1]
    scale = torch.tensor([1.0 + rank // 4])
    return unicl_loss(image, image, torch.tensor([rank]), scale, halves[rank // 4]).item()
