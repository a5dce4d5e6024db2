"""ELEVATER's probe on features extracted once, against the same protocol over images.

The other side runs the frozen tower on every batch of every epoch, as the published toolkit does,
written as a plain loop: one trial after the other, torch's own BatchNorm1d, Linear, cross-entropy
and SGD. Both have the same images, split, order of batches, starting head, search and metrics. In
favour of the loop its images are decoded once, before its time begins; ours decodes in its time.

One learning rate of the six is searched, with the whole walk over the 97 weight decays (up to 15
trials of 90): with all six the loop would take six times as long.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks import evaluation_zero_shot, harness
from eval.sources import common_classes
from eval.sources.registry import REGISTRY, EvalDataset, Registry
from eval.tasks import elevater_metrics, elevater_probe, evaluation, features
from eval.tasks.features import Extractor
from models import weights

LEARNING_RATE = 1e-1
DATA = "openclipart_classes"
OPTIONS = argparse.Namespace(protocol="elevater", shots=None, seeds=[0], head_init="text")


@contextmanager
def shortened(quick: bool) -> Iterator[None]:
    """Both sides' search cut to `LEARNING_RATE`, and for a quick run to few epochs."""
    cut = {"LEARNING_RATES": np.array([LEARNING_RATE])}
    if quick:
        cut |= {"TRIAL_EPOCHS": 1, "FINAL_EPOCHS": 2}
    whole = {name: getattr(elevater_probe, name) for name in cut}
    try:
        for name, value in cut.items():
            setattr(elevater_probe, name, value)
        yield
    finally:
        for name, value in whole.items():
            setattr(elevater_probe, name, value)


def ours(run: weights.LoadedRun, row: EvalDataset) -> dict[str, float]:
    """What `python -m eval.linear_probe --protocol elevater` does, without an earlier cache."""
    with tempfile.TemporaryDirectory() as cache:
        extractor = Extractor(evaluation.make_accelerator(), run, Path(cache), 256, 0)
        ((_, outcome),) = elevater_probe.evaluate_protocol(extractor, row, OPTIONS)
    return {name: found["value"] for name, found in outcome.metrics.items()}


