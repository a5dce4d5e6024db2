"""What each launcher says about a process, and that ranks that find the same error say it once."""

import contextlib
import os
import pty
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import train
from engine.launch import first_host, in_step, map_environment
from eval.tasks import evaluation
from loaders import errors
from tests.multiprocess import free_port

ROOT = Path(__file__).parent.parent.parent
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1",
            "MASTER_ADDR": "h", "MASTER_PORT": "9"}  # fmt: skip
BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "123456"}
# The shell of salloc with use_interactive_step, as SLURM 22.05 sets it.
INTERACTIVE = BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1",
                       "SLURM_STEP_NODELIST": "gpu03", "SLURM_TASK_PID": "7"}  # fmt: skip
TASK = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "gpu[03-04]",
        "SLURM_JOB_ID": "123456"}  # fmt: skip
ALONE = ("0", "1", "0", "127.0.0.1", None)
CASES = {
    "python": ({}, ALONE),
    "torchrun": (TORCHRUN, ("3", "4", "1", "h", "9")),
    "batch script": (BATCH, ALONE),
    "shell of salloc": (INTERACTIVE, ALONE),
    "shell of salloc, in words": (INTERACTIVE | {"SLURM_STEP_ID": "interactive"}, ALONE),
    "torchrun in the shell of salloc": (INTERACTIVE | TORCHRUN, ("3", "4", "1", "h", "9")),
    "srun": (TASK, ("5", "8", "1", "gpu03", "33456")),
    "srun --overlap": (TASK | {"SLURM_STEP_ID": "12"}, ("5", "8", "1", "gpu03", "33456")),
    "torchrun under srun": (TASK | TORCHRUN, ("3", "4", "1", "h", "9")),
    "srun --preserve-env, fewer tasks than the job": (
        TASK | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, ("1", "2", "1", "gpu03", "33456")
    ),
    "srun --preserve-env --ntasks=1 --pty bash": (
        TASK | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}, ALONE
    ),
    "mpirun, started through srun": (
        TASK | {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "16", "MASTER_ADDR": "h",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
        ("2", "16", "0", "h", "33456"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_environment_of_launchers(case):
    given, expected = CASES[case]
    env = dict(given)
    map_environment(env)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name, value in zip(names, expected, strict=True):
        assert value is None or env[name] == value, name
    assert env["MASTER_PORT"].isdigit()


def test_special_steps_are_no_tasks():
    """Values of slurm.h; the last of a task is SLURM_MAX_NORMAL_STEP_ID."""
    special = [0xFFFFFFFA, 0xFFFFFFFB, 0xFFFFFFFC, 0xFFFFFFFD, 0xFFFFFFFE, 0xFFFFFFFF]
    special += ["batch", "interactive", "extern", "pending", ""]
    assert not any(in_step({"SLURM_STEP_ID": str(step)}) for step in special)
    assert not in_step({})
    assert all(in_step({"SLURM_STEP_ID": str(step)}) for step in (0, 7, 0xFFFFFFF0))


def test_missing_address_is_refused():
    with pytest.raises(errors.ConfigError, match="MASTER_ADDR"):
        map_environment({"RANK": "1", "WORLD_SIZE": "2"})
    # The nodes of the step that started mpirun's daemons are not those of its ranks.
    with pytest.raises(errors.ConfigError, match="MASTER_ADDR"):
        map_environment(TASK | {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "16"})


@contextlib.contextmanager
def terminal():
    """Standard input is a terminal."""
    kept, (leader, follower) = os.dup(0), pty.openpty()
    os.dup2(follower, 0)
    try:
        yield
    finally:
        os.dup2(kept, 0)
        for descriptor in (kept, leader, follower):
            os.close(descriptor)


def test_a_shell_in_the_terminal_of_many_tasks_is_refused():
    """`srun --ntasks=8 --pty bash`: only the shell of task 0 lives on."""
    shell = TASK | {"SLURM_PROCID": "0", "SLURM_TASK_PID": "1"}
    map_environment(dict(shell))  # a script of `srun`
    with terminal():
        with pytest.raises(errors.ConfigError, match=r"task 0 of the 8 .*torchrun"):
            map_environment(dict(shell))
        for legal in (
            {"SLURM_TASK_PID": str(os.getpid())},  # srun --pty python
            {"RANK": "0", "WORLD_SIZE": "1"},
            {"SLURM_STEP_NUM_TASKS": "1"},
        ):
            map_environment(shell | legal)


def test_first_host():
    assert first_host("node7") == "node7"
    assert first_host("gpu[03-05,07],login1") == "gpu03"


@pytest.fixture
def place(monkeypatch):
    """Sets variables of a launcher for this process; all of them are gone after the test."""
    for name in (*TORCHRUN, *INTERACTIVE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return lambda variables: [monkeypatch.setenv(*item) for item in variables.items()]


def test_evaluation_in_the_shell_of_salloc_is_one_process(place):
    place(INTERACTIVE)
    assert evaluation.make_accelerator().num_processes == 1
    assert "RANK" not in os.environ


def said(capsys, function):
    """Exit code and stderr of a command."""
    with pytest.raises(SystemExit) as caught:
        errors.run_cli(function)
    return caught.value.code, capsys.readouterr().err


def test_a_rank_that_nobody_else_ends_speaks_itself(place, monkeypatch, capsys, tmp_path):
    """Task 5 of a step, whose launcher does not end it: with its name, and only after waiting."""
    waits = []
    monkeypatch.setattr(errors.time, "sleep", waits.append)
    place(TASK | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")})
    config = str(ROOT / "tests/engine/tiny.yaml")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", config, "train.step=5"])
    code, words = said(capsys, train.main)
    assert (code, waits) == (2, [errors.HEAD_START + errors.INTERVAL])
    assert words.startswith("error: rank 5 on ")
    assert "nearest is 'train.steps'" in words
    monkeypatch.setattr(sys, "argv", ["train.py", "--confg", config])
    code, words = said(capsys, train.main)
    assert (code, len(waits)) == (2, 2)
    assert "required: --config" in words

    def lost():
        raise errors.LostRank("rank 0 ended")

    code, words = said(capsys, lost)
    assert (code, len(waits)) == (6, 2)  # what each rank knows differs


WRONG = """
import os, sys, time
from pathlib import Path
from engine.signals import StopRequest
from loaders import errors

errors.HEAD_START = 1000
StopRequest()  # takes TERM, as in training

def main():
    here = Path(sys.argv[1])
    if os.environ["RANK"] == "1":
        here.touch()
    while not here.exists():
        time.sleep(0.05)
    raise errors.ConfigError("unknown key 'train.step'")

errors.run_cli(main)
"""


def test_ranks_of_torchrun_say_an_error_once(tmp_path):
    """Rank 1 finds it first, waits, and is ended without a word when rank 0 has said it."""
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    port = free_port()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
         str(port), str(script), str(tmp_path / "here")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    lines = [line.strip() for line in done.stderr.splitlines()]
    assert [line for line in lines if line.startswith("error:")] == [
        "error: unknown key 'train.step'"
    ], done.stderr
    # The launcher's own report ends with the reason, and both ranks end with our code.
    assert lines[-2:] == ["traceback : unknown key 'train.step'", "=" * len(lines[-1])]
    assert sum(line.startswith("exitcode  : 2 (") for line in lines) == 2
    assert done.returncode == 1  # torchrun's, whatever ours is


@pytest.mark.filterwarnings("ignore:.engine.dist. found in sys.modules")  # this process has it
def test_the_old_name_of_the_check(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["engine/dist.py", "--check", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("engine.dist", run_name="__main__", alter_sys=True)
    said = capsys.readouterr()
    assert caught.value.code == 0
    assert "usage: python -m engine.dist_check" in said.out
    assert "is now `python -m engine.dist_check`" in said.err
