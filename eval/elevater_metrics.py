"""ELEVATER's four metrics on the scores of a linear head, in percent."""

import numpy as np
from sklearn.metrics import precision_recall_curve, roc_auc_score

from eval import metrics, metrics_scores
from loaders.errors import ConfigError

NAMES = ("top1", "mean_per_class", "map_11_point", "roc_auc")
# Thresholds of the recall, in this order and with these roundings in vision-evaluation 0.2.9.
RECALLS = np.linspace(1, 0, 11)


def eleven_point_precision(targets: np.ndarray, scores: np.ndarray) -> float:
    """Mean over the recalls 1, 0.9, …, 0 of the highest precision at that recall or a higher one.

    As vision-evaluation 0.2.9 (MeanAveragePrecisionNPointsEvaluator) has it, ELEVATER's metric for
    VOC 2007: scikit-learn's curve begins with precision 1 at recall 0, which always counts.
    """
    precision, recall, _ = precision_recall_curve(targets, scores)
    return float(np.mean([precision[recall >= level].max() for level in RECALLS]))


def value(name: str, scores: np.ndarray, targets: np.ndarray) -> float:
    """One metric, a fraction.

    Args:
        name: of `NAMES`.
        scores: (n, K); for `roc_auc` K = 2.
        targets: class indices (n,); for `map_11_point` a 0/1 matrix (n, K).
    """
    if name == "map_11_point":
        columns = range(targets.shape[1])
        return float(
            np.mean([eleven_point_precision(targets[:, k], scores[:, k]) for k in columns])
        )
    if name == "roc_auc":
        # The probability of class 1 of the softmax over two classes rises with the difference.
        return float(roc_auc_score(targets, scores[:, 1] - scores[:, 0]))
    right = scores.argmax(axis=1) == targets
    if name == "mean_per_class":
        return metrics.mean_of_group_means(right, targets)
    if name == "top1":
        return float(right.mean())
    raise ConfigError(f"metric {name!r} is not one of ELEVATER's: {', '.join(NAMES)}")


def with_interval(name: str, scores: np.ndarray, targets: np.ndarray) -> dict:
    """`value` in percent with its 95 % interval and n, as a result row holds it.

    That of `map_11_point` is a percentile bootstrap over the samples; resamples that leave a class
    without a positive are drawn again.
    """
    right = scores.argmax(axis=1) == targets if targets.ndim == 1 else None
    if name == "top1":
        return metrics.hit_rate(right)
    if name == "mean_per_class":
        return metrics.group_mean(right, targets)
    if name == "roc_auc":
        return metrics_scores.area_under_roc(scores[:, 1] - scores[:, 0], targets == 1)
    generator = np.random.default_rng(0)
    drawn: list[float] = []
    while len(drawn) < metrics.BOOTSTRAP_RESAMPLES:
        rows = generator.integers(len(targets), size=len(targets))
        if targets[rows].any(axis=0).all():
            drawn.append(value(name, scores[rows], targets[rows]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    ends = [100 * float(low), 100 * float(high)]
    return {"value": 100 * value(name, scores, targets), "ci95": ends, "n": len(targets)}
