"""Several evaluations in one process: the rows of a process for each, and what is refused."""

import json

import pytest
import yaml

from eval import knn, several, zero_shot
from loaders.errors import ConfigError


def rows(folder):
    texts = [path.read_text() for path in folder.glob("*.jsonl")]
    found = [json.loads(line) for text in texts for line in text.splitlines()]
    for row in found:
        row.pop("date")
    return sorted(found, key=lambda row: (row["task"], row["metric"]))


def registered(world, folder):
    """The tests' sets as a file for --registry, k-NN among their tasks."""
    registry = yaml.safe_load((world / "registry.yaml").read_text())
    registry["datasets"]["toy_classes"]["tasks"]["knn"] = ["top1"]
    path = folder / "registry.yaml"
    path.write_text(yaml.safe_dump(registry))
    return ["--datasets", "toy_classes", "--registry", str(path), "--workers", "0"]


def test_rows_are_those_of_a_command_each(world, tmp_path):
    options, model = registered(world, tmp_path), str(world / "runs/tiny")
    apart, together = tmp_path / "apart", tmp_path / "together"
    for command in (zero_shot, knn):
        command.main([*options, "--checkpoint", model, "--output", str(apart)])
    words = " ".join(options)
    given = ["--checkpoint", model, "--output", str(together)]
    several.main([*given, "--evaluate", f"zero_shot {words}", "--evaluate", f"knn {words}"])
    assert {row["task"] for row in rows(together)} == {"zero_shot", "knn"}
    assert rows(together) == rows(apart)


def test_one_that_is_refused_is_named_and_the_others_are_made(world, tmp_path, capsys):
    words = " ".join(registered(world, tmp_path))
    given = ["--checkpoint", str(world / "runs/tiny"), "--output", str(tmp_path)]
    runs = ["--evaluate", f"retrieval {words}", "--evaluate", f"knn {words}"]
    with pytest.raises(several.EvaluationsFailed, match="1 of 2 evaluations failed: retrieval"):
        several.main([*given, *runs])
    said = capsys.readouterr().err
    assert f"error: retrieval {words}: data set toy_classes has no task retrieval" in said
    assert {row["task"] for row in rows(tmp_path)} == {"knn"}


@pytest.mark.parametrize("run", ["", "zeroshot --datasets x"])
def test_a_word_that_is_no_command_is_refused_before_anything_is_made(tmp_path, run):
    given = ["--checkpoint", str(tmp_path), "--output", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="it begins with one of zero_shot, linear_probe"):
        several.main([*given, "--evaluate", "knn --datasets quickstart", "--evaluate", run])
    assert not (tmp_path / "out").exists()
