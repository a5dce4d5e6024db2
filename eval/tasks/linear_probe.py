"""Logistic regression on frozen features: the protocols `standardised` and `clip` of
`eval.linear_probe`; the third, `elevater`, is `eval.tasks.elevater_probe`."""

import argparse
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from eval.sources import common_classes
from eval.sources.registry import EvalDataset
from eval.sources.splits import EvalSplit
from eval.tasks import few_shot, metrics, metrics_scores
from eval.tasks.features import Extractor, finite_images
from eval.tasks.outcome import Outcome
from loaders.errors import DataError
from loaders.progress import Progress

# Inverse regularisation strengths: 97 points, 8 per decade, as wide as the CLIP paper's search.
C_GRID = np.logspace(-6, 6, 97)
VALIDATION_SHARE = 0.2
MAX_ITERATIONS = 1000
TASKS = {"standardised": "linear_probe", "clip": "linear_probe_clip"}


def probe(c: float, standardise: bool = True) -> Pipeline:
    """Multinomial logistic regression with inverse strength `c` of the L2 penalty (L-BFGS), after
    standardisation by the training part's mean and deviation if asked for."""
    steps = [StandardScaler()] if standardise else []
    return make_pipeline(*steps, LogisticRegression(C=c, max_iter=MAX_ITERATIONS))


def validation_mask(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """(n,) bool, True = held out: a seeded fifth of every class, rounded down.

    A class with fewer than 5 samples stays whole in the fitting part. If that leaves no
    validation sample, raises DataError.
    """
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held_out[members[: int(VALIDATION_SHARE * len(members))]] = True
    if not held_out.any():
        raise DataError("linear probe: no class has 5 training samples, nothing to validate on")
    return held_out


def search_c(
    features: np.ndarray,
    labels: np.ndarray,
    standardise: bool = True,
    held_out: np.ndarray | None = None,
) -> float:
    """The C of `C_GRID` with the best top-1 on the validation part; features (n, W), labels (n,).

    Coarse to fine like the CLIP paper's (Radford et al. 2021, appendix A.3): every 16th point,
    then the two neighbours of the best at distance 8, 4, 2 and 1. Ties go to the smaller C.
    `held_out` (n,) bool marks the validation part, `validation_mask` if absent.
    """
    held_out = validation_mask(labels) if held_out is None else held_out
    score: dict[int, float] = {}
    bar = Progress(desc="search of C", unit="fit", leave=False)

    def best_of(points) -> int:
        for point in points:
            if 0 <= point < len(C_GRID) and point not in score:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)  # the refit reports it
                    model = probe(C_GRID[point], standardise)
                    model.fit(features[~held_out], labels[~held_out])
                score[point] = model.score(features[held_out], labels[held_out])
                bar.update()
        return max(sorted(score), key=score.__getitem__)

    best = best_of(range(0, len(C_GRID), 16))
    for distance in (8, 4, 2, 1):
        best = best_of((best - distance, best + distance))
    bar.close()
    return float(C_GRID[best])


def regress(
    x: np.ndarray,
    y: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    wanted: Sequence[str],
    standardise: bool,
    held_out: np.ndarray | None = None,
) -> tuple[dict[str, dict], float]:
    """Metrics `wanted` of a logistic regression with the C that its search prefers, refitted on all
    of x, and that C. A test sample whose class has no training sample counts as an error."""
    c = search_c(x, y, standardise, held_out)
    model = probe(c, standardise).fit(x, y)
    correct = model.predict(x_test) == y_test
    found = {
        "top1": metrics.hit_rate(correct),
        "mean_per_class": metrics.group_mean(correct, y_test),
    }
    if "roc_auc" in wanted:
        positive = y_test == model.classes_[1]
        found["roc_auc"] = metrics_scores.area_under_roc(model.decision_function(x_test), positive)
    return {name: found[name] for name in wanted}, c


def open_labelled(
    row: EvalDataset, fitted: Sequence[str], crop: int
) -> tuple[dict[str, EvalSplit], common_classes.CommonClasses]:
    """`common_classes.open_splits`; DataError for several labels per image, which a regression
    cannot take."""
    splits, classes = common_classes.open_splits(row, fitted, crop)
    if classes.multilabel:
        raise DataError(f"{row.name}: several labels per image; use --protocol elevater")
    return splits, classes


def evaluate(extractor: Extractor, row: EvalDataset) -> Outcome | None:
    """Top-1 and mean per-class recall of a logistic regression on standardised `pooled` image
    features, among the classes of `common_classes.meet`."""
    splits, classes = open_labelled(row, ("train",), extractor.size)
    features = finite_images(extractor, splits)
    if features is None:
        return None
    x, x_test = (features[name]["pooled"].double().numpy() for name in ("train", "test"))
    y, y_test = classes.targets["train"], classes.targets["test"]
    results, c = regress(x, y, x_test, y_test, row.tasks["linear_probe"], standardise=True)
    return Outcome(
        results,
        classes=len(classes.names),
        protocol=(
            "logistic regression (L-BFGS) on the image features before projection, standardised "
            f"by the training part; C = {c:.3g} from a seeded 20 % of the training part, then "
            f"refitted on all of it: {len(y)} train, {len(y_test)} test"
        ),
        digest=None,
    )


def evaluate_protocol(
    extractor: Extractor, row: EvalDataset, options: argparse.Namespace
) -> Iterator[tuple[str, Outcome]]:
    """CLIP's protocol, or the standardised one with few shots."""
    has_validation = "val" in row.splits and options.protocol == "clip" and not options.shots
    fitted = ("train", "val") if has_validation else ("train",)
    splits, classes = open_labelled(row, fitted, extractor.size)
    features = finite_images(extractor, splits)
    if features is None:
        return
    x = np.concatenate([features[name]["pooled"].double().numpy() for name in fitted])
    y = np.concatenate([classes.targets[name] for name in fitted])
    held_out = np.arange(len(y)) >= len(splits["train"]) if has_validation else None
    x_test, y_test = features["test"]["pooled"].double().numpy(), classes.targets["test"]
    standardise = options.protocol == "standardised"
    candidates, wanted = len(classes.names), row.tasks["linear_probe"]
    for shots, chosen in few_shot.subsets(y, candidates, options.shots, options.seeds):
        pairs = [regress(x[i], y[i], x_test, y_test, wanted, standardise, held_out) for i in chosen]
        chosen_c = ", ".join(f"{c:.3g}" for _, c in pairs)
        where = "the validation split" if has_validation else "a seeded 20 % of the training part"
        protocol = (
            f"{options.protocol} protocol: logistic regression (L-BFGS, at most {MAX_ITERATIONS} "
            "iterations) on the image features before projection, "
            f"{'standardised by the training part' if standardise else 'not standardised'}; "
            f"C = {chosen_c} (97 points, 1e-6 to 1e6, coarse to fine) from {where}, then refitted "
            f"on both: {len(chosen[0])} train, {len(y_test)} test"
        )
        results = [result for result, _ in pairs]
        task, protocol, results = few_shot.label(
            TASKS[options.protocol], protocol, shots, results, options.seeds
        )
        yield task, Outcome(results, candidates, protocol, None)
