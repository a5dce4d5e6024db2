"""When a stopped SLURM job goes back into the queue."""

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


def test_term_outside_slurm_says_how_to_continue(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "the same command continues" in settle(128 + 15)
