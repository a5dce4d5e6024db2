"""Properties of the sample order, over random data sets, ratios and batch sizes."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.errors import ConfigError, DataError
from loaders.order import Order, Source, plan_streams

shards = st.lists(st.integers(1, 30), min_size=1, max_size=8)


@st.composite
def orders(draw, sampler=None):
    """(order, sources, streams); batch sizes that the shares divide and the data can fill."""
    kinds = draw(st.lists(st.sampled_from(["image_label", "image_text"]), min_size=1, max_size=4))
    sources = [Source(f"s{i}", kind, np.array(draw(shards))) for i, kind in enumerate(kinds)]
    sampler = sampler or draw(st.sampled_from(["balanced", "proportional", "ratio"]))
    ratios = {s.name: draw(st.integers(1, 4)) for s in sources} if sampler == "ratio" else None
    streams = plan_streams(sources, sampler, ratios)
    period = sum(stream.weight for stream in streams)
    sizes = [sum(int(sources[i].shard_sizes.sum()) for i in s.sources) for s in streams]
    limit = min(size // s.weight for size, s in zip(sizes, streams, strict=True))
    if limit == 0:
        limit, streams, period = sum(sizes), plan_streams(sources, "proportional"), 1
    batch = period * draw(st.integers(1, min(limit, 12)))
    seed, block = draw(st.integers(0, 99)), draw(st.integers(1, 5))
    return Order(sources, streams, batch, seed, block), sources, streams


def source_of(sources, uids):
    ends = np.cumsum([int(s.shard_sizes.sum()) for s in sources])
    return np.searchsorted(ends, uids, side="right")


@settings(max_examples=80, deadline=None)
@given(orders())
def test_every_batch_has_the_exact_shares(case):
    order, sources, streams = case
    for step in range(4):
        counts = Counter(source_of(sources, order.global_batch(step)).tolist())
        for stream, share in zip(streams, order.shares, strict=True):
            assert sum(counts[s] for s in stream.sources) == share
        assert sum(counts.values()) == order.batch_size


@settings(max_examples=60, deadline=None)
@given(orders())
def test_each_pass_of_a_stream_visits_every_sample_once(case):
    order, sources, streams = case
    steps = max(-(-2 * n // s) for n, s in zip(order.stream_sizes, order.shares, strict=True))
    walked = np.concatenate([order.global_batch(step) for step in range(steps)])
    owner = source_of(sources, walked)
    for stream, size in zip(streams, order.stream_sizes, strict=True):
        mine = walked[np.isin(owner, stream.sources)]
        for turn in range(2):
            seen = mine[turn * size : (turn + 1) * size]
            assert len(set(seen.tolist())) == size == len(seen)


@settings(max_examples=40, deadline=None)
@given(orders(), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_seek_equals_walk(case, steps):
    order, sources, streams = case
    walk = [order.global_batch(step) for step in range(41)]
    fresh = Order(sources, streams, order.batch_size, order.seed, order.block_shards)
    for step in steps:  # any order, on an object that has seen nothing
        assert np.array_equal(fresh.global_batch(step), walk[step])


@settings(max_examples=40, deadline=None)
@given(orders(sampler="balanced"))
def test_even_slices_of_a_balanced_batch_are_balanced(case):
    order, sources, streams = case
    if len(streams) < 2:
        return
    kinds = np.array([s.kind for s in sources])
    batch = kinds[source_of(sources, order.global_batch(3))]
    for ranks in (1, 2, 3, 4, 6):
        if order.batch_size % (2 * ranks) == 0:
            for part in batch.reshape(ranks, -1):
                assert (part == "image_label").sum() * 2 == len(part)


def test_seeds_and_passes_differ():
    sources = [Source("a", "image_label", np.array([50, 50, 50]))]
    streams = plan_streams(sources, "balanced")
    first, second = (Order(sources, streams, 50, seed) for seed in (0, 1))
    assert not np.array_equal(first.global_batch(0), second.global_batch(0))
    assert not np.array_equal(first.global_batch(0), first.global_batch(3))


def test_reads_stay_inside_a_block_of_shards():
    sources = [Source("a", "image_text", np.full(100, 10))]
    order = Order(sources, plan_streams(sources, "balanced"), 10, seed=0, block_shards=4)
    touched = {int(uid) // 10 for step in range(4) for uid in order.global_batch(step)}
    assert len(touched) == 4


def test_order_is_pinned():
    """The order of a seed may never change: a run must continue after an upgrade."""
    sources = [
        Source("a", "image_label", np.array([5, 4])),
        Source("b", "image_text", np.array([7])),
    ]
    order = Order(sources, plan_streams(sources, "balanced"), 4, seed=3)
    bits = np.random.Philox(np.random.SeedSequence((3, 1, 0, 1))).random_raw(7)
    assert order.global_batch(0)[1::2].tolist() == (9 + np.argsort(bits))[:2].tolist()


@pytest.mark.parametrize(
    ("sampler", "ratios", "batch", "error", "words"),
    [
        ("balanced", None, 5, ConfigError, "multiple of 2"),
        ("balanced", None, 40, DataError, "image_text has 7 samples, fewer than the 20"),
        ("ratio", {"a": 1}, 4, ConfigError, "each of a, b"),
        ("ratio", {"a": 1, "b": 0}, 4, ConfigError, "at least 1"),
        ("ratio", None, 4, ConfigError, "needs it"),
        ("balanced", {"a": 1, "b": 1}, 4, ConfigError, "belongs to"),
        ("uniform", None, 4, ConfigError, "there are balanced"),
    ],
)
def test_impossible_requests_are_refused(sampler, ratios, batch, error, words):
    sources = [Source("a", "image_label", np.array([50])), Source("b", "image_text", np.array([7]))]
    with pytest.raises(error, match=words):
        Order(sources, plan_streams(sources, sampler, ratios), batch, seed=0)
