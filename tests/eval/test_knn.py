"""The weighted vote against scikit-learn's neighbours and by hand."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier

from eval import knn as command_line
from eval.tasks import knn, metrics
from loaders.errors import DataError
from tests.eval.conftest import write_run


@pytest.mark.parametrize("scores", [1 << 24, 70])
@pytest.mark.parametrize("m", [7, 60])
def test_vote_equals_scikit_learn(scores, m, monkeypatch):
    """Also in chunks of one query, and with fewer than 20 training images."""
    monkeypatch.setattr(metrics, "SCORES", scores)
    random = np.random.default_rng(m)
    train, test = random.normal(size=(m, 8)), random.normal(size=(30, 8))
    labels = np.arange(m) % 4
    reference = KNeighborsClassifier(
        n_neighbors=min(20, m), metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(train, labels)
    ballot = knn.votes(torch.from_numpy(train), labels, torch.from_numpy(test), 4)
    expected = reference.predict_proba(test)
    np.testing.assert_allclose(ballot / ballot.sum(axis=1, keepdims=True), expected, rtol=1e-9)


def test_ranks_count_ties_and_absent_votes_as_errors():
    ballot = np.array([[3.0, 1, 0], [2, 2, 0], [1, 0, 0], [0, 0, 5]])
    true = np.array([0, 1, 2, 2])
    assert knn.vote_ranks(ballot, true).tolist() == [0, 1, 3, 0]


def test_command_writes_rows(world, tmp_path):
    registry = yaml.safe_load((world / "registry.yaml").read_text())
    registry["datasets"]["toy_classes"]["tasks"]["knn"] = ["top1", "mean_per_class"]
    (tmp_path / "registry.yaml").write_text(yaml.safe_dump(registry))
    arguments = ["--checkpoint", str(world / "runs/tiny"), "--datasets", "toy_classes"]
    arguments += ["--output", str(tmp_path), "--batch-size", "8", "--workers", "0"]
    command_line.main(arguments, tmp_path / "registry.yaml")
    rows = [json.loads(line) for line in (tmp_path / "tiny_knn.jsonl").read_text().splitlines()]
    assert [row["metric"] for row in rows] == ["top1", "mean_per_class"]
    assert all(row["n"] == 19 and 0 <= row["value"] <= 100 for row in rows)
    assert "20 nearest" in rows[0]["protocol"]


@pytest.mark.parametrize("method", ["clip", "supcon"])
def test_a_projection_that_is_not_trained_decides_nothing(world, tmp_path, method):
    """Two runs of one trunk with their own projections: alike where the trunk alone is trained."""
    registry = yaml.safe_load((world / "registry.yaml").read_text())
    registry["datasets"]["toy_classes"]["tasks"]["knn"] = ["top1", "mean_per_class"]
    (tmp_path / "registry.yaml").write_text(yaml.safe_dump(registry))
    found = []
    for name in ("one", "other"):
        run = write_run(tmp_path / name, seed=5)
        config = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"loss": {"name": method}}))
        weights = next(run.glob("checkpoints/*/model.safetensors"))
        state = load_file(weights)
        key = "model.image_projection.weight"
        if name == "other":
            state[key] = torch.zeros_like(state[key])
            state[key][0] = 1  # all images have one feature, up to its sign
        save_file(state, weights)
        command_line.main(
            ["--checkpoint", str(run), "--datasets", "toy_classes", "--output", str(tmp_path),
             "--batch-size", "8", "--workers", "0"], tmp_path / "registry.yaml",
        )  # fmt: skip
        rows = (tmp_path / f"{name}_knn.jsonl").read_text().splitlines()
        found.append([json.loads(row)["value"] for row in rows])
    assert (found[0] == found[1]) == (method == "supcon")


def test_nan_features_name_the_set():
    with pytest.raises(DataError, match="toy"):
        knn.check_finite(np.array([[np.nan]]), "toy")
