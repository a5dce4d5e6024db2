"""Each global batch from one data set: shares, passes, seek, against counting step by step."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from loaders.errors import ConfigError, DataError
from loaders.one_source import BLOCK, OneSourceOrder, shared
from loaders.order import Source, plan_streams

SIZES = {"big": [700, 300], "small": [90], "tiny": [16]}
BATCH = 16


def make_order(ratios=None, seed=3, sizes=SIZES):
    sources = [Source(name, "image_text", np.array(size)) for name, size in sizes.items()]
    return OneSourceOrder(sources, plan_streams(sources, "one_source", ratios), BATCH, seed, 1)


def source_of(uids, sizes=SIZES):
    ends = np.cumsum([sum(size) for size in sizes.values()])
    return np.searchsorted(ends, uids, side="right")


@pytest.mark.parametrize("ratios", [None, {"big": 1, "small": 2, "tiny": 5}])
def test_batches_are_of_one_source_and_counts_are_those_of_a_walk(ratios):
    order = make_order(ratios)
    weights = list(ratios.values()) if ratios else [1000, 90, 16]
    steps, walked = 2 * BLOCK + 200, np.zeros(3, dtype=np.int64)
    owners = []
    for step in range(steps):
        assert order.steps_of(step) == walked.tolist()
        assert order.passes(step) == pytest.approx(walked * BATCH / np.array([1000, 90, 16]))
        owner = set(source_of(order.global_batch(step)).tolist())
        assert len(owner) == 1
        owners.append(owner.pop())
        walked[owners[-1]] += 1
        if (step + 1) % BLOCK == 0:  # beside the exact share at the end of each block
            exact = (step + 1) * np.array(weights) / sum(weights)
            assert np.abs(walked - exact).max() < 1
    assert set(owners[:BLOCK]) == {0, 1, 2}
    first, second = owners[:BLOCK], owners[BLOCK : 2 * BLOCK]
    assert first != second, "blocks have orders of their own"
    changes = sum(a != b for a, b in itertools.pairwise(first))
    chance = 1 - sum((w / sum(weights)) ** 2 for w in weights)
    assert abs(changes - BLOCK * chance) < 5 * BLOCK**0.5, "the order of a block is random"


def test_each_pass_of_a_source_visits_every_sample_once():
    order = make_order()
    seen = {0: [], 1: [], 2: []}
    for step in range(600):
        uids = order.global_batch(step)
        seen[int(source_of(uids)[0])] += uids.tolist()
    for source, size in enumerate((1000, 90, 16)):
        passes = [seen[source][i : i + size] for i in range(0, len(seen[source]), size)]
        whole = [one for one in passes if len(one) == size]
        assert whole
        assert all(len(set(one)) == size for one in whole)


def test_seek_equals_walk_and_another_seed_is_another_order():
    walk = make_order()
    batches = [walk.global_batch(step) for step in range(BLOCK + 40)]
    fresh = make_order()
    for step in (BLOCK + 39, 5, BLOCK - 1, BLOCK, 0):
        assert np.array_equal(fresh.global_batch(step), batches[step])
    other = make_order(seed=4)
    assert [walk.stream_of(s) for s in range(99)] != [other.stream_of(s) for s in range(99)]
    far = 10**9 + 7
    assert fresh.steps_of(far + 1)[fresh.stream_of(far)] == (
        fresh.steps_of(far)[fresh.stream_of(far)] + 1
    )


def test_one_source_alone_is_the_order_of_that_source():
    order = make_order(sizes={"only": [50, 30]})
    walked = np.concatenate([order.global_batch(step) for step in range(5)])
    assert sorted(walked.tolist()) == list(range(80))


def sainte_lague(total, weights):
    """The same sharing, step by step from nothing."""
    counts = [0] * len(weights)
    for _ in range(total):
        claims = [Fraction(w, 2 * n + 1) for w, n in zip(weights, counts, strict=True)]
        counts[claims.index(max(claims))] += 1
    return counts


def test_shares_equal_those_given_step_by_step():
    rng = np.random.default_rng(0)
    for _ in range(60):
        weights = [int(w) for w in rng.integers(1, 10 ** rng.integers(1, 8), rng.integers(1, 7))]
        total = int(rng.integers(0, 400))
        assert shared(total, weights) == sainte_lague(total, weights)
        later = shared(total + 1, weights)
        assert sum(np.subtract(later, shared(total, weights)) == 1) == 1
    assert sum(shared(10**12, [3, 10**9, 7])) == 10**12


def test_impossible_requests_are_refused():
    with pytest.raises(DataError, match="tiny has 9 samples, fewer than the 16"):
        make_order(sizes={"big": [100], "tiny": [9]})
    with pytest.raises(ConfigError, match="each of big, small, tiny"):
        make_order({"big": 1})
