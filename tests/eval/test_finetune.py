"""Fine-tuning on the shipped emoji with a tiny tower."""

import json

import numpy as np
import pytest
import torch
import yaml

from eval import finetune as command_line
from eval.sources.registry import Registry
from eval.sources.splits import EvalSplit
from eval.tasks import evaluation, features, finetune, zero_shot
from eval.tasks.features import Extractor
from models import weights
from tests.eval.conftest import ONE_TOWER, write_run


@pytest.fixture
def emoji(tmp_path):
    """Registry of one set: the first emoji style to train on, the third to test on."""
    row = {
        "source": "shards",
        "splits": {
            "train": {"path": "data/quickstart/emoji_train", "samples": None},
            "test": {"path": "data/quickstart/emoji_twemoji", "samples": 931},
        },
        "tasks": {"zero_shot": ["top1"], "linear_probe": ["top1", "mean_per_class"]},
        "classes": 28,
        "templates": "clipart",
        "labelled_only": True,
        "resize_ratio": 1.0,
        "optional": False,
        "obtain": "python data_prep/quickstart.py",
    }
    path = tmp_path / "registry.yaml"
    path.write_text(yaml.safe_dump({"collections": {}, "datasets": {"emoji": row}}))
    write_run(tmp_path / "runs" / "tiny", seed=0)
    return path


def command(emoji, output, *more):
    """Run `python -m eval.finetune` and return its rows by metric."""
    arguments = ["--checkpoint", str(emoji.parent / "runs/tiny"), "--datasets", "emoji"]
    arguments += ["--output", str(output), "--workers", "0", *map(str, more)]
    command_line.main(arguments, emoji)
    lines = (output / "tiny_finetune.jsonl").read_text().splitlines()
    return {row["metric"]: row for row in map(json.loads, lines)}


def test_loss_falls_accuracy_is_above_chance_and_seeds_repeat(emoji, tmp_path, monkeypatch):
    losses, plain = [], finetune.train
    monkeypatch.setattr(finetune, "train", lambda *a: losses.append(plain(*a)))
    options = ["--epochs", 2, "--lr", "2e-3", "--head-init", "random"]
    first = command(emoji, tmp_path / "a", *options)
    again = command(emoji, tmp_path / "b", *options)
    assert losses[0] == losses[1]
    assert np.mean(losses[0][-10:]) < 0.95 * np.mean(losses[0][:10])
    for name in ("top1", "mean_per_class"):
        assert first[name]["value"] == again[name]["value"]
    # Whatever always says the same class scores 100 / 28.
    assert first["mean_per_class"]["ci95"][0] > 100 / 28
    assert first["top1"]["task"] == "finetune"


def test_text_head_starts_as_the_zero_shot_classifier(emoji):
    accelerator = evaluation.make_accelerator()
    run = weights.load(emoji.parent / "runs/tiny")
    extractor = Extractor(accelerator, run, emoji.parent / "cache", 64, 0)
    row = Registry(emoji).datasets["emoji"]
    test = EvalSplit(row, "test", extractor.size)
    names = test.class_names()[1]
    head, digest = features.initial_head(extractor, test, names, "text")
    model = finetune.Classifier(run.model, head).eval()

    def logits(images):
        scores = model(extractor.transform.normalize(images))
        return {"feature": scores, "pooled": scores}

    scores = features.encode(accelerator, test, logits, 64, 0, "test")["feature"]
    expected = zero_shot.evaluate(extractor, row)
    truth = np.searchsorted(test.class_names()[0], test.labels)
    right = (scores.argmax(dim=1).numpy() == truth).mean()
    assert 100 * right == pytest.approx(expected.metrics["top1"]["value"], abs=0.2)  # ties
    assert digest == expected.digest


TOLD = {"augmentation": {"width": 4, "hidden": 8}}


@pytest.mark.parametrize(
    "settings", [{}, ONE_TOWER, TOLD], ids=["two_tower", "one_tower", "told of augmentation"]
)
def test_training_leaves_the_run_as_it_was(settings, tmp_path):
    run = weights.load(write_run(tmp_path / "run", seed=0, **settings))
    model = finetune.Classifier(run.model, torch.zeros(28, run.model.embed_dim))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    names = dict(model.named_parameters()).keys()
    assert model.no_weight_decay() <= names
    images = torch.randn(4, 3, 32, 32)
    encoded = run.model.encode_image(images)["projected"]
    torch.testing.assert_close(model.encoder(images), encoded, rtol=0, atol=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    model.head.weight.grad += 1
    optimizer.step()
    assert all(torch.equal(value, before[n]) for n, value in run.model.state_dict().items())
    graded = {n for n, p in model.named_parameters() if p.grad is not None}
    assert graded == names


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_batches_of_one_process(ranks):
    alone = finetune.rank_batches(150, 2, 5, 0, 1)
    shares = [finetune.rank_batches(150, 2, 5, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    for step, whole in enumerate(alone):
        together = {index for share in shares for index in share[step]}
        assert together <= set(whole)
        assert len(whole) - len(together) < ranks
    for epoch in range(2):
        seen = [i for batch in alone for e, i in batch if e == epoch]
        assert sorted(seen) == list(range(150))
    assert [i for _, i in alone[0]] != [i for _, i in alone[3]]
    assert alone != finetune.rank_batches(150, 2, 6, 0, 1)
