"""A model that reads texts as pictures, from `train.py` to evaluation."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from eval import in_training, retrieval, zero_shot
from eval.sources.registry import REGISTRY, Registry
from eval.sources.splits import EvalSplit
from eval.tasks.finetune import Classifier
from loaders import views
from loaders.render import Renderer
from models import weights
from tests import commands

PIXELS = [
    "model.kind=one_tower", "model.text={name: pixels, tokenizer: rendered}",
    "model.image.kwargs=null",  # those of tiny.yaml's trunk
    "model.image={name: vit_tiny_patch16_224, size: 48, kwargs: {embed_dim: 16, depth: 1, "
    "num_heads: 2, class_token: false, global_pool: map}}",
]  # fmt: skip


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def zero_shot_by_hand(model):
    """Percentage of the emoji whose class is the nearest; each prompt drawn and encoded alone."""
    split = EvalSplit(Registry(REGISTRY, None).datasets["emoji_twemoji"], "test", 48)
    ids, names = split.class_names()
    statistics = model.cfg.image.mean, model.cfg.image.std
    classes = []
    for name in names:
        prompts = [template.format(name) for template in split.templates()]
        drawn = [Renderer(48)([prompt]).expand(-1, 3, -1, -1) for prompt in prompts]
        encoded = [model.encode_image(views.normalize(image, *statistics)) for image in drawn]
        classes.append(torch.cat([one["feature"] for one in encoded]).double().mean(dim=0))
    found = [
        model.encode_image(views.normalize(split[i][None], *statistics))["feature"][0]
        for i in range(len(split))
    ]
    nearest = (torch.stack(found).double() @ F.normalize(torch.stack(classes), dim=1).T).argmax(1)
    return 100 * np.mean(ids[nearest.numpy()] == split.labels)


def test_training_evaluation_within_it_and_afterwards(tmp_path):
    """Pairs and labels, accumulated; zero-shot and retrieval of the checkpoint are the same."""
    run, sets = (
        tmp_path / "run",
        {"zero_shot": "emoji_twemoji", "retrieval": "openclipart_captions"},
    )
    tasks = ", ".join(f"{task}: [{name}]" for task, name in sets.items())
    finished = commands.train(
        *PIXELS, "train.steps=2", "train.accumulation=2", "evals.every_steps=2",
        f"evals.tasks={{{tasks}}}", "--output-dir", run,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert set(sets) < set(in_training.TASKS)
    rows = read(run / "evals.jsonl")
    for command in (zero_shot, retrieval):
        task = command.__name__.rpartition(".")[2]
        arguments = ["--checkpoint", str(run), "--datasets", sets[task], "--workers", "0"]
        command.main([*arguments, "--batch-size", "64", "--output", str(tmp_path / "rows")])
        alone = read(tmp_path / "rows" / f"run_{task}.jsonl")
        here = [row for row in rows if row["task"] == task]
        assert len(here) == len(alone) >= 3
        for ours, theirs in zip(here, alone, strict=True):
            for key in ("dataset", "metric", "value", "checkpoint_hash", "prompt_digest"):
                assert ours[key] == theirs[key]

    model = weights.load(run).model
    top1 = next(row["value"] for row in rows if row["metric"] == "top1")
    assert top1 == pytest.approx(zero_shot_by_hand(model), abs=0.11)  # one of 931 may be a near tie

    head = torch.randn(5, model.embed_dim, generator=torch.Generator().manual_seed(0))
    classifier, images = Classifier(model, head).eval(), torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = model.scale() * F.linear(model.encode_image(images)["feature"], head)
        torch.testing.assert_close(classifier(images), expected, rtol=1e-5, atol=1e-5)


def test_a_dry_run_names_the_one_tower():
    finished = commands.train(*PIXELS, "train.steps=1", "--dry-run")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "parameters: image and text tower 0.0" in finished.stdout
    assert "parameters: image tower" not in finished.stdout
