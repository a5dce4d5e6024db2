"""k-nearest-neighbour classification, the task of `eval.knn`.

The weighted vote of DINO's evaluator (facebookresearch/dino, eval_knn.py, after Wu et al. 2018):
the 20 training images with the highest cosine vote for their class with weight exp(cosine / 0.07).
"""

import numpy as np
import torch
import torch.nn.functional as F

from eval.sources import common_classes
from eval.sources.registry import EvalDataset
from eval.tasks import metrics
from eval.tasks.features import Extractor
from eval.tasks.metrics_scores import check_finite
from eval.tasks.outcome import Outcome
from loaders.errors import DataError

NEIGHBOURS = 20
TEMPERATURE = 0.07
WHAT = {"feature": "image embedding", "pooled": "pooled image feature"}


def votes(train: torch.Tensor, labels: np.ndarray, test: torch.Tensor, classes: int) -> np.ndarray:
    """Sum of exp(cosine / 0.07) over the nearest neighbours per class, (n, classes) float64.

    train (m, D) with labels (m,) in 0..classes-1, test (n, D). With fewer than 20 training images
    all vote. At most `metrics.SCORES` cosines are held.
    """
    reference = F.normalize(train.double(), dim=1).T
    queries, k = F.normalize(test.double(), dim=1), min(NEIGHBOURS, len(train))
    of = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    result = torch.zeros(len(test), classes, dtype=torch.float64)
    for part in torch.arange(len(test)).split(max(1, metrics.SCORES // len(train))):
        cosine, neighbour = (queries[part] @ reference).topk(k, dim=1)
        weight = torch.exp(cosine / TEMPERATURE)
        result[part] = result[part].scatter_add(1, of[neighbour], weight)
    return result.numpy()


def vote_ranks(ballot: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Rank of the true class (n,): how many others have at least as many votes. A class without
    any vote comes last, so it is never right."""
    own = np.take_along_axis(ballot, true[:, None], axis=1)
    ranks = (ballot >= own).sum(axis=1) - 1
    return np.where(own[:, 0] > 0, ranks, ballot.shape[1])


def evaluate(extractor: Extractor, row: EvalDataset) -> Outcome | None:
    """Top-1, top-5 and mean per-class recall of the vote, on the embeddings that the loss compares.

    A model that compares tokens has no such embedding, and neither has one that was trained without
    texts, whose projection is that of its first step; there it is the feature that the linear probe
    takes, the trunk's pooled one.

    Classes of the two splits are those of `common_classes.meet`; a test image whose class has no
    training image counts as an error.
    """
    splits, classes = common_classes.open_splits(row, ("train",), extractor.size)
    if classes.multilabel:
        raise DataError(f"{row.name}: one label per image is needed")
    train, test = splits["train"], splits["test"]
    reference, queries = extractor.images(train), extractor.images(test)
    if reference is None:
        return None
    kind = extractor.embedding
    for features in (reference, queries):
        check_finite(features[kind].numpy(), row.name)
    labels, true, candidates = classes.targets["train"], classes.targets["test"], len(classes.names)
    ballot = votes(reference[kind], labels, queries[kind], candidates)
    return Outcome(
        metrics.classification_metrics(vote_ranks(ballot, true), true),
        classes=candidates,
        protocol=(
            f"{NEIGHBOURS} nearest neighbours by cosine of the {WHAT[kind]}, votes weighted by "
            f"exp(cosine / {TEMPERATURE}) as in DINO, ties count as errors: {len(train)} train, "
            f"{len(test)} test"
        ),
        digest=None,
    )
