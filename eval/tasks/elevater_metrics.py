"""ELEVATER's four metrics on the scores of a linear head, in percent."""

import numpy as np
from sklearn.metrics import roc_auc_score

from eval.tasks import metrics, metrics_scores
from loaders.errors import ConfigError

NAMES = ("top1", "mean_per_class", "map_11_point", "roc_auc")


def value(name: str, scores: np.ndarray, targets: np.ndarray) -> float:
    """One metric, a fraction.

    Args:
        name: of `NAMES`.
        scores: (n, K); for `roc_auc` K = 2.
        targets: class indices (n,); for `map_11_point` a 0/1 matrix (n, K).
    """
    if name == "map_11_point":
        return metrics_scores.map_11_point(scores, targets)
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
    """`value` in percent with its 95 % interval and n, as a result row holds it."""
    if name == "map_11_point":
        return metrics_scores.mean_average_precision_11(scores, targets.astype(bool))
    right = scores.argmax(axis=1) == targets
    if name == "top1":
        return metrics.hit_rate(right)
    if name == "mean_per_class":
        return metrics.group_mean(right, targets)
    return metrics_scores.area_under_roc(scores[:, 1] - scores[:, 0], targets == 1)
