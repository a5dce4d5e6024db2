"""ELEVATER's probe against a plain torch loop, its search against all trials one by one, and its
splits, subsets and metrics."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from eval import linear_probe
from eval.tasks import elevater_probe, few_shot

CLASSES, WIDTH = 3, 6


def problem(n=150, seed=0, multilabel=False):
    """Noisy classes: features (n, WIDTH) of unit length, targets, head to start from."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    noise = torch.randn(n, WIDTH, generator=generator)
    features = nn.functional.normalize(centres[labels] + 1.2 * noise, dim=1)
    head = nn.functional.normalize(torch.randn(CLASSES, WIDTH, generator=generator), dim=1)
    if multilabel:
        labels = (torch.rand(n, CLASSES, generator=generator) < 0.4).float()
    return features, labels, head


def plain_training(features, targets, head, lr, decay, epochs):
    """The protocol written with torch's own parts: yields the model after every epoch."""
    model = nn.Sequential(nn.BatchNorm1d(WIDTH, affine=False), nn.Linear(WIDTH, CLASSES))
    model[1].weight.data, model[1].bias.data = head.clone(), torch.zeros(CLASSES)
    loss = nn.CrossEntropyLoss() if targets.ndim == 1 else nn.BCEWithLogitsLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=decay)
    data = torch.utils.data.TensorDataset(features, targets)
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(data, 64, shuffle=True, generator=generator)
    for _ in range(epochs):
        model.train()
        for x, y in loader:
            if len(x) == 1:
                continue
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        yield model.eval()


@pytest.mark.parametrize("multilabel", [False, True])
def test_batched_trials_equal_a_plain_torch_loop_each(multilabel):
    # 129 samples: the last batch of an epoch holds one and is left out.
    features, targets, head = problem(129, multilabel=multilabel)
    rates, decays = torch.tensor([0.1, 0.01, 0.1]), torch.tensor([1e-3, 0.0, 0.5])
    batched = elevater_probe.train(features, targets, head, rates, decays, 4)
    plain = [
        plain_training(features, targets, head, r, d, 4)
        for r, d in zip(rates.tolist(), decays.tolist(), strict=True)
    ]
    new = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(9))
    for heads, *models in zip(batched, *plain, strict=True):
        for trial, model in enumerate(models):
            expected = model(new).detach().numpy()
            np.testing.assert_allclose(heads.scores(trial, new), expected, atol=2e-6)


def test_search_is_the_published_walk_over_single_trials():
    features, targets, head = problem()
    tuning = elevater_probe.tuning_mask(targets.numpy())
    fit, tune = (features[~tuning], targets[~tuning]), (features[tuning], targets[tuning])

    def trial(rate, decay):
        best = 0.0
        for model in plain_training(*fit, head, rate, decay, 10):
            with torch.no_grad():
                best = max(best, (model(tune[0]).argmax(1) == tune[1]).float().mean().item())
        return best

    decays, chosen, top = np.logspace(-6, 6, 97), None, 0.0
    for rate in np.logspace(-6, -1, 6):
        peak, peak_score = -1, 0.0
        for i in range(0, 97, 16):
            score = trial(rate, decays[i])
            peak, peak_score = (i, score) if score > peak_score else (peak, peak_score)
        for span in (8, 4, 2, 1):
            for i in {max(peak - span, 0): 0, min(peak + span, 96): 0}:
                score = trial(rate, decays[i])
                peak, peak_score = (i, score) if score > peak_score else (peak, peak_score)
        if peak_score > top:
            chosen, top = (rate, decays[peak]), peak_score
    got = elevater_probe.search(features, targets, tuning, head, "top1")
    assert got == pytest.approx(chosen)


def test_final_reports_the_last_epoch_and_the_best_one_on_the_test_set():
    features, targets, head = problem()
    test, truth, _ = problem(80, seed=1)
    truth = truth.numpy()
    got = elevater_probe.final(
        features, targets, head, (0.1, 1e-4), test, truth, ["top1", "mean_per_class"]
    )
    right = [
        (model(test).argmax(1).numpy() == truth).mean()
        for model in plain_training(features, targets, head, 0.1, 1e-4, 50)
    ]
    assert max(right) > right[-1]  # or the two could not be told apart
    assert got["top1_last_epoch"]["value"] == pytest.approx(100 * right[-1])
    assert got["top1_best_epoch"]["value"] == pytest.approx(100 * max(right))
    assert set(got) == {
        f"{name}_{epoch}_epoch" for name in ("top1", "mean_per_class") for epoch in ("last", "best")
    }


