"""USR1 and TERM set a flag; the loop acts on it at the edge of a step, on all ranks together.

`python -m engine.signals CODE` is what the scripts of slurm/ call when `srun` failed: it puts the
job back into the queue if the cluster, not the program, was the reason.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

if __package__ in (None, ""):  # if this is run as a file, Python puts engine/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from loaders.errors import UserError


class NotRequeued(UserError):
    """SLURM refused to put a stopped job back into the queue (exit 1, so that it ends FAILED)."""

    exit_code = 1


class StopRequest:
    """Catches SIGUSR1 (SLURM's warning before the time limit) and SIGTERM (preemption)."""

    def __init__(self):
        self.received = 0  # number of the signal; USR1 (10) and TERM (15) on Linux
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._catch)

    def ignore(self) -> None:
        """From here on both signals mean nothing: all is done and saved.

        While Python ends it gives signals back to the system, for which each is the end. The
        warning before the time limit would turn a finished training into a failed job.
        """
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _catch(self, number: int, _frame) -> None:
        self.received = number


def requeue(received: str) -> str:
    """Put this SLURM job back into the queue if the signal asks for it; returns what happened.

    Args:
        received: SIGUSR1, the warning before the time limit; or SIGTERM, which SLURM sends for
            preemption and for `scancel` alike. A job that its owner cancelled must stay
            cancelled, so SIGTERM requeues only what `scontrol show job` calls preempted.

    Raises:
        NotRequeued: SLURM refused. Exit code 0 would end the job COMPLETED, and the jobs that
            wait for it would take an unfinished run.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return "not a SLURM job: the same command continues"
    if received == "SIGTERM" and not preempted(_run("scontrol", "show", "job", "-o", job).stdout):
        return f"job {job} was not preempted, so it ends here; submit it again to continue"
    done = _run("scontrol", "requeue", job)
    if done.returncode != 0:
        raise NotRequeued(
            f"job {job} could not be put back into the queue ({done.stderr.strip()}); nothing is "
            "lost, submit the same command again"
        )
    return f"requeued job {job}"


def preempted(record: str) -> bool:
    """Whether a job is running on the grace time of a preemption.

    Args:
        record: the line of `scontrol show job -o`. A cancelled job is no longer RUNNING there; a
            preempted one is, until its grace time ends, and has a PreemptTime.
    """
    facts = dict(item.split("=", 1) for item in record.split() if "=" in item)
    return facts.get("JobState") == "RUNNING" and facts.get("PreemptTime", "None") != "None"


def settle(code: int) -> str:
    """Decide what becomes of a job whose `srun` ended with `code`, and do it; returns what it did.

    A program that refused its input (exit codes 2 to 5) would refuse it again. A TERM that came
    while Python was still starting (128 + 15) is a preemption like any other. After anything else
    a node may be gone: SLURM itself requeues the job when it marks the node DOWN, but the batch
    script ends earlier than that, as FAILED, when the other ranks lose their connection.

    Raises:
        NotRequeued: SLURM refused.
    """
    if 2 <= code <= 5:
        return f"exit code {code}: the same again would not help"
    if code == 128 + signal.SIGTERM:
        return requeue("SIGTERM")
    if code == 128 + signal.SIGUSR1:
        return (
            "the warning before the time limit came before training had started: ask for a longer "
            "--time, or for a later warning with --signal=USR1@SECONDS"
        )
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    probe = ("srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1")
    if _run(*probe, "--cpus-per-task=1", "true").returncode == 0:
        return f"exit code {code}, and all nodes answer: an error of the program, see above"
    return f"a node of the job does not answer: {requeue('SIGUSR1')}"


def _run(*command: str) -> subprocess.CompletedProcess:
    # A controller or a node that does not answer must not hold a job that is about to be killed.
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


if __name__ == "__main__":
    status = int(sys.argv[1])
    try:
        print(settle(status), flush=True)
    except NotRequeued as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(status)
