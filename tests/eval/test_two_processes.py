"""Two gloo processes find what one finds: probes, neighbours, fine-tuning, detection."""

import argparse
import re

import numpy as np
import pytest
import torch
import yaml

from eval import detection, knn, linear_probe
from eval.detector import mask_rcnn, transfer
from eval.detector.instances import Instances
from eval.sources import common_classes
from eval.sources.registry import Registry
from eval.tasks import evaluation, finetune
from eval.tasks.features import Extractor
from models import weights
from tests import multiprocess
from tests.eval.test_detection import build, coco, shrink  # noqa: F401  (coco: a fixture)
from tests.eval.test_finetune import emoji  # noqa: F401  (a fixture)


def score(rank, world_size, world, registry, output):
    """All evaluations that fit something on the main process."""
    common = ["--checkpoint", str(world / "runs/tiny"), "--datasets", "toy_classes"]
    common += ["--output", str(output), "--batch-size", "4", "--workers", "0"]
    knn.main(common, registry)
    few = ["--shots", "5", "--seeds", "0", "1"]
    linear_probe.main([*common, "--protocol", "elevater", *few], registry)
    linear_probe.main([*common, "--protocol", "clip"], registry)
    return evaluation.make_accelerator().num_processes


def test_rows_of_probes_and_neighbours_are_equal(world, tmp_path):
    content = yaml.safe_load((world / "registry.yaml").read_text())
    content["datasets"]["toy_classes"]["tasks"]["knn"] = ["top1"]
    registry = tmp_path / "registry.yaml"
    registry.write_text(yaml.safe_dump(content))
    assert multiprocess.run(score, 2, world, registry, tmp_path / "two") == [2, 2]
    score(0, 1, world, registry, tmp_path / "one")
    one, two = (sorted((tmp_path / name).glob("*.jsonl")) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    tasks = {"knn", "linear_probe_elevater_5shot", "linear_probe_clip"}
    assert {path.stem.removeprefix("tiny_") for path in one} == tasks
    date = re.compile(r'"date": "[^"]*"')
    for a, b in zip(one, two, strict=True):
        assert date.sub("", a.read_text()) == date.sub("", b.read_text()), a.name


def fine_tune(rank, world_size, registry):
    """Losses of four steps on 128 images, and the weights."""
    run = weights.load(registry.parent / "runs/tiny")
    accelerator = evaluation.make_accelerator()
    extractor = Extractor(accelerator, run, registry.parent / "cache", 64, 0)
    row = Registry(registry).datasets["emoji"]
    splits, classes = common_classes.open_splits(row, ("train",), extractor.size)
    data = finetune.TrainingViews(splits["train"], classes.targets["train"][:128], seed=0)
    torch.manual_seed(0)
    head = torch.randn(len(classes.names), run.model.embed_dim) * 0.02
    model = finetune.Classifier(run.model, head)
    normalize = extractor.transform.normalize
    args = argparse.Namespace(epochs=2, lr=1e-3, seed=0)
    found = finetune.train(accelerator, model, data, normalize, args, workers=0)
    return found, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_fine_tuning_takes_the_same_steps(emoji):  # noqa: F811
    (first, weights_first), (second, weights_second) = multiprocess.run(fine_tune, 2, emoji)
    losses, alone = fine_tune(0, 1, emoji)
    assert len(losses) == 4
    # Each rank has every other image of a batch, so their mean is the loss of the batch.
    assert np.mean([first, second], axis=0) == pytest.approx(losses, rel=1e-5)
    np.testing.assert_array_equal(weights_first, weights_second)
    # Adam divides by the gradient's size, so a weight whose gradient is rounding moves by chance.
    moved = np.abs(weights_first - alone.numpy())
    assert np.quantile(moved, 0.99) < 1e-5


def detect(rank, world_size, folder, output):
    """Entries found by a fixed detector, then the sum of its weights after one trained epoch."""
    accelerator = evaluation.make_accelerator()
    data = Instances(folder / "val", training=False)
    tower = build("swin")[0].image
    torch.manual_seed(0)
    model = shrink(mask_rcnn.build(tower, "swin", 2, (0.5,) * 3, (0.25,) * 3, 64))
    model.to(accelerator.device)
    found = transfer.detect(accelerator, model, data, workers=0)
    options = ["--checkpoint", "-", "--train", "-", "--val", "-", "--output", "-", "--workers", "0"]
    args = detection.options_parser().parse_args([*options, "--epochs", "1", "--batch-size", "2"])
    training = Instances(folder / "train", training=True)
    transfer.train(accelerator, model, training, args, output / "state.pt")
    return found, [p.detach().double().sum().item() for p in model.parameters()]


def test_detections_are_equal_and_ranks_train_one_detector(coco, tmp_path):  # noqa: F811
    (both, first), (nothing, second) = multiprocess.run(detect, 2, coco, tmp_path / "two")
    alone, _ = detect(0, 1, coco, tmp_path / "one")
    assert nothing is None
    assert len(alone) > 4

    def by_image(entries):
        return sorted(entries, key=lambda entry: (entry["image_id"], -entry["score"]))

    assert by_image(both) == by_image(alone)
    assert first == second
    assert (tmp_path / "two" / "state.pt").is_file()
