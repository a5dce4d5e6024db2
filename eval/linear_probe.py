"""Linear probe on frozen features: `python -m eval.linear_probe --checkpoint RUN --datasets
quickstart --output DIR`."""

import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from eval import cli, metrics, sources
from eval.features import Extractor
from loaders.errors import DataError, run_cli

# Inverse regularisation strengths: 97 points, 8 per decade, as wide as the CLIP paper's search.
C_GRID = np.logspace(-6, 6, 97)
VALIDATION_SHARE = 0.2
MAX_ITERATIONS = 1000


def probe(c: float) -> Pipeline:
    """Standardisation by the training part's mean and deviation, then multinomial logistic
    regression with inverse strength `c` of the L2 penalty (L-BFGS)."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=MAX_ITERATIONS))


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


def search_c(features: np.ndarray, labels: np.ndarray) -> float:
    """The C of `C_GRID` with the best top-1 on the validation part; features (n, W), labels (n,).

    Coarse to fine like the CLIP paper's (Radford et al. 2021, appendix A.3): every 16th point,
    then the two neighbours of the best at distance 8, 4, 2 and 1. Ties go to the smaller C.
    """
    held_out = validation_mask(labels)
    score: dict[int, float] = {}

    def best_of(points) -> int:
        for point in points:
            if 0 <= point < len(C_GRID) and point not in score:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)  # the refit reports it
                    model = probe(C_GRID[point]).fit(features[~held_out], labels[~held_out])
                score[point] = model.score(features[held_out], labels[held_out])
        return max(sorted(score), key=score.__getitem__)

    best = best_of(range(0, len(C_GRID), 16))
    for distance in (8, 4, 2, 1):
        best = best_of((best - distance, best + distance))
    return float(C_GRID[best])


def evaluate(extractor: Extractor, row: sources.EvalDataset) -> cli.Outcome | None:
    """Top-1 and mean per-class recall of a logistic regression on `pooled` image features.

    A test sample whose class has no training sample counts as an error.
    """
    train = sources.EvalSplit(row, "train", extractor.size)
    test = sources.EvalSplit(row, "test", extractor.size)
    train_features, test_features = extractor.images(train), extractor.images(test)
    if train_features is None:
        return None
    for features in (train_features, test_features):
        if not features["pooled"].isfinite().all():
            raise DataError(f"{row.name}: image features are not finite, the run has diverged")
    x = train_features["pooled"].double().numpy()
    c = search_c(x, train.labels)
    model = probe(c).fit(x, train.labels)
    correct = model.predict(test_features["pooled"].double().numpy()) == test.labels
    _, names = test.class_names()
    return cli.Outcome(
        {
            "top1": metrics.hit_rate(correct),
            "mean_per_class": metrics.group_mean(correct, test.labels),
        },
        classes=len(names),
        protocol=(
            "logistic regression (L-BFGS) on the image features before projection, standardised "
            f"by the training part; C = {c:.3g} from a seeded 20 % of the training part, then "
            f"refitted on all of it: {len(train)} train, {len(test)} test"
        ),
        digest=None,
    )


def main(argv: Sequence[str] | None = None, registry=sources.REGISTRY) -> None:
    """Command line; `registry` is another datasets.yaml."""
    cli.run("linear_probe", "Linear probe on frozen features.", evaluate, argv, registry)


if __name__ == "__main__":
    run_cli(main)
