"""The three commands on tiny shards and an untrained model, against computations done here."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from eval import linear_probe, retrieval, zero_shot
from eval.sources.registry import REPOSITORY
from eval.tasks import evaluation
from loaders import manifest, tokenizers, views
from models import weights
from tests import multiprocess
from tests.eval.conftest import MODEL, NAMES, ONE_TOWER, write_run

TASKS = {"zero_shot": zero_shot, "linear_probe": linear_probe, "retrieval": retrieval}
ROW_KEYS = [
    *("dataset", "split", "n", "classes", "metric", "value", "ci95", "task", "protocol"),
    *("checkpoint_hash", "step", "samples_seen", "run", "config_name", "recipe", "prompt_digest"),
    *("git_hash", "training_git", "date"),
]


@pytest.fixture(scope="module", params=["two_tower", "one_tower"])
def run(request, world):
    """Where in `world` a run of the kind is."""
    if request.param == "one_tower":
        write_run(world / "one/tiny", seed=0, **ONE_TOWER)
    return {"two_tower": "runs/tiny", "one_tower": "one/tiny"}[request.param]


def command(task, world, output, run="runs/tiny"):
    """Run `python -m eval.<task>` in this process."""
    arguments = [
        "--checkpoint",
        str(world / run),
        "--datasets",
        "toys",
        "--output",
        str(output),
    ]
    arguments += ["--batch-size", "4", "--workers", "0"]
    TASKS[task].main(arguments, world / "registry.yaml")


def evaluate(task, world, output, run="runs/tiny"):
    """Run the command and return its rows by metric."""
    command(task, world, output, run)
    lines = (output / f"tiny_{task}.jsonl").read_text().splitlines()
    return {row["metric"]: row for row in map(json.loads, lines)}


def dense(world, folder, key, run):
    """Image outputs in float64, all at once, without the code under test."""
    model = weights.load_run(world / run).model.double()
    shards = manifest.open_shards(str(world / folder))
    transform = views.build_eval(32, 32)
    pixels = torch.stack(
        [transform(views.decode(shards.read_image(i))) for i in range(len(shards))]
    )
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    with torch.no_grad():
        output = model.encode_image((pixels.double() / 255 - mean) / std)[key].double()
    return output, np.array(shards.labels), [shards.read_text(i) for i in range(len(shards))]


def dense_texts(world, texts, run):
    model = weights.load_run(world / run).model.double()
    with torch.no_grad():
        ids = tokenizers.build("clip", MODEL["text"]["context_length"])(texts)
        return model.encode_text(ids)["feature"].double()


def test_zero_shot_equals_a_dense_float64_computation(world, run, tmp_path):
    got = evaluate("zero_shot", world, tmp_path, run)
    images, labels, _ = dense(world, "drawn_test", "feature", run)
    images, labels = images[labels >= 0], labels[labels >= 0]
    presets = json.loads((REPOSITORY / "prompts/templates.json").read_text())
    classifier = []
    for name in NAMES[:3]:  # no sample of "planet": no candidate
        prompts = [t.replace("{}", name) for t in presets["clipart"]["templates"]]
        classifier.append(F.normalize(dense_texts(world, prompts, run), dim=1).mean(dim=0))
    scores = images @ F.normalize(torch.stack(classifier), dim=1).T
    predicted = scores.argmax(dim=1).numpy()
    assert got["top1"]["value"] == pytest.approx(100 * np.mean(predicted == labels))
    expected = 100 * balanced_accuracy_score(labels, predicted)
    assert got["mean_per_class"]["value"] == pytest.approx(expected)
    assert got["top5"]["value"] == 100  # three candidates
    row = got["top1"]
    assert list(row) == ROW_KEYS
    assert (row["n"], row["classes"], row["run"], row["step"]) == (19, 3, "tiny", 7)
    assert (row["samples_seen"], row["config_name"]) == (7 * 64, "config_0")
    assert row["ci95"][0] < row["value"] < row["ci95"][1]


def test_linear_probe_equals_scikit_learns_optimum(world, run, tmp_path):
    got = evaluate("linear_probe", world, tmp_path, run)
    x, y, _ = dense(world, "drawn_train", "pooled", run)
    x_test, y_test, _ = dense(world, "drawn_test", "pooled", run)
    x, y, x_test, y_test = x[y >= 0].numpy(), y[y >= 0], x_test[y_test >= 0], y_test[y_test >= 0]
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    protocol = got["top1"]["protocol"]
    c = float(re.search(r"C = (\S+)", protocol)[1])
    assert f"{len(x)} train, {len(x_test)} test" in protocol
    model = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    predicted = model.fit((x - mean) / deviation, y).predict((x_test.numpy() - mean) / deviation)
    assert got["top1"]["value"] == pytest.approx(100 * np.mean(predicted == y_test))
    expected = 100 * balanced_accuracy_score(y_test, predicted)
    assert got["mean_per_class"]["value"] == pytest.approx(expected)


def test_retrieval_equals_brute_force(world, run, tmp_path):
    got = evaluate("retrieval", world, tmp_path, run)
    images, _, texts = dense(world, "drawn_test", "feature", run)
    folded = [re.sub(r"\s+", " ", text).lower() for text in texts]
    distinct = list(dict.fromkeys(folded))
    assert len(distinct) < len(set(texts))  # case and spaces did differ
    scores = (images @ dense_texts(world, distinct, run).T).numpy()
    own = np.array([[text == folded[i] for text in distinct] for i in range(len(texts))])
    for direction, s, positive in (
        ("image_to_text", scores, own),
        ("text_to_image", scores.T, own.T),
    ):
        order = np.argsort(-s, axis=1)
        for k in (1, 5, 10):
            hit = [positive[i, order[i, :k]].any() for i in range(len(s))]
            row = got[f"{direction}_r{k}"]
            assert (row["value"], row["n"]) == (pytest.approx(100 * np.mean(hit)), len(s))


def all_tasks(rank, world_size, world, output):
    for task in TASKS:
        command(task, world, output)
    return evaluation.make_accelerator().num_processes


def test_two_processes_give_the_same_bits_and_order_as_one(world, tmp_path):
    # 23 and 19 images in batches of 4: the last round is partly padding on both ranks.
    assert multiprocess.run(all_tasks, 2, world, tmp_path / "two") == [2, 2]
    all_tasks(0, 1, world, tmp_path / "one")
    for kind in (".features/*.safetensors", "*.jsonl"):
        one, two = (sorted((tmp_path / name).glob(kind)) for name in ("one", "two"))
        assert [p.name for p in one] == [p.name for p in two]
        assert one
        for a, b in zip(one, two, strict=True):
            cut = re.compile(rb'"date": "[^"]*"')
            assert cut.sub(b"", a.read_bytes()) == cut.sub(b"", b.read_bytes()), a.name


def test_cache_is_used_and_follows_the_checkpoint(world, tmp_path):
    cache = tmp_path / "results" / ".features"
    run = write_run(tmp_path / "runs" / "tiny", seed=1)
    (tmp_path / "registry.yaml").write_bytes((world / "registry.yaml").read_bytes())
    first = evaluate("retrieval", tmp_path, tmp_path / "results")
    written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(written) == 2  # images and captions
    assert (
        evaluate("retrieval", tmp_path, tmp_path / "results")["mean_recall"]["value"]
        == (first["mean_recall"]["value"])
    )
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == written
    write_run(run, seed=2)  # the same name and step, other weights
    evaluate("retrieval", tmp_path, tmp_path / "results")
    assert len(list(cache.iterdir())) == 4
    lines = (tmp_path / "results" / "tiny_retrieval.jsonl").read_text().splitlines()
    # Equal checkpoints replace their rows, another checkpoint adds its own.
    assert len(lines) == 2 * 7
    assert len({json.loads(line)["checkpoint_hash"] for line in lines}) == 2
