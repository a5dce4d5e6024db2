"""Errors that a person caused and can mend: each carries the exit code of the process.

Exit codes (the same in every command): 0 done, 2 wrong usage or configuration, 3 data or
pre-flight refused, 4 non-finite loss, 5 too many bad samples, 6 a rank stopped answering.

What all ranks of a job find alike is said once. Ranks cannot ask one another before they have met,
and a launcher ends the others as soon as one has failed, so: no rank fails before the reason has
been said. Rank 0 says it at once. Another rank waits for the launcher to end it, which it does
without a word; if nobody has failed by then, it is the one that knows, and it says so.
"""

import argparse
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from loaders.printable import printable

# Where launchers put the number of a process, and its number on its node.
_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK")
_LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID")
# Seconds that rank 0 may come later than others to the same place; and what a launcher takes to end
# the other processes of its node (deepspeed looks once a second).
HEAD_START, INTERVAL = 5.0, 2.0


class UserError(Exception):
    """Something the user can mend. The message says what, where, and what to do next."""

    exit_code = 3
    alike = False  # whether ranks that raise it mean the same, so that one may speak for all


class ConfigError(UserError):
    """A wrong flag, configuration key or value (exit 2)."""

    exit_code = 2
    alike = True


class DataError(UserError):
    """Data, a checkpoint or a setup that was refused before training starts (exit 3)."""

    exit_code = 3
    alike = True


class NonFiniteLoss(UserError):
    """The loss or a gradient became NaN or infinite (exit 4)."""

    exit_code = 4


class TooManyBadSamples(UserError):
    """More samples were unreadable than the configuration allows (exit 5)."""

    exit_code = 5


class LostRank(UserError):
    """Other ranks ended, stopped, or did not reach a collective operation in time (exit 6)."""

    exit_code = 6


class CommandParser(argparse.ArgumentParser):
    """For commands of several processes: what is wrong with the arguments is said once."""

    def error(self, message: str) -> NoReturn:
        """Usage and `message` to stderr, exit code 2."""
        wait_for_turn(ConfigError.exit_code)
        super().error(message)


def run_cli(main: Callable[[], None]) -> None:
    """Run `main`; turn a `UserError` into one line on stderr and its exit code.

    Of several ranks that fail with a `ConfigError` or `DataError`, one speaks.
    """
    try:
        main()
    except UserError as error:
        if error.alike:
            wait_for_turn(error.exit_code)
        text = str(error)
        if rank := launched_rank():
            own = f"rank {rank} on {socket.gethostname()}"
            text = text if text.startswith(own) else f"{own}: {text}"
        print(printable(f"error: {text}"), file=sys.stderr, flush=True)
        _tell_torchrun(printable(text))
        raise SystemExit(error.exit_code) from None


def launched_rank() -> int:
    """Number of this process as its launcher gave it; 0 where there is none."""
    return _number(_RANK)


def wait_for_turn(exit_code: int) -> None:
    """Return when this rank should say an error that others may have found too.

    At once on rank 0. Later on others, one after the other on each node, unless the launcher ends
    them before, because a rank has failed: then the process exits, silently, with `exit_code`.
    """
    if launched_rank() == 0:
        return

    def ended(*_) -> NoReturn:
        raise SystemExit(exit_code)

    # SLURM's exit code of a step is the highest of its tasks; that of a signal would hide ours.
    before = signal.signal(signal.SIGTERM, ended)
    time.sleep(HEAD_START + INTERVAL * _number(_LOCAL_RANK))
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _number(names: tuple[str, ...]) -> int:
    given = (os.environ.get(name, "") for name in names)
    return next((int(number) for number in given if number.isdecimal()), 0)


def _tell_torchrun(text: str) -> None:
    """Into the file that torchrun reads, so that the last line of its own report says why."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        facts = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        with open(path, "w") as file:
            json.dump({"message": facts}, file)