class OverImages:
    """The protocol with the tower in the loop.

    Attributes: `encoded`, the number of images encoded so far.
    """

    def __init__(self, run: weights.LoadedRun, row: EvalDataset) -> None:
        """Decode the images of both splits and make the starting head."""
        with tempfile.TemporaryDirectory() as cache:
            extractor = Extractor(evaluation.make_accelerator(), run, Path(cache), 256, 0)
            splits, classes = common_classes.open_splits(row, ("train",), extractor.size)
            train, test = splits["train"], splits["test"]
            self.head = features.initial_head(extractor, test, classes.names, "text")[0]
        self.tower, self.normalize = extractor.model, extractor.transform.normalize
        self.labels, self.truth = classes.targets["train"], classes.targets["test"]
        self.images = torch.stack([train[i] for i in range(len(train))])
        self.test = torch.stack([test[i] for i in range(len(test))])
        self.wanted, self.encoded = row.tasks["linear_probe"], 0

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Features (b, D) of uint8 images (b, 3, H, W)."""
        self.encoded += len(images)
        return self.tower.encode_image(self.normalize(images))["feature"]

    @torch.no_grad()
    def scores(self, model: nn.Module, images: torch.Tensor) -> np.ndarray:
        """Logits (n, K) with the batch norm's running statistics."""
        model.eval()
        parts = images.split(elevater_probe.BATCH)
        return torch.cat([model(self.encode(part)) for part in parts]).numpy()

    def train(
        self, chosen: np.ndarray, pair: tuple[float, float], epochs: int
    ) -> Iterator[nn.Module]:
        """Train a head on the images `chosen` (indices); yields it after every epoch."""
        classes, width = self.head.shape
        model = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, classes))
        model[1].weight.data, model[1].bias.data = self.head.clone(), torch.zeros(classes)
        optimizer = torch.optim.SGD(model.parameters(), pair[0], 0.9, weight_decay=pair[1])
        targets = torch.from_numpy(self.labels[chosen])
        chosen = torch.from_numpy(chosen)
        for _, order in zip(range(epochs), elevater_probe.batches(len(chosen)), strict=False):
            model.train()
            for batch in order:
                if len(batch) == 1:
                    continue
                optimizer.zero_grad()
                logits = model(self.encode(self.images[chosen[batch]]))
                nn.functional.cross_entropy(logits, targets[batch]).backward()
                optimizer.step()
            yield model

    def trial(self, decay: float) -> float:
        """Highest tuning score over the epochs of a trial; NaN counts as 0."""
        held_out = elevater_probe.tuning_mask(self.labels)
        fit, tune, best = np.flatnonzero(~held_out), np.flatnonzero(held_out), 0.0
        for model in self.train(fit, (LEARNING_RATE, decay), elevater_probe.TRIAL_EPOCHS):
            scores = self.scores(model, self.images[tune])
            if np.isfinite(scores).all():
                seen = elevater_metrics.value(self.wanted[0], scores, self.labels[tune])
                best = max(best, seen)
        return best

    def search(self) -> float:
        """The weight decay of the published walk: every 16th, then 8, 4, 2 and 1 to both sides."""
        decays = elevater_probe.WEIGHT_DECAYS
        found = {i: self.trial(decays[i]) for i in range(0, len(decays), 16)}
        peak = max(found, key=lambda i: (found[i], -i))
        for distance in (8, 4, 2, 1):
            near = [max(peak - distance, 0), min(peak + distance, len(decays) - 1)]
            for i in near:
                if i not in found:
                    found[i] = self.trial(decays[i])
            for i in near:
                if found[i] > found[peak]:
                    peak = i
        return decays[peak]

    def __call__(self) -> dict[str, float]:
        """Search, train on everything, and the metrics of the last and the best epoch."""
        pair, names = (LEARNING_RATE, self.search()), self.wanted
        best, epochs = -1.0, elevater_probe.FINAL_EPOCHS
        for model in self.train(np.arange(len(self.images)), pair, epochs):
            scored = self.scores(model, self.test)
            seen = elevater_metrics.value(names[0], scored, self.truth)
            if seen > best:
                best, best_scored = seen, scored
        return {
            f"{name}_{epoch}_epoch": 100 * elevater_metrics.value(name, scores, self.truth)
            for name in names
            for epoch, scores in (("last", scored), ("best", best_scored))
        }


def rows(quick: bool) -> Iterator[dict]:
    """Time of the loop over ours, run before and after it, and the difference of the metrics."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, shortened(quick):
        evaluation_zero_shot.write_model(Path(place), evaluation_zero_shot.QUICKSTART)
        run = weights.load(Path(place) / "export")
        row = Registry(REGISTRY, None).select([DATA], "linear_probe")[0]
        loop, seconds, found = OverImages(run, row), {"ours": [], "loop": []}, {}
        for side in ("ours", "loop", "ours"):
            start = time.process_time()
            found[side] = ours(run, row) if side == "ours" else loop()
            seconds[side].append(time.process_time() - start)
    torch.set_num_threads(threads)
    facts = {"data": DATA, "train": len(loop.images), "test": len(loop.test), "threads": 1}
    facts |= {"learning_rates": [LEARNING_RATE], "images_encoded_by_loop": loop.encoded}
    facts |= {side: [round(value, 1) for value in values] for side, values in seconds.items()}
    gain = seconds["loop"][0] / (sum(seconds["ours"]) / 2)
    yield harness.row(
        "ELEVATER probe, CPU time, tower in every epoch / cached features",
        gain, 10, at_most=False, **facts,
    )  # fmt: skip
    apart = {name: abs(found["ours"][name] - value) for name, value in found["loop"].items()}
    rounded = {
        side: {name: round(value, 4) for name, value in measured.items()}
        for side, measured in found.items()
    }
    yield harness.row(
        "ELEVATER probe, largest difference of a metric, points",
        max(apart.values()), 0.005, **rounded,
    )  # fmt: skip


if __name__ == "__main__":
    harness.main("evaluation_probe", rows)
