"""ELEVATER's linear probe on cached features: batch norm, linear layer, SGD, its search.

The protocol is that of Elevater_Toolkit_IC (vision_benchmark/evaluation/full_model_finetune.py,
feature.py): Li et al., ELEVATER, NeurIPS 2022. Since its backbone is frozen and its training images
are not augmented, training on features extracted once is the same mathematics. The trials of a
search share the order of the batches and the batch norm, so all of them are trained at once, as one
more axis of the weights.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from eval.sources import common_classes
from eval.sources.registry import EvalDataset
from eval.tasks import elevater_metrics, few_shot
from eval.tasks.features import Extractor, finite_images, initial_head
from eval.tasks.outcome import Outcome
from loaders.errors import ConfigError, DataError
from loaders.progress import Progress

TASK = "linear_probe_elevater"
LEARNING_RATES = np.logspace(-6, -1, 6)
WEIGHT_DECAYS = np.logspace(-6, 6, 97)
MOMENTUM = 0.9
BATCH = 64
TRIAL_EPOCHS = 10
FINAL_EPOCHS = 50
TUNING_SHARE = 0.2
# Largest number of weights trained at once: trials x classes x (features + 1).
WEIGHTS_AT_ONCE = 2**27
SEARCH_LIMITS = {"patch-camelyon": 10_000}  # samples of a class, in commands/linear_probe.py


@dataclass
class Heads:
    """T linear heads after the batch norm that they share: weight (T, K, D), bias (T, K)."""

    weight: Tensor
    bias: Tensor
    norm: torch.nn.BatchNorm1d

    @torch.no_grad()
    def scores(self, trial: int, features: Tensor) -> np.ndarray:
        """Logits (m, K) of one head, the batch norm with its running statistics."""
        normed = self.norm.eval()(features)
        return F.linear(normed, self.weight[trial], self.bias[trial]).cpu().numpy()


def tuning_mask(targets: np.ndarray) -> np.ndarray:
    """(n,) bool, True = tuning: of every class the first fifth in the order given, rounded up.

    `targets`: class indices (n,), or a 0/1 matrix (n, K). There, class after class, its first
    samples are set aside until a fifth of every class is; a sample counts for all its classes.
    """
    held_out = np.zeros(len(targets), dtype=bool)
    if targets.ndim == 1:
        for label in np.unique(targets):
            members = np.flatnonzero(targets == label)
            held_out[members[: math.ceil(len(members) * TUNING_SHARE)]] = True
        return held_out
    lacking = np.ceil(targets.sum(axis=0) * TUNING_SHARE)
    for k in range(targets.shape[1]):
        for i in np.flatnonzero(targets[:, k]):
            if lacking[k] <= 0:
                break
            if not held_out[i]:
                held_out[i] = True
                lacking -= targets[i]
    return held_out


def batches(n: int) -> Iterator[DataLoader]:
    """Epochs without end; each iterates over the batches of a new order of n samples.

    The order is the toolkit's, whose loader is seeded with 0 for every trial. A batch of one sample
    is left out, as there: batch norm cannot use it.
    """
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(range(n), BATCH, shuffle=True, generator=generator)
    while True:
        yield loader


def gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Gradient (T, B, K) of the mean loss by the logits (T, B, K) of each head.

    Cross-entropy for class indices (B,), binary cross-entropy for a 0/1 matrix (B, K).
    """
    if targets.ndim == 1:
        probability = logits.softmax(dim=-1)
        probability -= F.one_hot(targets, logits.shape[-1])
        return probability / len(targets)
    return (logits.sigmoid() - targets) / targets.numel()


