"""slurm/chain.sh, slurm/eval_array.sbatch and slurm/data_prep.sbatch under a real SLURM."""

import re
import subprocess
import sys

import pytest

from tests.slurm.cluster import ROOT


def chain(cluster, folder, *arguments, **options):
    """Names and ids of the jobs that chain.sh submits for a run folder."""
    output = f"--output={folder}/%x_%A_%a.out"
    variables = {
        f"UNICL_{stage}": f"{output} {options.get(stage, '')} {more}"
        for stage, more in (
            ("PREPARE", "--cpus-per-task=1"), ("TRAIN", ""), ("EVALUATE", ""), ("TABLES", ""))
    }  # fmt: skip
    printed = cluster.run(
        "slurm/chain.sh", "configs/quickstart_unicl.yaml", str(folder / "run"), *arguments,
        "train.samples=512", "train.global_batch=128", f"data.image_text={folder}/run/data",
        **variables,
    )  # fmt: skip
    return [line.split() for line in printed.splitlines()]


def outputs(folder):
    return "\n".join(f"== {p.name}\n{p.read_text()}" for p in sorted(folder.glob("*.out")))


def test_chain_from_shards_to_the_table(cluster, tmp_path):
    jobs = chain(
        cluster, tmp_path,
        "--prepare", "slurm/quickstart_prepare.txt", "--evaluate", "slurm/quickstart_evaluate.txt",
        TRAIN="--gpus-per-node=2 --cpus-per-gpu=1",
    )  # fmt: skip
    assert [name for name, _ in jobs] == ["prepare", "prepare", "train", "evaluate", "tables"]
    for _, job in jobs:
        assert cluster.finished(job) == {"COMPLETED"}, outputs(tmp_path)
    assert "2 tasks on n1, 2 GPUs per node" in outputs(tmp_path)
    assert len(cluster.jobs(jobs[0][1])) == len(cluster.jobs(jobs[3][1])) == 2
    table = (tmp_path / "run/results/table.md").read_text()
    for measure in (
        ("emoji_twemoji", "zero-shot top-1"),
        ("openclipart_captions", "image→text R@1 "),
    ):
        row = next(line for line in table.splitlines() if all(word in line for word in measure))
        assert re.search(r"\d+\.\d \[\d+\.\d, \d+\.\d\]", row), table


def test_a_failed_stage_takes_the_rest_out_of_the_queue(cluster, tmp_path):
    prepare = tmp_path / "prepare.txt"
    prepare.write_text('data_prep/verify.py "$RUN/nowhere"\n')
    jobs = chain(
        cluster, tmp_path, "--prepare", str(prepare),
        "--evaluate", "slurm/quickstart_evaluate.txt", TRAIN="--ntasks=1",
    )  # fmt: skip
    assert [cluster.finished(job) for _, job in jobs] == [{"FAILED"}, *[{"CANCELLED"}] * 3]
    assert cluster.jobs(jobs[0][1])[0]["ExitCode"] == "3:0"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("array", ["--array=1-3", "--array=0-1", "--array=1-9", None])
def test_an_evaluation_array_runs_every_line_once(cluster, tmp_path, array):
    """And a line that fails keeps no other from running."""
    lines = [f'echo "line {n}" >> {tmp_path}/{n}' for n in range(5)]
    lines[1] += "; false"
    (tmp_path / "commands.txt").write_text("# comment\n\n" + "\n".join(lines) + "\n")
    job = cluster.submit(
        *([array] if array else []), f"--output={tmp_path}/%A_%a.out",
        "slurm/eval_array.sbatch", f"{tmp_path}/commands.txt",
    )  # fmt: skip
    states = cluster.finished(job)
    assert states == ({"FAILED", "COMPLETED"} if array else {"FAILED"}), outputs(tmp_path)
    assert [(tmp_path / str(n)).read_text() for n in range(5)] == [f"line {n}\n" for n in range(5)]


def test_an_array_with_gaps_is_refused(cluster, tmp_path):
    (tmp_path / "commands.txt").write_text("true\n")
    job = cluster.submit(
        "--array=1,3", "--output=/dev/null", "slurm/eval_array.sbatch", f"{tmp_path}/commands.txt"
    )
    assert cluster.finished(job) == {"FAILED"}


def test_a_preempted_command_runs_again(cluster, tmp_path):
    """TERM ends a command that does not catch it, before the grace time of the job is over."""
    (tmp_path / "commands.txt").write_text(f"echo begun >> {tmp_path}/log; exec sleep 300\n")
    job = cluster.submit(
        "--partition=low", "--exclusive", "--nodes=3", f"--output={tmp_path}/out",
        "slurm/eval_array.sbatch", f"{tmp_path}/commands.txt",
    )  # fmt: skip
    cluster.wait((tmp_path / "log").exists, "the command to begin")
    cluster.submit("--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.start_now(job)
    cluster.wait(lambda: (tmp_path / "log").read_text() == "begun\n" * 3 * 2, "its second start")
    # The script asks for it; on a busy machine SLURM may be quicker and do it by itself.
    said = (tmp_path / "out").read_text()
    assert "requeued job" in said or "DUE TO PREEMPTION" in said
    cluster.run("scancel", job)
    assert cluster.finished(job) == {"CANCELLED"}


def test_a_refused_requeue_is_an_error(cluster):
    """Else the job would end COMPLETED, and the next of the chain would take an unfinished run."""
    code = "from engine.signals import requeue; from loaders.errors import run_cli; "
    code += "run_cli(lambda: print(requeue('SIGUSR1')))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**cluster.environment, "SLURM_JOB_ID": "999999"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "could not be put back into the queue" in done.stderr
    assert "Invalid job id" in done.stderr
