"""slurm/study.sbatch under a real SLURM: a task makes its cells, and its failure is its own."""

import json
import re

import pytest

from studies import _cells, _evaluations, _study
from tests.studies.parts import TINY, study_file

OVERRIDES = ["data.workers=0", "train.steps=4"]


def outputs(folder):
    return "\n".join(f"== {p.name}\n{p.read_text()}" for p in sorted(folder.rglob("*out*.txt")))


@pytest.mark.soak  # the longest of the real SLURM
def test_an_array_makes_one_cell_a_task_with_two_ranks(cluster, tmp_path):
    arms = {
        "one": {"config": TINY},
        "bad": {"config": TINY, "overrides": [f"data.image_label={tmp_path / 'nowhere'}"]},
    }
    evaluations = [{"task": "retrieval", "datasets": ["openclipart_captions"]}]
    path = study_file(
        tmp_path, arms=arms, seeds=[3], evaluations=evaluations, overrides=OVERRIDES,
        output=str(tmp_path / "out"),
    )  # fmt: skip
    job = cluster.submit(
        "--array=5-6", "--ntasks-per-node=2", "--cpus-per-task=1",
        f"--output={tmp_path}/out_%a.txt", "slurm/study.sbatch", str(path),
    )  # fmt: skip
    assert cluster.finished(job) == {"COMPLETED", "FAILED"}, outputs(tmp_path)
    codes = {record["ArrayTaskId"]: record["ExitCode"] for record in cluster.jobs(job)}
    text = (tmp_path / "out_6.txt").read_text()
    # That of srun: 3, or on a slow machine that of the rank that still started: 143, 137.
    code = re.search(r"^exit code (3|137|143): srun ", text, flags=re.MULTILINE)
    assert code, text
    assert codes == {"5": "0:0", "6": f"{code[1]}:0"}, outputs(tmp_path)

    study = _study.read(path)
    one, bad = _cells.make(study, path, _evaluations.plan(study), tmp_path / "out")
    assert one.trained()
    assert not one.lacking()
    starts = json.loads((one.run / "environment.json").read_text())["starts"]
    assert [start["ranks"] for start in starts] == [2]
    assert [line["what"] for line in one.usage()] == ["train", "retrieval"]
    assert one.usage()[0]["cpu_seconds"] is None  # that of srun would say nothing
    assert "nowhere" in (bad.notes / "failure.txt").read_text()
    assert "1 of 1 cells failed: bad-seed3" in text


@pytest.mark.parametrize("array", ["--array=1,3", "--array=0-4:2"])
def test_an_array_with_gaps_is_refused(cluster, tmp_path, array):
    path = study_file(tmp_path, output=str(tmp_path / "out"))
    job = cluster.submit(array, "--ntasks=1", "--output=/dev/null", "slurm/study.sbatch", str(path))
    assert cluster.finished(job) == {"FAILED"}
    assert not (tmp_path / "out").exists()