@torch.no_grad()
def train(
    features: Tensor,
    targets: Tensor,
    head: Tensor,
    learning_rates: Tensor,
    weight_decays: Tensor,
    epochs: int,
) -> Iterator[Heads]:
    """Train T heads from the same start; yields them (not copies) after every epoch.

    SGD with momentum and without Nesterov's, constant learning rate; the decay acts on weight and
    bias, because the toolkit's list of exceptions is empty.

    Args:
        features: (n, D) float32. targets: indices (n,) int64 or a 0/1 matrix (n, K) float32.
        head: (K, D), the weight to start from; the bias starts at 0.
        learning_rates, weight_decays: (T,), one of each per head.
    """
    trials, device = len(learning_rates), features.device
    rate = learning_rates.to(device, torch.float32).view(-1, 1, 1)
    decay = weight_decays.to(device, torch.float32).view(-1, 1, 1)
    norm = torch.nn.BatchNorm1d(features.shape[1], affine=False).to(device)
    # The bias is one more column, of inputs 1: one gradient, one update.
    weight = F.pad(head.to(device, torch.float32), (0, 1)).repeat(trials, 1, 1)
    momentum = torch.zeros_like(weight)
    heads = Heads(weight[..., :-1], weight[..., -1], norm)
    for _, order in zip(range(epochs), batches(len(features)), strict=False):
        norm.train()
        for batch in order:
            if len(batch) == 1:
                continue
            batch = batch.to(device)
            x = F.pad(norm(features[batch]), (0, 1), value=1.0)
            logits = torch.einsum("bd,tkd->tbk", x, weight)
            step = torch.einsum("tbk,bd->tkd", gradient(logits, targets[batch]), x)
            momentum.mul_(MOMENTUM).add_(step.addcmul_(decay, weight))
            weight.addcmul_(rate, momentum, value=-1)
        yield heads


