"""Several evaluations of the same models in one process: `python -m eval.several --checkpoint RUN
--output DIR --evaluate "zero_shot --datasets quickstart" --evaluate "knn --datasets quickstart"`.

What --evaluate takes is a command of eval/ with its options, but for the two that are given here. A
process of its own for each would load torch and the towers again, which for small sets is most of
the time. One that cannot be made is named, the others are made, and the exit code is that of the
first which failed.
"""

import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put eval/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from loaders.errors import CommandParser, ConfigError, UserError, launched_rank, run_cli
from loaders.printable import printable
from loaders.specs import as_path

COMMANDS = ("zero_shot", "linear_probe", "knn", "retrieval", "finetune")


class EvaluationsFailed(UserError):
    """Some evaluations could not be made; the message names them."""

    alike = True

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def parser() -> CommandParser:
    """Arguments of this command."""
    made = CommandParser(
        prog="python -m eval.several", description="Several evaluations in one process."
    )
    made.add_argument("--checkpoint", nargs="+", required=True, type=as_path, metavar="RUN")
    made.add_argument("--output", required=True, type=as_path, metavar="DIR", help="result rows")
    made.add_argument(
        "--evaluate", action="append", required=True, metavar="'COMMAND OPTIONS'",
        help=f"{', '.join(COMMANDS)} with its --datasets and options; give it several times",
    )  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Command line.

    Raises:
        ConfigError: an --evaluate that names no command, before anything is made.
            EvaluationsFailed: at the end, when some were refused.
    """
    args = parser().parse_args(argv)
    words = [shlex.split(run) for run in args.evaluate]
    for run, parts in zip(args.evaluate, words, strict=True):
        if not parts or parts[0] not in COMMANDS:
            raise ConfigError(f"--evaluate {run!r}: it begins with one of {', '.join(COMMANDS)}")
    common = ["--checkpoint", *map(str, args.checkpoint), "--output", str(args.output)]
    failures: list[tuple[str, UserError]] = []
    for run, parts in zip(args.evaluate, words, strict=True):
        command = importlib.import_module(f"eval.{parts[0]}")
        try:
            command.main([*parts[1:], *common])
        except UserError as error:
            if not error.alike:  # the other ranks are elsewhere
                raise
            failures.append((run, error))
            if launched_rank() == 0:
                print(printable(f"error: {run}: {error}"), file=sys.stderr, flush=True)
    if failures:
        names = "; ".join(run for run, _ in failures)
        raise EvaluationsFailed(
            f"{len(failures)} of {len(words)} evaluations failed: {names}", failures[0][1].exit_code
        )


if __name__ == "__main__":
    run_cli(main)
