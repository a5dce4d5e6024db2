"""USR1 and TERM set a flag; the loop acts on it at the edge of a step, on all ranks together."""

import os
import signal
import subprocess


class StopRequest:
    """Catches SIGUSR1 (SLURM's warning before the time limit) and SIGTERM (preemption)."""

    def __init__(self):
        self.received = 0  # number of the signal; USR1 (10) and TERM (15) on Linux
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._catch)

    def _catch(self, number: int, _frame) -> None:
        self.received = number


def requeue(received: str) -> str:
    """Put this SLURM job back into the queue if the signal asks for it; says what happened.

    Args:
        received: SIGUSR1, the warning before the time limit; or SIGTERM, which SLURM sends for
            preemption and for `scancel` alike. A job that its owner cancelled must stay
            cancelled, so SIGTERM requeues only what `scontrol show job` calls preempted.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return "not a SLURM job: the same command continues"
    if received == "SIGTERM" and not preempted(_scontrol("show", "job", "-o", job).stdout):
        return f"job {job} was not preempted, so it ends here; submit it again to continue"
    done = _scontrol("requeue", job)
    return f"requeued job {job}" if done.returncode == 0 else f"scontrol requeue: {done.stderr}"


def preempted(record: str) -> bool:
    """Whether a job is running on the grace time of a preemption.

    Args:
        record: the line of `scontrol show job -o`. A cancelled job is no longer RUNNING there; a
            preempted one is, until its grace time ends, and has a PreemptTime.
    """
    facts = dict(item.split("=", 1) for item in record.split() if "=" in item)
    return facts.get("JobState") == "RUNNING" and facts.get("PreemptTime", "None") != "None"


def _scontrol(*arguments: str) -> subprocess.CompletedProcess:
    # A controller that does not answer must not hold a job that is about to be killed.
    try:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(arguments, 1, "", str(error))
