"""A set with several labels an image (VOC 2007's classes) from shards to rows, all three ways."""

import json

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import precision_recall_curve

from eval import finetune, linear_probe, zero_shot
from eval.sources.registry import REPOSITORY, Registry
from eval.sources.splits import EvalSplit
from eval.tasks import evaluation
from eval.tasks.features import Extractor
from loaders import manifest
from models import weights
from tests.eval.conftest import drawing
from tests.eval.test_sources_kinds import write_tar

CLASSES = 20
PROMPTS = "elevater/voc-2007-classification.json"


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """registry.yaml and the set beside it; every class has a positive in both splits."""
    root = tmp_path_factory.mktemp("voc")
    texts = json.loads((REPOSITORY / "prompts/elevater/voc-2007-classification.json").read_text())
    names = [entry["names"] for entry in texts["classes"]]
    random = np.random.default_rng(0)
    for split, n in (("train", 120), ("test", 60)):
        samples = [
            {
                "png": drawing(i % 3, random),
                "json": json.dumps(
                    {"labels": sorted({i % CLASSES, int(random.integers(CLASSES))})}
                ),
            }
            for i in range(n)
        ]
        folder = root / "voc" / split
        write_tar(folder / "shards/00000.tar", samples)
        classes = [{"id": i, "synset": None, "names": name} for i, name in enumerate(names)]
        manifest.write_manifest(folder, "voc", "image_text", classes, "-", "-", "2026-01-01", n)
    row = {
        "source": "shards",
        "splits": {
            "train": {"path": str(root / "voc/train"), "samples": 120},
            "test": {"path": str(root / "voc/test"), "samples": 60},
        },
        "tasks": {"zero_shot": ["map_11_point"], "linear_probe": ["map_11_point"]},
        "classes": CLASSES,
        "prompts": PROMPTS,
        "templates": "prompts",
        "multilabel": True,
        "labelled_only": False,
        "resize_ratio": 1.0,
        "optional": False,
        "obtain": "-",
    }
    (root / "registry.yaml").write_text(
        yaml.safe_dump({"collections": {}, "datasets": {"voc": row}})
    )
    return root


def command(main, world, voc, output, *more):
    """Rows by metric of one evaluation."""
    arguments = ["--checkpoint", str(world / "runs/tiny"), "--datasets", "voc"]
    arguments += ["--output", str(output), "--batch-size", "16", "--workers", "0", *more]
    main(arguments, voc / "registry.yaml")
    (path,) = output.glob("*.jsonl")
    return {row["metric"]: row for row in map(json.loads, path.read_text().splitlines())}


def expected_map(scores, targets):
    """Scikit-learn's curve walked down the recalls, as vision-evaluation 0.2.9 does."""
    found = []
    for k in range(CLASSES):
        precision, recall, _ = precision_recall_curve(targets[:, k], scores[:, k])
        levels = np.linspace(1, 0, 11)
        found.append(np.mean([precision[recall >= level].max() for level in levels]))
    return 100 * np.mean(found)


def test_zero_shot_is_the_mean_precision_of_the_softmax(world, voc, tmp_path):
    row = command(zero_shot.main, world, voc, tmp_path)["map_11_point"]
    run = weights.load(world / "runs/tiny")
    extractor = Extractor(evaluation.make_accelerator(), run, tmp_path / "cache", 16, 0)
    split = EvalSplit(Registry(voc / "registry.yaml").datasets["voc"], "test", extractor.size)
    texts = split.row.class_texts(split.class_names()[1])
    weight = extractor.class_weights(texts, split.templates()).double()
    cosine = extractor.images(split)["feature"].double() @ weight.T
    shards = manifest.open_shards(voc / "voc/test")
    truth = np.zeros((60, CLASSES), dtype=int)
    for i in range(60):
        truth[i, shards.read_json(i)["labels"]] = 1
    scores = torch.softmax(100 * cosine, dim=1).numpy()
    assert row["value"] == pytest.approx(expected_map(scores, truth), abs=1e-6)
    assert (row["n"], row["classes"]) == (60, CLASSES)


@pytest.mark.parametrize("start", ["text", "random"])
def test_probe_searches_and_reports_both_epochs(world, voc, tmp_path, start):
    options = ("--protocol", "elevater", "--head-init", start)
    rows = command(linear_probe.main, world, voc, tmp_path, *options)
    assert set(rows) == {"map_11_point_last_epoch", "map_11_point_best_epoch"}
    last, best = (rows[f"map_11_point_{name}_epoch"]["value"] for name in ("last", "best"))
    assert 100 / 11 <= last <= best <= 100
    assert f"head from {start}" in rows["map_11_point_last_epoch"]["protocol"]
    assert bool(rows["map_11_point_last_epoch"]["prompt_digest"]) == (start == "text")


def test_fine_tuning_learns_each_class_by_itself(world, voc, tmp_path):
    row = command(finetune.main, world, voc, tmp_path, "--epochs", "1")["map_11_point"]
    assert 100 / 11 <= row["value"] <= 100
    assert row["n"] == 60
