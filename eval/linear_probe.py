"""Linear probe on frozen features: `python -m eval.linear_probe --checkpoint RUN --datasets
quickstart --output DIR`.

Protocols (`--protocol`), each with rows of its own task name:

- `standardised` (linear_probe): logistic regression on standardised features; the default, and what
  the quickstart runs.
- `clip` (linear_probe_clip): CLIP's (Radford et al. 2021, appendix A.3): the same on the features
  as they come, with the validation split where the set has one.
- `elevater` (linear_probe_elevater): `eval.elevater_probe`.

With `--shots 5 20 50 --seeds 0 1 2` the training set is cut to so many samples a class and the task
name ends in `_5shot`.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put eval/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from eval import cli, elevater_probe, few_shot, metrics, metrics_scores, protocols, rows
from eval.features import Extractor, Features
from eval.sources import common_classes
from eval.sources.registry import REGISTRY, EvalDataset
from eval.sources.splits import EvalSplit
from loaders.errors import CommandParser, ConfigError, DataError, run_cli

# Inverse regularisation strengths: 97 points, 8 per decade, as wide as the CLIP paper's search.
C_GRID = np.logspace(-6, 6, 97)
VALIDATION_SHARE = 0.2
MAX_ITERATIONS = 1000
TASKS = {
    "standardised": "linear_probe",
    "clip": "linear_probe_clip",
    "elevater": "linear_probe_elevater",
}
# ELEVATER searches on at most so many samples of a class (commands/linear_probe.py).
SEARCH_LIMITS = {"patch-camelyon": 10_000}
INITIAL_DEVIATION = 0.02


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

    def best_of(points) -> int:
        for point in points:
            if 0 <= point < len(C_GRID) and point not in score:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)  # the refit reports it
                    model = probe(C_GRID[point], standardise)
                    model.fit(features[~held_out], labels[~held_out])
                score[point] = model.score(features[held_out], labels[held_out])
        return max(sorted(score), key=score.__getitem__)

    best = best_of(range(0, len(C_GRID), 16))
    for distance in (8, 4, 2, 1):
        best = best_of((best - distance, best + distance))
    return float(C_GRID[best])


def read(extractor: Extractor, splits: dict[str, EvalSplit]) -> dict[str, Features] | None:
    """Finite image features of every split; None off the main process."""
    features = {name: extractor.images(split) for name, split in splits.items()}
    if features["test"] is None:
        return None
    for name, found in features.items():
        if not all(value.isfinite().all() for value in found.values()):
            row = splits[name].row
            raise DataError(f"{row.name}: image features are not finite, the run has diverged")
    return features


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


def evaluate(extractor: Extractor, row: EvalDataset) -> cli.Outcome | None:
    """Top-1 and mean per-class recall of a logistic regression on standardised `pooled` image
    features, among the classes of `common_classes.meet`."""
    splits, classes = open_labelled(row, ("train",), extractor.size)
    features = read(extractor, splits)
    if features is None:
        return None
    x, x_test = (features[name]["pooled"].double().numpy() for name in ("train", "test"))
    y, y_test = classes.targets["train"], classes.targets["test"]
    results, c = regress(x, y, x_test, y_test, row.tasks["linear_probe"], standardise=True)
    return cli.Outcome(
        results,
        classes=len(classes.names),
        protocol=(
            "logistic regression (L-BFGS) on the image features before projection, standardised "
            f"by the training part; C = {c:.3g} from a seeded 20 % of the training part, then "
            f"refitted on all of it: {len(y)} train, {len(y_test)} test"
        ),
        digest=None,
    )


def subsets(
    targets: np.ndarray, classes: int, options: argparse.Namespace
) -> Iterator[tuple[int | None, list[np.ndarray]]]:
    """(shots, training indices per seed); (None, [all of them]) for a full-shot run."""
    if not options.shots:
        yield None, [np.arange(len(targets))]
    for shots in options.shots or []:
        yield shots, [few_shot.subset(targets, classes, shots, seed) for seed in options.seeds]


def label(
    task: str, protocol: str, shots: int | None, results: list[dict], options: argparse.Namespace
) -> tuple[str, str, dict[str, dict]]:
    """Task name, protocol and metrics of a full-shot or few-shot result."""
    if shots is None:
        return task, protocol, results[0]
    seeds = " ".join(map(str, options.seeds))
    protocol += (
        f"; {shots} training samples a class, drawn by the rule of vision-datasets 0.2.17 from the "
        f"order in which the set is stored, seeds {seeds}; interval of the mean: Student's t over "
        "the seeds"
    )
    return f"{task}_{shots}shot", protocol, few_shot.over_seeds(results, options.seeds)


def evaluate_regression(
    extractor: Extractor, row: EvalDataset, options: argparse.Namespace
) -> Iterator[tuple[str, cli.Outcome]]:
    """CLIP's protocol, or the standardised one with few shots."""
    has_validation = "val" in row.splits and options.protocol == "clip" and not options.shots
    fitted = ("train", "val") if has_validation else ("train",)
    splits, classes = open_labelled(row, fitted, extractor.size)
    features = read(extractor, splits)
    if features is None:
        return
    x = np.concatenate([features[name]["pooled"].double().numpy() for name in fitted])
    y = np.concatenate([classes.targets[name] for name in fitted])
    held_out = np.arange(len(y)) >= len(splits["train"]) if has_validation else None
    x_test, y_test = features["test"]["pooled"].double().numpy(), classes.targets["test"]
    standardise = options.protocol == "standardised"
    candidates, wanted = len(classes.names), row.tasks["linear_probe"]
    for shots, chosen in subsets(y, candidates, options):
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
        task, protocol, results = label(TASKS[options.protocol], protocol, shots, results, options)
        yield task, cli.Outcome(results, candidates, protocol, None)


