"""Metrics against scikit-learn, scipy and brute force; ties, one class, empty classes, NaN."""

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from eval.tasks import metrics
from loaders.errors import DataError


def ranks_of_scores(scores: np.ndarray, labels: np.ndarray, chunk: int = 3) -> np.ndarray:
    """A score matrix is the product of itself and the identity."""
    identity = torch.eye(scores.shape[1], dtype=torch.float64)
    return metrics.positive_ranks(
        torch.from_numpy(scores), identity, np.arange(len(labels)), labels, chunk=chunk
    )


def brute_force_ranks(scores, positives):
    ranks = []
    for row, positive in zip(scores, positives, strict=True):
        best = max(row[j] for j in positive)
        ranks.append(sum(1 for j, s in enumerate(row) if j not in positive and s >= best))
    return np.array(ranks)


@pytest.mark.parametrize("seed", range(5))
def test_classification_equals_scikit_learn(seed):
    random = np.random.default_rng(seed)
    n, k = int(random.integers(20, 90)), 7
    scores = random.normal(size=(n, k))  # continuous: no ties
    labels = random.integers(0, k - 1, size=n)  # class k-1 has no sample
    result = metrics.classification_metrics(ranks_of_scores(scores, labels), labels)
    for name, top in (("top1", 1), ("top5", 5)):
        expected = top_k_accuracy_score(labels, scores, k=top, labels=np.arange(k))
        assert result[name]["value"] == pytest.approx(100 * expected)
    expected = balanced_accuracy_score(labels, scores.argmax(axis=1))
    assert result["mean_per_class"]["value"] == pytest.approx(100 * expected)
    assert result["top1"]["n"] == n


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_ranks_equal_brute_force_with_ties_and_several_positives(seed, chunk):
    random = np.random.default_rng(seed)
    n, m, width = 17, 11, 3
    # Small integers: exact products, many equal scores.
    queries = random.integers(-1, 2, size=(n, width)).astype(np.float32)
    candidates = random.integers(-1, 2, size=(m, width)).astype(np.float32)
    positives = [set(random.choice(m, size=random.integers(1, 4), replace=False)) for _ in range(n)]
    pairs = [(i, j) for i, group in enumerate(positives) for j in group]
    random.shuffle(pairs)
    pair_query, pair_candidate = np.array(pairs).T
    got = metrics.positive_ranks(
        torch.from_numpy(queries), torch.from_numpy(candidates), pair_query, pair_candidate, chunk
    )
    np.testing.assert_array_equal(got, brute_force_ranks(queries @ candidates.T, positives))


def test_collapsed_model_scores_zero():
    labels = np.array([0, 1, 2, 3, 4, 5])
    result = metrics.classification_metrics(ranks_of_scores(np.ones((6, 6)), labels), labels)
    assert result["top1"]["value"] == result["top5"]["value"] == 0


def test_one_class_is_always_right():
    labels = np.zeros(4, dtype=np.int64)
    result = metrics.classification_metrics(ranks_of_scores(np.ones((4, 1)), labels), labels)
    assert result["top1"]["value"] == result["mean_per_class"]["value"] == 100


def test_nan_and_missing_positive_are_refused():
    good, bad = torch.eye(3), torch.tensor([[0.0, torch.nan, 1.0]])
    with pytest.raises(DataError, match="query features hold NaN"):
        metrics.positive_ranks(bad, good, np.array([0]), np.array([0]))
    with pytest.raises(DataError, match="candidate features hold NaN"):
        metrics.positive_ranks(good, bad, np.arange(3), np.zeros(3, int))
    with pytest.raises(ValueError, match="1 queries have no positive, the first is 1"):
        metrics.positive_ranks(good, good, np.array([0, 2]), np.array([0, 2]))


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 50), (7, 50), (50, 50), (4321, 10000)])
def test_wilson_equals_scipy(hits, n):
    expected = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert metrics.wilson_interval(hits, n) == pytest.approx((expected.low, expected.high))


def test_bootstrap_of_one_group_agrees_with_scipy():
    values = (np.random.default_rng(0).random(400) < 0.3).astype(float)
    low, high = metrics.bootstrap_interval(values, np.zeros(400, int))
    expected = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.006)


def test_bootstrap_of_unequal_groups_agrees_with_scipy():
    values = np.repeat([1.0, 0.0, 1.0, 1.0, 0.0], [8, 2, 1, 60, 140])
    groups = np.repeat([3, 3, 5, 9, 9], [8, 2, 1, 60, 140])  # 5 has one sample, 4 has none
    interval = metrics.bootstrap_interval(values, groups, seed=5)
    assert interval == metrics.bootstrap_interval(values, groups, seed=5)
    assert interval != metrics.bootstrap_interval(values, groups, seed=6)

    def statistic(value, group):
        return np.mean([value[group == g].mean() for g in set(group)])

    expected = scipy.stats.bootstrap(
        (values, groups),
        statistic,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert interval == pytest.approx((expected.low, expected.high), abs=0.012)
    assert metrics.mean_of_group_means(values, groups) == pytest.approx((0.8 + 1 + 0.3) / 3)


def test_retrieval_mean_is_the_mean_of_the_six():
    image_ranks, text_ranks = np.array([0, 4, 9, 50]), np.array([0, 0, 7])
    result = metrics.retrieval_metrics(image_ranks, text_ranks)
    expected = [25, 50, 75, 200 / 3, 200 / 3, 100]
    names = [f"{d}_r{k}" for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert [result[name]["value"] for name in names] == pytest.approx(expected)
    assert result["mean_recall"]["value"] == pytest.approx(np.mean(expected))
    assert [result["image_to_text_r1"]["n"], result["text_to_image_r1"]["n"]] == [4, 3]
