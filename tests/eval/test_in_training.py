"""Evaluation during training: on all ranks, at checkpoints, the same numbers as afterwards."""

import json

import pytest

from eval import in_training, zero_shot
from eval.tasks import checkpoint
from loaders.errors import ConfigError, DataError
from tests import commands


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_equal_those_of_the_command_and_a_resumed_run_has_no_later_ones(tmp_path):
    """Two ranks evaluate at steps 2 and 4; one process evaluates the last checkpoint alone."""
    run = tmp_path / "run"
    settings = [
        "train.steps=4", "evals.every_steps=2", "evals.tasks={zero_shot: [emoji_twemoji]}",
        "--output-dir", str(run),
    ]  # fmt: skip
    first = commands.train(*settings, ranks=2)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "evaluated step 2: emoji_twemoji zero_shot mean_per_class" in first.stdout
    rows = read(run / "evals.jsonl")
    assert [row["step"] for row in rows] == [2, 2, 2, 4, 4, 4]
    assert not (run / ".evals").exists()

    zero_shot.main(
        ["--checkpoint", str(run), "--datasets", "emoji_twemoji", "--output", str(tmp_path / "r")]
    )
    alone = read(tmp_path / "r" / "run_zero_shot.jsonl")
    assert [(r["metric"], r["value"], r["checkpoint_hash"]) for r in alone] == [
        (r["metric"], r["value"], r["checkpoint_hash"]) for r in rows[3:]
    ]
    # What an attempt left that got further than its last checkpoint does not stay.
    kept = checkpoint.EVALS
    checkpoint._replace(run / kept, rows[:3], step=2)
    assert [row["step"] for row in read(run / kept)] == [2, 2, 2]


def test_wrong_plans_are_refused_before_training():
    with pytest.raises(ConfigError, match=r"evals\.zeroshot: one of zero_shot, retrieval, knn"):
        in_training.select({"zeroshot": ["emoji_twemoji"]})
    with pytest.raises(ConfigError, match="did you mean"):
        in_training.select({"zero_shot": ["emoji_twemojy"]})
    with pytest.raises(DataError, match="imagenet1k"):
        in_training.select({"zero_shot": ["imagenet1k"]})
