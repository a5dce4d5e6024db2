"""11-point mAP and ROC AUC against brute force and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_curve, roc_auc_score

from eval.tasks import metrics_scores
from eval.tasks.scores import Products
from loaders.errors import DataError


def brute_force_11_points(scores, positive):
    """vision-evaluation 0.2.9 on scikit-learn's curve: walk the curve down the recalls."""
    precision, recall, _ = precision_recall_curve(positive, scores)
    total = 0.0
    for level in np.linspace(1, 0, 11).tolist():
        total += max(p for p, r in zip(precision, recall, strict=True) if r >= level)
    return total / 11


@pytest.mark.parametrize("seed", range(6))
def test_map_equals_brute_force_with_ties_and_empty_classes(seed):
    random = np.random.default_rng(seed)
    n, k = int(random.integers(5, 60)), 5
    scores = random.integers(0, 12, size=(n, k)) / 12  # many equal scores
    targets = random.random((n, k)) < 0.3
    targets[:, 2] = False
    targets[0, 0] = True
    kept = [c for c in range(k) if targets[:, c].any()]
    expected = np.mean([brute_force_11_points(scores[:, c], targets[:, c]) for c in kept])
    result = metrics_scores.mean_average_precision_11(scores, targets)
    assert result["value"] == pytest.approx(100 * expected, abs=1e-9)
    assert result["n"] == n
    assert result["ci95"][0] <= result["ci95"][1]


def test_map_by_hand_in_integers():
    """Ten positives: three first, then three negatives, then seven."""
    scores = -np.arange(20.0)
    positive = np.array([1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1] + [0] * 7, bool)
    result = metrics_scores.mean_average_precision_11(scores[:, None], positive[:, None])
    # Recalls 0, 0.1, 0.2, 0.3: precision 1; the other seven: 10 of 13, the best from there on.
    assert result["value"] == pytest.approx(100 * (4 + 7 * 10 / 13) / 11)


def test_map_interval_is_that_of_repeated_samples():
    """A resample with weights must be what copying its samples gives."""
    random = np.random.default_rng(3)
    scores, targets = random.integers(0, 9, 40) / 9, random.random(40) < 0.4
    weights = np.bincount(random.integers(40, size=40), minlength=40)
    ranking = metrics_scores._Ranking(scores, targets)
    copied = brute_force_11_points(np.repeat(scores, weights), np.repeat(targets, weights))
    assert ranking.eleven_points(weights.astype(float)) == pytest.approx(copied)


def test_equal_scores_give_chance():
    targets = np.array([1, 0, 0, 0], bool)
    flat = np.ones(4)
    result = metrics_scores.mean_average_precision_11(flat[:, None], targets[:, None])
    assert result["value"] == pytest.approx(100 * (1 + 10 / 4) / 11)
    assert metrics_scores.area_under_roc(flat, targets)["value"] == 50


@pytest.mark.parametrize("seed", range(3))
def test_auc_equals_scikit_learn_with_ties(seed):
    random = np.random.default_rng(seed)
    positive, scores = random.random(80) < 0.3, random.integers(0, 9, 80) / 9
    result = metrics_scores.area_under_roc(scores, positive)
    assert result["value"] == pytest.approx(100 * roc_auc_score(positive, scores))
    assert result["ci95"][0] < result["value"] < result["ci95"][1]
    weights = np.bincount(random.integers(80, size=80), minlength=80).astype(float)
    expected = roc_auc_score(positive, scores, sample_weight=weights)
    assert metrics_scores._Ranking(scores, positive).area(weights) == pytest.approx(expected)


def test_nothing_to_measure_and_nan_are_refused():
    with pytest.raises(DataError, match="no class has a positive"):
        metrics_scores.mean_average_precision_11(np.ones((3, 2)), np.zeros((3, 2), bool))
    for one in (np.ones(3, bool), np.zeros(3, bool)):
        with pytest.raises(DataError, match="both classes"):
            metrics_scores.area_under_roc(np.arange(3.0), one)
    with pytest.raises(DataError, match="hateful-memes: 1 scores are NaN"):
        metrics_scores.check_finite(np.array([0.0, np.nan]), "hateful-memes")


def test_probabilities_are_softmax_of_a_hundred_cosines():
    images = torch.nn.functional.normalize(torch.randn(4, 6), dim=1)
    classifier = torch.nn.functional.normalize(torch.randn(3, 6), dim=1)
    logits = 100 * (images.double() @ classifier.double().T).numpy()
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    got = metrics_scores.probabilities(Products(images, classifier).whole())
    np.testing.assert_allclose(got, expected, rtol=1e-12)
