"""When a stopped SLURM job goes back into the queue."""

from engine.signals import preempted

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
