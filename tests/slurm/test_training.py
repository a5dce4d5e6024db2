"""slurm/train.sbatch under a real SLURM: whatever ends the job, the run goes on to the last bit."""

import contextlib
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from tests.slurm.cluster import FINAL, ROOT

TINY = "tests/engine/tiny.yaml"
STEPS = 60
SETTINGS = (
    f"train.steps={STEPS}",
    "log.save_every_steps=20",
    "deepspeed=ds_configs/zero1_fp32.json",
)
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


class Job:
    """A training job with its run folder and the output of all its lives."""

    def __init__(self, cluster, folder, *options):
        self.cluster, self.folder, self.output = cluster, folder / "run", folder / "job.out"
        folder.mkdir(exist_ok=True)
        self.options = options
        self.submit()

    def submit(self):
        self.id = self.cluster.submit(
            *self.options, f"--output={self.output}", "slurm/train.sbatch", TINY,
            f"output_dir={self.folder}", *SETTINGS,
        )  # fmt: skip

    def text(self):
        return self.output.read_text() if self.output.exists() else ""

    def trace(self):
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        keys = ("step", "samples", "loss", "floor", "lr", "scale", "grad_norm", "mean_positives")
        return [{key: json.loads(line)[key] for key in keys} for line in lines if line[-1] == "}"]

    def wait_for_step(self, step):
        def reached():
            assert not self.cluster.states(self.id) & FINAL, self.text()
            return len(self.trace()) >= step

        self.cluster.wait(reached, f"step {step} of job {self.id}")

    def wait_for_text(self, words):
        def written():
            alive = not self.cluster.states(self.id) & FINAL
            assert words in self.text() or alive, self.text()
            return words in self.text()

        self.cluster.wait(written, f"{words!r} in {self.output}")

    def last_good(self):
        name = (self.folder / "checkpoints/LAST_GOOD").read_text().strip()
        return json.loads((self.folder / f"checkpoints/{name}/run.json").read_text())["step"]

    def weights(self):
        return load_file(self.folder / f"checkpoints/step_{STEPS:07d}/model.safetensors")


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory):
    """An undisturbed run on two nodes, one pretended GPU each."""
    folder = tmp_path_factory.mktemp("whole")
    job = Job(cluster, folder, "--nodes=2", "--gres=gpu:1", "--cpus-per-gpu=1")
    assert cluster.finished(job.id) == {"COMPLETED"}, job.text()
    return job


def assert_equal_to_the_last_bit(job, whole):
    assert job.trace() == whole.trace()
    first, second = whole.weights(), job.weights()
    assert first.keys() == second.keys()
    assert all((first[key] == second[key]).all() for key in first)


def test_two_nodes_train_to_the_end(whole):
    assert "2 tasks on n[1-2], 1 GPUs per node" in whole.text()
    assert (
        json.loads((whole.folder / "ds_config.json").read_text())["zero_optimization"]["stage"] == 1
    )
    facts = json.loads((whole.folder / f"checkpoints/step_{STEPS:07d}/run.json").read_text())
    assert (facts["world_size"], facts["zero_stage"]) == (2, 1)
    assert [record["step"] for record in whole.trace()] == list(range(1, STEPS + 1))
    assert len({record["loss"] for record in whole.trace()}) == STEPS


def test_preemption_and_the_time_limit_requeue_after_a_checkpoint(cluster, whole, tmp_path):
    """First life preempted, second warned before its time limit, third to the end."""
    job = Job(
        cluster, tmp_path, *TWO_NODES, "--partition=low", "--time=10", "--signal=USR1@60"
    )  # fmt: skip
    job.wait_for_step(5)
    urgent = cluster.submit("--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true")
    job.wait_for_text("stopped by SIGTERM after a checkpoint")
    assert cluster.finished(urgent) == {"COMPLETED"}
    cluster.start_now(job.id)
    first = job.last_good()
    assert 5 <= first < STEPS - 10

    job.wait_for_text(f"continuing {job.folder} after step {first}")
    job.wait_for_step(first + 5)
    with frozen(cluster.tasks(job.id)) as ranks:  # SLURM looks at time limits every 30 s only
        seconds = time.time() - cluster_time(cluster.jobs(job.id)[0]["StartTime"])
        limit = math.ceil((seconds + 40) / 60)  # in whole minutes
        cluster.run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={limit}")
        cluster.wait(lambda: all(warned(rank) for rank in ranks), "USR1 at both ranks")
    job.wait_for_text("stopped by SIGUSR1 after a checkpoint")
    second = job.last_good()
    assert first + 5 <= second < STEPS
    cluster.start_now(job.id, "TimeLimit=10")  # else the next warning comes after a minute at most

    assert cluster.finished(job.id) == {"COMPLETED"}, job.text()
    assert cluster.jobs(job.id)[0]["Restarts"] == "2"
    assert f"continuing {job.folder} after step {second}" in job.text()
    assert_equal_to_the_last_bit(job, whole)


@contextlib.contextmanager
def frozen(ranks):
    """The ranks do nothing meanwhile; a signal that comes waits for them."""
    assert len(ranks) == 2
    for rank in ranks:
        rank.suspend()
    try:
        yield ranks
    finally:
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.resume()


def warned(rank):
    """Whether SIGUSR1 waits for a frozen process, or SLURM woke it and it has already ended."""
    try:
        status = Path(f"/proc/{rank.pid}/status").read_text()
    except OSError:
        return True
    pending = int(re.search(r"ShdPnd:\s*(\w+)", status).group(1), 16)
    return pending & 1 << (signal.SIGUSR1 - 1)


