"""USR1 and TERM set a flag; the loop acts on it at the edge of a step, on all ranks together."""

import os
import signal
import subprocess


class StopRequest:
    """Catches SIGUSR1 (SLURM's warning before the time limit) and SIGTERM (preemption)."""

    def __init__(self):
        self.received: str | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._catch)

    def _catch(self, number: int, _frame) -> None:
        self.received = signal.Signals(number).name


def requeue() -> str:
    """Put this SLURM job back into the queue; one line that says what happened.

    For SIGUSR1 only. SIGTERM may mean that the owner cancelled the job, which must then stay
    cancelled; a job that ends on it is continued by submitting it again.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return "not a SLURM job: the same command continues"
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    return f"requeued job {job}" if done.returncode == 0 else f"scontrol requeue: {done.stderr}"
