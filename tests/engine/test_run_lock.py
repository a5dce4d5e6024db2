"""Two runs on one folder: the second waits, and goes on only when the first has ended."""

import os
import subprocess
import sys
import time

import pytest

from engine.run_lock import NAME, RunLock
from loaders.errors import DataError
from tests import commands
from tests.commands import ROOT

# Holds the folder, and leaves a child that outlives it, as a data worker may.
HOLD = """
import os, sys, time
from pathlib import Path
from engine.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]), print)
child = os.fork()
if child:
    print("held", child, flush=True)
time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path, and the id of its child."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    word, child = process.stdout.readline().split()
    assert word == "held"
    yield process
    process.kill()
    process.wait()
    os.kill(int(child), 9)


def test_the_second_run_is_refused_and_the_first_one_named(holder, tmp_path):
    said = []
    with pytest.raises(DataError, match=rf"another run .*process {holder.pid} on .*output_dir"):
        RunLock(tmp_path, said.append, patience=1)
    assert len(said) == 1
    assert f"process {holder.pid}" in said[0]


def test_a_killed_run_leaves_no_lock_though_its_children_live(holder, tmp_path):
    holder.kill()
    holder.wait()
    RunLock(tmp_path, pytest.fail, patience=0)
    assert f"process {os.getpid()} on " in (tmp_path / NAME).read_text()


def wait_for_text(run, words):
    """The line of stderr with these words."""
    while words not in run.text("stderr"):
        assert run.poll() is None, "ended without waiting"
        time.sleep(0.05)
    return next(line for line in run.text("stderr").splitlines() if words in line)


def test_training_waits_for_the_folder_before_it_touches_it(holder, tmp_path):
    run = commands.training("train.steps=1", "--output-dir", tmp_path)
    line = wait_for_text(run, "is held by")
    assert f"process {holder.pid}" in line
    time.sleep(1)
    assert run.poll() is None
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    holder.kill()
    run.communicate(timeout=100)
    assert run.returncode == 0
    assert (tmp_path / "checkpoints/LAST_GOOD").exists()
