"""Which classes of a labelled set are taken for which."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Confusions:
    """Of one checkpoint on the n pictures that have a label and can be read.

    Attributes:
        n, right: pictures, and those of them whose class is predicted.
        pairs: (true class, predicted class, pictures), the most frequent first.
    """

    n: int
    right: int
    pairs: list[tuple[int, int, int]]


def confusions(labels: np.ndarray, predicted: np.ndarray) -> Confusions:
    """Confusions of labels (n,) and predictions (n,), classes by number; -1 is none."""
    known = (labels >= 0) & (predicted >= 0)
    wrong = known & (labels != predicted)
    classes = int(max(labels.max(initial=0), predicted.max(initial=0))) + 1
    found, counts = np.unique(labels[wrong] * classes + predicted[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    pairs = [(*divmod(int(found[i]), classes), int(counts[i])) for i in order]
    return Confusions(int(known.sum()), int((known & ~wrong).sum()), pairs)


def samples(labels: np.ndarray, predicted: np.ndarray, true: int, said: int) -> np.ndarray:
    """Numbers of the pictures of the class `true` that are predicted to be `said`."""
    return np.flatnonzero((labels == true) & (predicted == said))
