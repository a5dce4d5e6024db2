"""Normalisers and the sigmoid sum, with any gradient and any excluded pair, against loops in
float64 over the whole batch."""

import math

import numpy as np
import pytest
import torch

from losses._core import normalisers
from losses._gather import Gather
from tests.losses import virtual
from tests.losses.on_ranks import WIDE_SEEDS, results, wide, wide_case


def expected(case):
    """What the formulas say of the whole batch: sums over the pairs that are left, one by one."""
    leaves = [case[key].clone().requires_grad_() for key in ("rows", "columns", "scale", "bias")]
    rows, columns, scale, bias = leaves
    logits = scale * rows @ columns.T
    ids = case["rows ids"].tolist(), case["columns ids"].tolist()
    left = [
        [not (case["excluding"] and i == j and i >= 0) for j in ids[1]] for i in ids[0]
    ]  # fmt: skip
    normaliser = []
    for matrix, kept in ((logits, left), (logits.T, [list(k) for k in zip(*left, strict=True)])):
        for i in range(len(matrix)):
            chosen = [matrix[i, j] for j, here in enumerate(kept[i] if kept else []) if here]
            normaliser.append(torch.logsumexp(torch.stack(chosen), 0) if chosen else None)
    weights = torch.cat([case["rows gradient"], case["columns gradient"]])
    loss = sum(w * r for w, r in zip(weights, normaliser, strict=True) if r is not None)
    loss = loss + sum(leaf.sum() for leaf in leaves) * 0
    total = torch.log1p(torch.exp(-(logits + bias).abs())) + (logits + bias).clamp(min=0)
    return {
        "lse": [-math.inf if r is None else r.item() for r in normaliser],
        "total": total.sum().item(),
        "of_lse": torch.autograd.grad(loss, leaves[:3], retain_graph=True),
        "of_total": torch.autograd.grad(0.7 * total.sum(), leaves),
    }


def check(ranks, case, where):
    """What the ranks hold, put together, is what the formulas say."""
    wanted, size = expected(case), len(ranks)

    def close(actual, value, what):
        value = np.asarray(value)
        finite = np.abs(value[np.isfinite(value)])
        tolerance = 1e-11 * max(1e-3, *finite.ravel()) if finite.size else 0
        np.testing.assert_allclose(actual, value, rtol=0, atol=tolerance, err_msg=f"{where} {what}")

    lse = [np.concatenate([rank["lse"][side] for rank in ranks]) for side in (0, 1)]
    close(np.concatenate(lse), wanted["lse"], "normalisers")
    for rank in ranks:
        close(rank["total"], wanted["total"], "sigmoid sum")
    for key in ("of_lse", "of_total"):
        for number, value in enumerate(wanted[key]):
            parts = [np.asarray(rank[key][number]) for rank in ranks]
            # Averaged over ranks later: features, of which each rank has its own, and parameters.
            actual = np.concatenate(parts) / size if number < 2 else np.mean(parts, axis=0)
            close(actual, value, f"{key} {number}")


# 120 cases in all, of which a quarter every day.
BLOCKS = [0, *(pytest.param(block, marks=pytest.mark.soak) for block in (1, 2, 3))]


@pytest.mark.parametrize("block", BLOCKS)
def test_one_process(block):
    empty = 0
    for seed in range(block * 30, block * 30 + 30):
        case = wide_case(seed, 1)
        found = wide(0, case)
        check([found], case, seed)
        empty += sum(int((lse == -math.inf).sum()) for lse in found["lse"])
    assert empty > 3


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.soak), 4])
def test_real_ranks(world_size):
    ranks = results(world_size)
    for number, seed in enumerate(WIDE_SEEDS):
        check([rank["wide"][number] for rank in ranks], wide_case(seed, world_size), seed)


@pytest.mark.parametrize("world_size", [4, 7, 12, 16])
def test_virtual_ranks(world_size):
    for seed in (1, 2, 4, 8):
        case = wide_case(seed, world_size)
        check(virtual.run(wide, world_size, case), case, seed)


def test_a_row_without_any_pair_is_minus_infinity_and_gives_no_gradient():
    case = wide_case(1, 1)
    case["rows ids"][0], case["columns ids"][:] = 5, 5
    found = wide(0, case)
    assert found["lse"][0][0] == -math.inf
    assert found["of_lse"][0][0].abs().sum() == 0
    assert all(gradient.isfinite().all() for gradient in found["of_lse"])


def test_a_dominant_excluded_pair_does_not_cancel():
    """Subtracting exp(s_ii) from a float32 sum would leave nothing of the others."""
    x = torch.eye(3)
    rows, columns = normalisers(
        x, x, torch.tensor([100.0]), Gather(), (torch.arange(3), torch.arange(3))
    )
    torch.testing.assert_close(rows, torch.full((3,), math.log(2)))
    torch.testing.assert_close(columns, rows)