def initial_head(
    extractor: Extractor, test: EvalSplit, names: list[str], start: str
) -> tuple[torch.Tensor | None, str | None]:
    """Weights (K, D) to start from for the K classes `names`, `text` (with the templates of `test`)
    or `random`, and the digest of the prompts.

    Every process must call it; the text features are the main process's.
    """
    if start == "text":
        class_texts, templates = test.row.class_texts(names), test.templates()
        digest = rows.prompt_digest(class_texts, templates)
        return extractor.class_weights(class_texts, templates), digest
    generator = torch.Generator().manual_seed(0)
    shape = (len(names), extractor.model.embed_dim)
    return torch.randn(shape, generator=generator) * INITIAL_DEVIATION, None


def evaluate_elevater(
    extractor: Extractor, row: EvalDataset, options: argparse.Namespace
) -> Iterator[tuple[str, cli.Outcome]]:
    """ELEVATER's protocol; the first metric of the registry's row guides the search.

    The head has one output for each class of `common_classes.meet`: all that were trained.
    """
    splits, classes = common_classes.open_splits(row, ("train",), extractor.size)
    names, y, truth = classes.names, classes.targets["train"], classes.targets["test"]
    head, digest = initial_head(extractor, splits["test"], names, options.head_init)
    features = read(extractor, splits)
    if features is None:
        return
    device = extractor.accelerator.device
    x, x_test = (features[name]["feature"].to(device) for name in ("train", "test"))
    wanted = row.tasks["linear_probe"]
    head = head.to(device)
    for shots, chosen in subsets(y, len(names), options):
        results, pairs = [], []
        for indices in chosen:
            part, labels = x[indices], y[indices]
            limit = SEARCH_LIMITS.get(row.name)
            searched = slice(None)
            if limit and np.bincount(labels).max() > limit:  # two classes, one label an image
                # As the toolkit: a few-shot subset, with the seed of its configuration, 0.
                searched = few_shot.subset(labels, len(names), limit, seed=0)
            pairs.append(search_on(part[searched], labels[searched], head, wanted[0]))
            targets = torch.from_numpy(labels).to(device)
            results.append(
                elevater_probe.final(part, targets, head, pairs[-1], x_test, truth, wanted)
            )
        protocol = (
            "ELEVATER protocol: batch norm without affine part and a linear layer on the "
            f"normalised projected features, head from {options.head_init}, SGD; learning rate and "
            f"weight decay {', '.join(f'{r:.3g} {d:.3g}' for r, d in pairs)} by {wanted[0]} on the "
            f"first 20 % of each class, {elevater_probe.TRIAL_EPOCHS} epochs a trial; then "
            f"{elevater_probe.FINAL_EPOCHS} epochs on all: {len(chosen[0])} train, {len(truth)} "
            "test; best_epoch is chosen on the test set, as published"
        )
        task, protocol, metric_values = label(TASKS["elevater"], protocol, shots, results, options)
        yield task, cli.Outcome(metric_values, len(names), protocol, digest)


def search_on(
    features: torch.Tensor, labels: np.ndarray, head: torch.Tensor, metric: str
) -> tuple[float, float]:
    """`elevater_probe.search` with ELEVATER's tuning split."""
    targets = torch.from_numpy(labels).to(features.device)
    mask = elevater_probe.tuning_mask(labels)
    return elevater_probe.search(features, targets, mask, head, metric)


def options_parser() -> argparse.ArgumentParser:
    """Arguments beside those of every evaluation."""
    parser = CommandParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--protocol", choices=TASKS, default="standardised")
    parser.add_argument("--shots", type=int, nargs="+", help="training samples a class")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the subsets (default: 0 1 2)")
    parser.add_argument("--head-init", choices=("text", "random"), help="elevater (default: text)")
    return parser


def main(argv: Sequence[str] | None = None, registry=REGISTRY) -> None:
    """Command line; `registry` is another datasets.yaml."""
    options, rest, about = protocols.parse(
        "linear_probe", "Linear probe on frozen features.", options_parser(), argv
    )
    if options.seeds and not options.shots:
        raise ConfigError("--seeds draws few-shot subsets: it needs --shots")
    if options.head_init and options.protocol != "elevater":
        raise ConfigError("--head-init belongs to --protocol elevater")
    options.seeds, options.head_init = options.seeds or [0, 1, 2], options.head_init or "text"
    if options.protocol == "standardised" and not options.shots:
        cli.run("linear_probe", about, evaluate, rest, registry)
        return
    task = evaluate_elevater if options.protocol == "elevater" else evaluate_regression
    evaluate_options = partial(task, options=options)
    protocols.run("linear_probe", "linear_probe", about, evaluate_options, rest, registry)


if __name__ == "__main__":
    run_cli(main)
