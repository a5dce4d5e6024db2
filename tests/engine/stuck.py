"""A rank of a job that reduces a number in each step, and does something else in step 3."""

import os
import signal
import sys
import time

from engine import dist
from engine.watch import Watch


def nap():
    time.sleep(300)


def main():
    behaviour, minutes = sys.argv[1], float(sys.argv[2])
    device = dist.initialise(minutes)
    watch = Watch(minutes, lambda line: None)
    try:
        for step in range(1, 10**9):
            watch.at(step, "working")
            if step == 3 and behaviour == "sleep":
                nap()
            if step == 3 and behaviour == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if step == 3 and behaviour == "fail":
                raise ValueError("no more")
            dist.max_over_ranks(step, device)
    except RuntimeError as error:
        raise watch.explain(error) or error from error
    except ValueError as error:
        watch.stop(f"{type(error).__name__}: {error}")
        raise