def cluster_time(text):
    """Seconds since the epoch of a time as scontrol prints it."""
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))


def test_a_lost_node_requeues_and_scancel_does_not(cluster, whole, tmp_path):
    """First life loses a node, second is cancelled, a new job goes on to the end."""
    job = Job(cluster, tmp_path, *TWO_NODES)
    job.wait_for_step(22)
    assert cluster.jobs(job.id)[0]["NodeList"] == "n[1-2]"
    cluster.kill_node("n2")
    saved = job.last_good()
    assert saved in (20, 40)
    # What the controller does by itself once n2 has not answered for SlurmdTimeout.
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=killed")
    cluster.start_now(job.id)
    job.wait_for_text(f"continuing {job.folder} after step {saved}")
    assert cluster.jobs(job.id)[0]["NodeList"] == "n[1,3]"

    job.wait_for_step(saved + 8)
    cluster.run("scancel", job.id)
    assert cluster.finished(job.id) == {"CANCELLED"}
    job.wait_for_text("was not preempted, so it ends here")
    assert cluster.jobs(job.id)[0]["Restarts"] == "1"
    cancelled = job.last_good()
    assert saved + 8 <= cancelled < STEPS

    cluster.start_node("n2")
    cluster.wait(cluster.idle, "n2 to come back")
    job.submit()
    assert cluster.finished(job.id) == {"COMPLETED"}, job.text()
    assert f"continuing {job.folder} after step {cancelled}" in job.text()
    assert_equal_to_the_last_bit(job, whole)


def test_the_check_shows_the_ranks_and_their_nodes(cluster, tmp_path):
    """`python -m engine.dist_check` as docs/cluster.md gives it."""
    output = tmp_path / "check.out"
    job = cluster.submit(
        *TWO_NODES,
        f"--output={output}",
        "--wrap",
        f"srun --kill-on-bad-exit=1 {sys.executable} -m engine.dist_check",
    )
    assert cluster.finished(job) == {"COMPLETED"}, output.read_text()
    lines = output.read_text().splitlines()
    rows = [line.split() for line in lines if line.startswith(("0 ", "1 "))]
    assert [(row[0], row[2]) for row in rows] == [("0", "n1"), ("1", "n2")]
    port = 10000 + int(job) % 50000
    assert any(
        re.fullmatch(rf"ranks 2, nodes 2, rank 0 at \S+ port {port}", line) for line in lines
    )
    assert lines[-1].startswith("all-reduce over 2 ranks: 3, as expected")


WHO = """
import os
from engine.launch import map_environment
map_environment(os.environ)
names = "SLURM_STEP_ID", "SLURM_NTASKS", "RANK", "WORLD_SIZE"
print("I am", *(os.environ[name] for name in names))
"""


def test_a_shell_of_salloc_is_one_process_and_srun_in_it_four(cluster, tmp_path):
    script = tmp_path / "who.py"
    script.write_text(WHO)
    ask = f"{sys.executable} {script}"
    # The program `script` gives it the terminal that it wants.
    shell = subprocess.run(
        ["script", "-qec", "salloc --nodes=2 --ntasks=4", "/dev/null"],
        input=f"{ask}; srun {ask} </dev/null; exit\n", capture_output=True, text=True,
        timeout=60, check=False,
        env=cluster.environment | {"SHELL": "/bin/bash", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    said = [line.split() for line in shell.stdout.splitlines()]
    answers = sorted(line[2:] for line in said if line[:2] == ["I", "am"])
    tasks = [["0", "4", str(rank), "4"] for rank in range(4)]
    assert answers == [*tasks, ["4294967290", "4", "0", "1"]], shell.stdout + shell.stderr


@pytest.mark.soak
def test_a_start_on_a_dead_node_is_not_the_end(cluster, tmp_path):
    """srun fails before the controller knows; the job waits for another set of nodes."""
    cluster.kill_node("n2")
    job = Job(cluster, tmp_path, *TWO_NODES, "--nodelist=n1,n2")
    job.wait_for_text("a node of the job does not answer: requeued job")
    assert not cluster.states(job.id) & FINAL
    cluster.run("scancel", job.id)
    cluster.start_node("n2")
    cluster.wait(cluster.idle, "n2 to come back")


REFUSED = {
    "no tasks": (("--nodes=2",), "neither GPUs nor tasks"),
    "tasks and GPUs differ": (
        ("--gpus-per-node=2", "--ntasks-per-node=1", "--cpus-per-gpu=1"), "one task per GPU"),
    "too few CPUs": (("--gpus-per-node=2",), "1 CPUs for 2 tasks"),
}  # fmt: skip


def test_an_unclear_shape_is_refused(cluster, tmp_path):
    """All at the same time, since each takes seconds of SLURM's."""
    jobs = {
        case: cluster.submit(*options, f"--output={tmp_path / case}", "slurm/train.sbatch", TINY)
        for case, (options, _) in REFUSED.items()
    }
    for case, job in jobs.items():
        assert cluster.finished(job) == {"FAILED"}, case
        assert cluster.jobs(job)[0]["ExitCode"] == "2:0", case
        assert REFUSED[case][1] in (tmp_path / case).read_text()


def test_directives_stand_before_the_first_command():
    """sbatch ignores later ones without a word."""
    for path in sorted((ROOT / "slurm").glob("*.sbatch")):
        lines = path.read_text().splitlines()
        first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
        assert any(line.startswith("#SBATCH") for line in lines[:first]), path
        assert not any(line.startswith("#SBATCH") for line in lines[first:]), path
