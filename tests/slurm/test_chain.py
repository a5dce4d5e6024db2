"""slurm/chain.sh, slurm/eval_array.sbatch and slurm/data_prep.sbatch under a real SLURM."""

import pytest


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
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert "unicl" in table
    assert len(rows) > 2
    print(table)


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
