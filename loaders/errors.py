"""Errors that a person caused and can mend: each carries the exit code of the process.

Exit codes (the same in every command): 0 done, 2 wrong usage or configuration, 3 data or
pre-flight refused, 4 non-finite loss, 5 too many bad samples, 6 a rank stopped answering.
"""

import sys
from collections.abc import Callable

from loaders.printable import printable


class UserError(Exception):
    """Something the user can mend. The message says what, where, and what to do next."""

    exit_code = 3


class ConfigError(UserError):
    """A wrong flag, configuration key or value (exit 2)."""

    exit_code = 2


class DataError(UserError):
    """Data, a checkpoint or a setup that was refused before training starts (exit 3)."""

    exit_code = 3


class NonFiniteLoss(UserError):
    """The loss or a gradient became NaN or infinite (exit 4)."""

    exit_code = 4


class TooManyBadSamples(UserError):
    """More samples were unreadable than the configuration allows (exit 5)."""

    exit_code = 5


class LostRank(UserError):
    """Other ranks ended, stopped, or did not reach a collective operation in time (exit 6)."""

    exit_code = 6


def run_cli(main: Callable[[], None]) -> None:
    """Run `main`; turn a `UserError` into one line on stderr and its exit code."""
    try:
        main()
    except UserError as error:
        print(printable(f"error: {error}"), file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
