"""Metrics of scores that are no ranks of one true class: 11-point mAP and ROC AUC.

Equal scores are one threshold in both, so a model whose scores are all equal gets an AUC of 50.
"""

from collections.abc import Callable

import numpy as np
import torch

from eval.tasks.metrics import BOOTSTRAP_RESAMPLES
from loaders.errors import DataError

RECALL_LEVELS = np.linspace(1, 0, 11)[:-1]  # with these roundings in vision-evaluation 0.2.9
LOGIT_SCALE = 100.0  # ELEVATER's evaluator: softmax over 100 x cosine, also for several labels


def probabilities(scores: torch.Tensor) -> np.ndarray:
    """Softmax over classes of 100 x the scores (n, K) float64, which lie in [-1, 1]."""
    return torch.softmax(LOGIT_SCALE * scores, dim=1).numpy()


def check_finite(scores: np.ndarray, name: str) -> None:
    """Raise DataError that names the data set `name` if a score is NaN or infinite."""
    bad = int((~np.isfinite(scores)).sum())
    if bad:
        raise DataError(
            f"{name}: {bad} scores are NaN or infinite: this checkpoint has diverged, evaluate an "
            "earlier one (RUN/checkpoints/step_*)"
        )


class _Ranking:
    """One class: samples by falling score, with the last place of every group of equal scores."""

    def __init__(self, scores: np.ndarray, positive: np.ndarray) -> None:
        self.order = np.argsort(-scores, kind="stable")
        ordered = scores[self.order]
        self.positive = positive[self.order].astype(np.float64)
        self.ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))

    def eleven_points(self, weights: np.ndarray) -> float:
        """11-point average precision with a weight per sample; NaN without a positive."""
        weights = weights[self.order]
        found = np.cumsum(weights * self.positive)[self.ends]
        seen = np.cumsum(weights)[self.ends]
        if found[-1] == 0:
            return np.nan
        precision = np.divide(found, seen, out=np.zeros_like(found), where=seen > 0)
        # The highest precision at this recall or a larger one.
        best = np.maximum.accumulate(precision[::-1])[::-1]
        first = np.searchsorted(found / found[-1], RECALL_LEVELS)
        # Recall 0 is reached by taking no sample at all, which counts as precision 1.
        return float((best[first].sum() + 1) / (len(RECALL_LEVELS) + 1))

    def area(self, weights: np.ndarray) -> float:
        """Area under the ROC curve with a weight per sample; NaN with one class only. The share of
        pairs that are in the right order, equal scores counting half."""
        weights = weights[self.order]
        found = np.cumsum(weights * self.positive)[self.ends]
        others = np.cumsum(weights * (1 - self.positive))[self.ends]
        if found[-1] == 0 or others[-1] == 0:
            return np.nan
        return float(np.trapezoid(np.append(0, found), np.append(0, others))) / (
            found[-1] * others[-1]
        )


def _rankings(scores: np.ndarray, targets: np.ndarray) -> list[_Ranking]:
    """Ranking of every class (a column) that has a positive; raises DataError if none has."""
    found = [_Ranking(s, t) for s, t in zip(scores.T, targets.T, strict=True) if t.any()]
    if not found:
        raise DataError("11-point mAP: no class has a positive sample")
    return found


def map_11_point(scores: np.ndarray, targets: np.ndarray) -> float:
    """The value of `mean_average_precision_11` alone, a fraction."""
    weights = np.ones(len(scores))
    return float(np.mean([r.eleven_points(weights) for r in _rankings(scores, targets)]))


def mean_average_precision_11(scores: np.ndarray, targets: np.ndarray, seed: int = 0) -> dict:
    """Mean over classes of the 11-point average precision, in percent, with interval and n.

    scores (n, K) float, targets (n, K) bool. Per class: the mean, over the recall levels 0, 0.1 …
    1, of the highest precision at that recall or above. As ELEVATER has it, by vision-evaluation
    0.2.9 (MeanAveragePrecisionNPointsEvaluator), where recall 0 always gives precision 1. Classes
    without a positive are left out. The interval is a percentile bootstrap of 1000 resamples of
    the images. Raises DataError without any positive.
    """
    rankings, n = _rankings(scores, targets), len(scores)

    def statistic(weights: np.ndarray) -> float:
        found = [ranking.eleven_points(weights) for ranking in rankings]
        kept = [value for value in found if not np.isnan(value)]
        return float(np.mean(kept)) if kept else np.nan

    return _with_interval(statistic, n, seed)


def area_under_roc(scores: np.ndarray, positive: np.ndarray, seed: int = 0) -> dict:
    """Area under the ROC curve in percent, with interval and n; scores (n,), positive (n,) bool.

    The interval is as in `mean_average_precision_11`, over the resamples that hold both classes.
    Raises DataError if all samples are of one class.
    """
    if positive.all() or not positive.any():
        raise DataError("ROC AUC needs samples of both classes, all are of one")
    return _with_interval(_Ranking(scores, positive).area, len(scores), seed)


def _with_interval(statistic: Callable[[np.ndarray], float], n: int, seed: int) -> dict:
    """Value of `statistic` (of a weight per sample) in percent, with interval and n; resamples
    without a value are left out."""
    generator = np.random.default_rng(seed)
    drawn = [
        statistic(np.bincount(generator.integers(n, size=n), minlength=n).astype(np.float64))
        for _ in range(BOOTSTRAP_RESAMPLES)
    ]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    value = statistic(np.ones(n))
    return {"value": 100 * value, "ci95": [100 * float(low), 100 * float(high)], "n": n}
