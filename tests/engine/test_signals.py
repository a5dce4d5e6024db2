"""When a stopped SLURM job goes back into the queue."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine.signals import preempted, settle

# Lines of `scontrol show job -o` of SLURM 22.05, shortened to the fields around those that count.
RUNNING = (
    "JobId=7 JobName=unicl UserId=root(0) Requeue=1 Restarts=0 BatchFlag=1 JobState=RUNNING "
    "Reason=None PreemptEligibleTime=2026-11-21T07:00:00 PreemptTime={} SuspendTime=None"
)


def test_a_preempted_job_is_running_with_a_preemption_time():
    assert preempted(RUNNING.format("2026-11-21T07:05:00"))


def test_a_cancelled_or_undisturbed_job_is_not_preempted():
    assert not preempted(RUNNING.format("None"))
    cancelled = RUNNING.format("2026-11-21T07:05:00").replace("=RUNNING", "=CANCELLED")
    assert not preempted(cancelled)
    assert not preempted("slurm_load_jobs error: Invalid job id specified")


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_what_the_program_refused_is_not_tried_again(code):
    assert settle(code) == f"exit code {code}: the same again would not help"


def test_a_warning_during_start_asks_for_more_time():
    """Requeued, the job would be warned again, for ever."""
    assert "longer --time" in settle(128 + 10)


AT_THE_VERY_END = """
import os, signal, sys

from engine.signals import StopRequest

class Last:
    def __del__(self, kill=os.kill, own=os.getpid()):  # when handlers are taken away already
        kill(own, signal.SIGUSR1)

last, stop = Last(), StopRequest()
if sys.argv[1] == "finished":
    stop.ignore()
"""


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("not", -10)])
def test_a_signal_while_python_ends_does_not_fail_a_finished_training(state, code):
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", AT_THE_VERY_END, state], cwd=root, check=False)
    assert done.returncode == code


def test_term_outside_slurm_says_how_to_continue(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "the same command continues" in settle(128 + 15)