def best_scores(
    features: Tensor,
    targets: Tensor,
    tuning: np.ndarray,
    head: Tensor,
    pairs: list[tuple[float, float]],
    metric: str,
    tell: Callable[[int], object] = lambda trials: None,
) -> list[float]:
    """Highest value of `metric` on the tuning part over the epochs of a trial, for every pair of
    learning rate and weight decay. An epoch with scores that are not finite counts as 0. `tell`
    hears after every epoch how many trials made it."""
    held_out = torch.from_numpy(tuning).to(features.device)
    inputs, truth = features[held_out], targets[held_out].cpu().numpy()
    at_once = max(1, WEIGHTS_AT_ONCE // (head.shape[0] * (head.shape[1] + 1)))
    found: list[float] = []
    for start in range(0, len(pairs), at_once):
        part = torch.tensor(pairs[start : start + at_once], dtype=torch.float64)
        best = [0.0] * len(part)
        for heads in train(
            features[~held_out], targets[~held_out], head, part[:, 0], part[:, 1], TRIAL_EPOCHS
        ):
            for trial in range(len(part)):
                scores = heads.scores(trial, inputs)
                if np.isfinite(scores).all():
                    seen = elevater_metrics.value(metric, activate(scores, truth), truth)
                    best[trial] = max(best[trial], seen)
            tell(len(part))
        found += best
    return found


def activate(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """What the metric sees: logits, or for several classes per sample their softmax.

    The toolkit takes the softmax there too, although the loss is a sigmoid's. It changes the order
    of the images within a class, and so the precision.
    """
    return scores if targets.ndim == 1 else torch.from_numpy(scores).softmax(dim=1).numpy()


def search(
    features: Tensor, targets: Tensor, tuning: np.ndarray, head: Tensor, metric: str
) -> tuple[float, float]:
    """Learning rate and weight decay with the best tuning score.

    For each learning rate seven weight decays, two decades apart, then those 8, 4, 2 and 1 grid
    points to both sides of the best so far (the toolkit's first release tried the left one twice;
    its later default is this). The first of equal scores stays: smaller rate, then smaller decay.
    All rates are searched side by side.
    """
    last = len(WEIGHT_DECAYS) - 1
    score: dict[tuple[int, int], float] = {}

    def run_trials(points: list[tuple[int, int]]) -> None:
        new = [point for point in dict.fromkeys(points) if point not in score]
        pairs = [(LEARNING_RATES[rate], WEIGHT_DECAYS[decay]) for rate, decay in new]
        found = best_scores(features, targets, tuning, head, pairs, metric, bar.update)
        score.update(zip(new, found, strict=True))

    rates = range(len(LEARNING_RATES))
    coarse = range(0, last + 1, 16)
    peaks = [0] * len(LEARNING_RATES)
    bar = Progress(desc="search of rate and decay", unit="epoch", leave=False)
    for distance in (None, 8, 4, 2, 1):
        tried = [
            [max(peaks[r] - distance, 0), min(peaks[r] + distance, last)] if distance else coarse
            for r in rates
        ]
        run_trials([(r, decay) for r in rates for decay in tried[r]])
        for r in rates:
            for decay in tried[r]:
                if score[r, decay] > score[r, peaks[r]]:
                    peaks[r] = decay
    bar.close()
    best = max(rates, key=lambda r: score[r, peaks[r]])
    return float(LEARNING_RATES[best]), float(WEIGHT_DECAYS[peaks[best]])


def final(
    features: Tensor,
    targets: Tensor,
    head: Tensor,
    chosen: tuple[float, float],
    test: Tensor,
    truth: np.ndarray,
    names: list[str],
) -> dict[str, dict]:
    """Train one head on everything and score it on the test set.

    Returns for each metric of `names`, the first of which decides, `<name>_last_epoch` and
    `<name>_best_epoch`: the epoch with the highest test score, which is what ELEVATER publishes
    although it is chosen on the test set.
    """
    rate, decay = (torch.tensor([number]) for number in chosen)
    best, best_scored, scored = -1.0, None, None
    for heads in train(features, targets, head, rate, decay, FINAL_EPOCHS):
        scored = heads.scores(0, test)
        if not np.isfinite(scored).all():
            continue
        scored = activate(scored, truth)
        seen = elevater_metrics.value(names[0], scored, truth)
        if seen > best:
            best, best_scored = seen, scored
    if best_scored is None or not np.isfinite(scored).all():
        raise DataError(
            f"the final head diverged at learning rate {chosen[0]:.3g}, weight decay "
            f"{chosen[1]:.3g}, which the search preferred: look at the features of this checkpoint"
        )
    return {
        f"{name}_{epoch}_epoch": elevater_metrics.with_interval(name, scores, truth)
        for name in names
        for epoch, scores in (("last", scored), ("best", best_scored))
    }


def search_on(
    features: Tensor, labels: np.ndarray, classes: int, head: Tensor, metric: str, limit: int | None
) -> tuple[float, float]:
    """`search` with ELEVATER's tuning split, on at most `limit` samples of a class: as the toolkit
    on a few-shot subset, with the seed of its configuration, 0."""
    if limit and np.bincount(labels).max() > limit:  # two classes, one label an image
        chosen = few_shot.subset(labels, classes, limit, seed=0)
        features, labels = features[chosen], labels[chosen]
    targets = torch.from_numpy(labels).to(features.device)
    return search(features, targets, tuning_mask(labels), head, metric)


def evaluate_protocol(
    extractor: Extractor, row: EvalDataset, options: argparse.Namespace
) -> Iterator[tuple[str, Outcome]]:
    """Search and final training on a data set; the first metric of the registry's row guides.

    The head has one output for each class of `common_classes.meet`: all that were trained.
    `options`: `shots`, `seeds` and `head_init` of `eval.linear_probe`. Raises ConfigError for a
    model that compares tokens.
    """
    if extractor.late:
        raise ConfigError(
            f"{extractor.run.name}: the ELEVATER protocol probes the projected feature, which is "
            "not trained under model.similarity=late; use --protocol standardised or clip"
        )
    splits, classes = common_classes.open_splits(row, ("train",), extractor.size)
    names, y, truth = classes.names, classes.targets["train"], classes.targets["test"]
    head, digest = initial_head(extractor, splits["test"], names, options.head_init)
    features = finite_images(extractor, splits)
    if features is None:
        return
    device = extractor.accelerator.device
    x, x_test = (features[name]["feature"].to(device) for name in ("train", "test"))
    wanted, limit, head = row.tasks["linear_probe"], SEARCH_LIMITS.get(row.name), head.to(device)
    for shots, chosen in few_shot.subsets(y, len(names), options.shots, options.seeds):
        results, pairs = [], []
        for part in chosen:
            pairs.append(search_on(x[part], y[part], len(names), head, wanted[0], limit))
            targets = torch.from_numpy(y[part]).to(device)
            results.append(final(x[part], targets, head, pairs[-1], x_test, truth, wanted))
        protocol = (
            "ELEVATER protocol: batch norm without affine part and a linear layer on the "
            f"normalised projected features, head from {options.head_init}, SGD; learning rate and "
            f"weight decay {', '.join(f'{r:.3g} {d:.3g}' for r, d in pairs)} by {wanted[0]} on the "
            f"first 20 % of each class, {TRIAL_EPOCHS} epochs a trial; then {FINAL_EPOCHS} epochs "
            f"on all: {len(chosen[0])} train, {len(truth)} test; best_epoch is chosen on the test "
            "set, as published"
        )
        task, protocol, results = few_shot.label(TASK, protocol, shots, results, options.seeds)
        yield task, Outcome(results, len(names), protocol, digest)
