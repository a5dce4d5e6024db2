"""Metrics and their 95 % intervals. Everything is a rank first: zero-shot is retrieval of a class.

Ties are pessimistic: a negative whose score equals the positive's counts as being before it, so a
collapsed model (all scores equal) scores 0 and not 100.
"""

import numpy as np
import torch

from eval.tasks.scores import Products, Scores

# The 97.5 % quantile of the standard normal distribution: two-sided 95 %.
NORMAL_QUANTILE = 1.959963984540054
BOOTSTRAP_RESAMPLES = 1000
SCORES = 1 << 24  # held at once by `ranks`: 128 MiB in float64


def positive_ranks(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    pair_query: np.ndarray,
    pair_candidate: np.ndarray,
    chunk: int | None = None,
    name: str = "",
) -> np.ndarray:
    """`ranks` by the products of queries (n, D) and candidates (m, D), float.

    Raises DataError for non-finite features, naming the data set `name`.
    """
    return ranks(Products(queries, candidates, name), pair_query, pair_candidate, chunk)


def ranks(
    scores: Scores,
    pair_query: np.ndarray,
    pair_candidate: np.ndarray,
    chunk: int | None = None,
) -> np.ndarray:
    """Rank of the best positive of every query: 0 = no negative scores as high as it does.

    Scores are taken `chunk` queries at a time (default: as many as make SCORES numbers), so n x m
    is never held. `pair_query` and `pair_candidate` (p,) int list the positives as pairs; a query
    may have several, and the best one counts. Returns (n,) int64: the number of negatives whose
    score is at least the best positive's.

    Raises ValueError for a query without a positive.
    """
    n, m = scores.shape
    chunk = chunk or max(1, SCORES // m)
    # Each pair once, by query: a positive listed twice must not be taken off twice below.
    pairs = np.unique(np.asarray(pair_query, dtype=np.int64) * m + np.asarray(pair_candidate))
    pair_query, pair_candidate = pairs // m, pairs % m
    without = np.flatnonzero(np.bincount(pair_query, minlength=n) == 0)
    if len(without):
        raise ValueError(f"{len(without)} queries have no positive, the first is {without[0]}")

    found = np.empty(n, dtype=np.int64)
    # One buffer: a new product would stand beside the one before it.
    buffer = torch.empty(min(chunk, n), m, dtype=torch.float64)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        part = buffer[: stop - start]
        scores.fill(start, stop, part)
        first, last = np.searchsorted(pair_query, [start, stop])
        rows = torch.from_numpy(pair_query[first:last] - start)
        own = part[rows, torch.from_numpy(pair_candidate[first:last])]
        best = torch.full((stop - start,), -torch.inf, dtype=part.dtype)
        best.scatter_reduce_(0, rows, own, "amax")
        # NumPy counts without a copy; torch would make an int64 of every comparison first.
        as_high = torch.from_numpy(np.count_nonzero((part >= best[:, None]).numpy(), axis=1))
        # The positives that score as high as the best one, itself included, are no rivals.
        as_high -= torch.bincount(rows[own >= best[rows]], minlength=stop - start)
        found[start:stop] = as_high.numpy()
    return found


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of the proportion hits / n, as fractions (Wilson 1927)."""
    if n <= 0:
        raise ValueError("an interval needs at least one sample")
    z2 = NORMAL_QUANTILE**2
    p = hits / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_QUANTILE / (1 + z2 / n) * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def mean_of_group_means(values: np.ndarray, groups: np.ndarray) -> float:
    """Mean over groups of the mean of `values` (n,) in each; groups (n,) int, empty ones ignored.

    With values = "prediction is right" and groups = labels this is the mean per-class recall
    (scikit-learn's balanced accuracy).
    """
    return float(np.mean([np.mean(values[groups == group]) for group in np.unique(groups)]))


def bootstrap_interval(
    values: np.ndarray, groups: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of `mean_of_group_means`, 1000 resamples of all samples.

    The draw is not stratified: a group of one or two samples drops out of many resamples, and so
    widens the interval by as much as the mean hangs on it.
    """
    generator = np.random.default_rng(seed)
    values, n = np.asarray(values, dtype=np.float64), len(values)
    groups = np.unique(groups, return_inverse=True)[1]
    means = np.empty(BOOTSTRAP_RESAMPLES)
    for i in range(BOOTSTRAP_RESAMPLES):
        drawn = generator.integers(n, size=n)
        counts = np.bincount(groups[drawn])
        sums = np.bincount(groups[drawn], weights=values[drawn])
        means[i] = (sums[counts > 0] / counts[counts > 0]).mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def hit_rate(hits: np.ndarray) -> dict:
    """Proportion of true entries of `hits` (n,) bool, in percent, with Wilson's interval and n."""
    n, count = len(hits), int(np.sum(hits))
    low, high = wilson_interval(count, n)
    return {"value": 100 * count / n, "ci95": [100 * low, 100 * high], "n": n}


def group_mean(values: np.ndarray, groups: np.ndarray) -> dict:
    """`mean_of_group_means` in percent with its bootstrap interval and n."""
    low, high = bootstrap_interval(values, groups)
    value = mean_of_group_means(values, groups)
    return {"value": 100 * value, "ci95": [100 * low, 100 * high], "n": len(values)}


def classification_metrics(ranks: np.ndarray, labels: np.ndarray) -> dict[str, dict]:
    """top1, top5, their mean and mean_per_class from the rank of the true class (n,) and the labels
    (n,)."""
    return {
        "top1": hit_rate(ranks < 1),
        "top5": hit_rate(ranks < 5),
        "mean_top1_top5": group_mean(((ranks < 1) + 1.0 * (ranks < 5)) / 2, np.zeros_like(labels)),
        "mean_per_class": group_mean(ranks < 1, labels),
    }


def retrieval_metrics(image_ranks: np.ndarray, text_ranks: np.ndarray) -> dict[str, dict]:
    """R@1, R@5, R@10 in both directions, `rsum`, the sum of the six, and `mean_recall`, rsum / 6.

    `image_ranks` (number of images,) are those of image queries against texts, `text_ranks`
    (number of texts,) the reverse.
    """
    result = {}
    for name, ranks in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
        for k in (1, 5, 10):
            result[f"{name}_r{k}"] = hit_rate(ranks < k)
    both = np.concatenate([image_ranks, text_ranks])
    share = np.mean([both < k for k in (1, 5, 10)], axis=0)
    direction = np.repeat([0, 1], [len(image_ranks), len(text_ranks)])
    mean = result["mean_recall"] = group_mean(share, direction)
    result["rsum"] = {
        "value": 6 * mean["value"],
        "ci95": [6 * bound for bound in mean["ci95"]],
        "n": mean["n"],
    }
    return result