def test_tuning_split_is_the_first_fifth_of_each_class_rounded_up():
    labels = np.array([0, 1, 0, 0, 1, 0, 2, 0, 0])
    np.testing.assert_array_equal(
        elevater_probe.tuning_mask(labels), [1, 1, 1, 0, 0, 0, 1, 0, 0]
    )  # ceil(6/5), ceil(2/5), ceil(1/5)
    many = np.array([[0, 1], [1, 1], [1, 0], [1, 1], [1, 0], [1, 0], [1, 0]])
    # Class 0 needs two, its first are 1 and 2; sample 1 is the one that class 1 needs.
    np.testing.assert_array_equal(elevater_probe.tuning_mask(many), [0, 1, 1, 0, 0, 0, 0])


def test_few_shot_subsets_are_those_of_vision_datasets():
    # Recorded from DatasetManifest.sample_few_shot_subset of vision-datasets 0.2.17.
    cycle = np.arange(24) % 3
    assert few_shot.subset(cycle, 3, 2, 0).tolist() == [14, 0, 17, 7, 6, 22]
    assert few_shot.subset(cycle, 3, 2, 1).tolist() == [20, 11, 21, 13, 10, 9]
    squares = np.array([i * i % 5 for i in range(40)])
    drawn = few_shot.subset(squares, 5, 3, 2)  # the classes 2 and 3 have no sample
    assert drawn.tolist() == [26, 4, 39, 27, 15, 35, 30, 28, 7]
    generator = random.Random(5)
    lists = [{generator.randrange(4) for _ in range(generator.randrange(4))} for _ in range(30)]
    many = np.array([[k in classes for k in range(4)] for classes in lists]).astype(int)
    expected = [26, 16, 11, 10, 23, 1, 29, 7, 20, 9, 17, 22]
    assert few_shot.subset(many, 4, 3, 1).tolist() == expected
    expected = [3, 10, 18, 17, 5, 0, 7, 26, 29, 14, 20, 25, 2, 19, 4, 23, 6]
    assert few_shot.subset(many, 4, 5, 0).tolist() == expected


def test_command_writes_both_epochs_and_the_mean_over_seeds(world, tmp_path):
    arguments = ["--checkpoint", str(world / "runs/tiny"), "--datasets", "toys"]
    arguments += ["--output", str(tmp_path), "--batch-size", "16", "--workers", "0"]
    arguments += ["--protocol", "elevater", "--shots", "5", "--seeds", "0", "1"]
    linear_probe.main(arguments, world / "registry.yaml")
    lines = (tmp_path / "tiny_linear_probe_elevater_5shot.jsonl").read_text().splitlines()
    rows = {row["metric"]: row for row in map(json.loads, lines)}
    assert "15 train, 19 test" in rows["top1_last_epoch"]["protocol"]
    for name in ("top1_last_epoch", "top1_best_epoch", "mean_per_class_last_epoch"):
        values = [rows[f"{name}_seed{seed}"]["value"] for seed in (0, 1)]
        assert rows[name]["value"] == pytest.approx(np.mean(values))
    best, last = rows["top1_best_epoch_seed0"], rows["top1_last_epoch_seed0"]
    assert best["value"] >= last["value"]
    assert last["n"] == 19
    assert last["prompt_digest"]


@pytest.mark.parametrize(("rate", "decay"), [(3, 61), (0, 3), (5, 90), (2, 48)])
def test_search_walks_to_both_sides_of_the_coarse_grid(monkeypatch, rate, decay):
    rates, decays = elevater_probe.LEARNING_RATES, elevater_probe.WEIGHT_DECAYS
    tried = []

    def scores(features, targets, tuning, head, pairs, metric, tell):
        """One peak, at the wanted point; more distant learning rates count for less."""
        tried.extend(pairs)
        far = [
            abs(np.log10(d / decays[decay])) / 20 + abs(np.log10(r / rates[rate])) / 100
            for r, d in pairs
        ]
        return [1 - distance for distance in far]

    monkeypatch.setattr(elevater_probe, "best_scores", scores)
    found = elevater_probe.search(None, None, None, None, "top1")
    assert found == (rates[rate], decays[decay])
    assert len(set(tried)) == len(tried) <= 6 * (7 + 4 * 2)
