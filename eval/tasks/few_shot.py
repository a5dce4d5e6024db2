"""Few-shot subsets of a training set, the mean over their seeds, and what their rows are called."""

import random
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import stats


def class_lists(targets: np.ndarray) -> list[list[int]]:
    """Class indices of every sample, from indices (n,) or from a 0/1 matrix (n, K)."""
    if targets.ndim == 1:
        return [[int(label)] for label in targets]
    return [np.flatnonzero(row).tolist() for row in targets]


def subset(targets: np.ndarray, classes: int, shots: int, seed: int) -> np.ndarray:
    """Indices of a subset with `shots` samples of every class, in the order of drawing.

    The rule is that of vision-datasets 0.2.17 (DatasetManifest.sample_few_shot_subset), from which
    ELEVATER takes its subsets: Python's `random.Random(seed)` shuffles all samples, and one after
    the other is taken while one of its classes lacks samples, until no class does. For samples of
    several classes: while the rarest of them is at most half full, or the most frequent at most
    half over. Samples without a class are taken up to `shots`. Equal input order therefore gives
    ELEVATER's very subset. A class with fewer samples gives all that it has.

    Args:
        targets: class indices (n,), or a 0/1 matrix (n, K).
    """
    order = list(range(len(targets)))
    random.Random(seed).shuffle(order)
    wanted = class_lists(targets)
    taken, of_class, without_class = [], np.zeros(classes, dtype=int), 0
    for i in order:
        have = of_class[wanted[i]]
        if not wanted[i]:
            take, without_class = without_class < shots, without_class + 1
        else:
            take = have.min() < shots and (have.min() <= shots / 2 or have.max() <= 1.5 * shots)
        if take:
            taken.append(i)
            of_class[wanted[i]] += 1
        if wanted[i] and of_class.min() >= shots:
            break
    return np.array(taken)


def over_seeds(results: Sequence[dict[str, dict]], seeds: Sequence[int]) -> dict[str, dict]:
    """Metrics of one subset each -> their mean under the metric's own name, then one per seed.

    The mean's interval is Student's 95 % over the seeds: it says how much the choice of the
    training samples matters, not how large the test set is. Needs two seeds or more.
    """
    found = {}
    for name in results[0]:
        values = np.array([result[name]["value"] for result in results])
        if len(values) > 1:
            half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
            interval = [max(0.0, values.mean() - half), min(100.0, values.mean() + half)]
            found[name] = {
                "value": float(values.mean()),
                "ci95": [float(end) for end in interval],
                "n": results[0][name]["n"],
            }
        for seed, result in zip(seeds, results, strict=True):
            found[f"{name}_seed{seed}"] = result[name]
    return found


def subsets(
    targets: np.ndarray, classes: int, all_shots: Sequence[int] | None, seeds: Sequence[int]
) -> Iterator[tuple[int | None, list[np.ndarray]]]:
    """(shots, training indices per seed) for each of `all_shots`; without any the full-shot run,
    (None, [all indices]). `targets` are those of `subset`."""
    if not all_shots:
        yield None, [np.arange(len(targets))]
    for shots in all_shots or []:
        yield shots, [subset(targets, classes, shots, seed) for seed in seeds]


def label(
    task: str, protocol: str, shots: int | None, results: list[dict], seeds: Sequence[int]
) -> tuple[str, str, dict[str, dict]]:
    """Task name, protocol and metrics of a full-shot or few-shot result."""
    if shots is None:
        return task, protocol, results[0]
    names = " ".join(map(str, seeds))
    protocol += (
        f"; {shots} training samples a class, drawn by the rule of vision-datasets 0.2.17 from the "
        f"order in which the set is stored, seeds {names}; interval of the mean: Student's t over "
        "the seeds"
    )
    return f"{task}_{shots}shot", protocol, over_seeds(results, seeds)
