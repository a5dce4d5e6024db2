"""Make what a study still lacks: `python -m studies.run studies/family.yaml`.

Trains and evaluates each cell (an arm with a seed) that is not done. A run that was killed goes on
from its last checkpoint, and an evaluation whose rows are there is not repeated, so the same
command continues after anything. A cell that fails is written down and shown, and the others go on;
the exit code is then that of the failed process, or 1 where they differ.

    --dry-run                lists the missing cells and their cost, and stops
    --only unicl --seeds 0   one run of it
    --set key.sub=value      an override of every run, say deepspeed=ds_configs/zero1_bf16.json
    --task 3/15              the cells 3, 18, ... (from 0), as a task of an array does

Then: python -m studies.report studies/family.yaml
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put studies/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from loaders.errors import ConfigError, DataError, UserError, run_cli
from loaders.specs import as_path


class CellsFailed(UserError):
    """Some cells could not be made; the message names them."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """The arguments that `studies.run` and `studies.report` share."""
    made = argparse.ArgumentParser(
        prog=f"python -m studies.{command}", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("study", type=as_path, metavar="FILE", help="a YAML file of studies/")
    made.add_argument("--output", type=as_path, metavar="DIR", help="default: that of the file")
    made.add_argument(
        "--set", nargs="+", default=[], action="extend", metavar="key.sub=value",
        help="overrides of every run, behind those of the file", dest="changes",
    )  # fmt: skip
    return made


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this file."""
    made = parser("run", __doc__)
    made.add_argument("--only", nargs="+", metavar="ARM", help="these arms")
    made.add_argument("--seeds", nargs="+", type=int, metavar="S", help="these seeds")
    made.add_argument("--dry-run", action="store_true", help="list what is missing, and stop")
    made.add_argument("--task", type=_part, metavar="I/N", help="the cells I, I+N, I+2N, ...")
    made.add_argument("--launcher", help="words before train.py; default: that of the file")
    made.add_argument("--evaluation-launcher", help="words before commands of eval/")
    return made.parse_args(argv)


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1")
    return int(index), int(count)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse_arguments(argv)
    # Late: what is wrong with the command line is said before configurations are read.
    from studies import _cells, _cost_ahead, _evaluations, _study

    study = _study.read(args.study)
    planned = _evaluations.plan(study)
    _evaluations.measures(study, planned)
    output = args.output or as_path(study.output)
    every = _cells.make(study, args.study, planned, output, changes=args.changes)
    mine = _cells.make(
        study, args.study, planned, output, args.only, args.seeds, args.changes
    )  # fmt: skip
    index, count = args.task or (0, 1)
    mine = mine[index::count]
    missing = [cell for cell in mine if not cell.trained() or cell.lacking()]
    counts = f"{len(missing)} of {len(mine)} cells are missing"
    print(f"{study.name}: {counts}, into {output}", flush=True)
    if args.dry_run:
        print(*_cost_ahead.listing(missing, every), sep="\n")
        return
    launchers = (
        args.launcher or study.launcher,
        args.evaluation_launcher or study.evaluation_launcher,
    )
    if not all(shlex.split(words) for words in launchers):
        raise ConfigError("a launcher is empty; `python` starts one process")
    _make_all(missing, every, *launchers)


def _make_all(missing: list, every: list, launcher: str, evaluation_launcher: str) -> None:
    """Make the cells one after the other; those that another process holds come last."""
    from engine.clock import duration
    from studies import _cost_ahead
    from studies._work import Signals, Stopped

    signals, failures, took = Signals(), {}, {}
    queue, put_off, number = list(missing), set(), 0
    with signals.caught():
        while queue and not signals.received:
            cell = queue.pop(0)
            lock = _hold(cell)
            if lock is None:
                if cell.name not in put_off:
                    print(f"{cell.name}: another process is at work on it; it comes last")
                elif put_off.issuperset(other.name for other in queue):
                    time.sleep(1)  # all that is left is in other hands
                put_off.add(cell.name)
                queue.append(cell)
                continue
            number += 1
            left = _cost_ahead.seconds([cell, *queue], every, took)
            eta = f"ETA {duration(left)}" if left else "ETA not known yet"
            head = f"[{number}/{len(missing)}] {cell.name}"
            print(
                f"{head}: {_what(cell)}; output in {cell.notes / 'output.txt'}; {eta}", flush=True
            )
            start = time.monotonic()
            try:
                failure = _make(cell, launcher, evaluation_launcher, signals)
            except Stopped as stop:
                raise CellsFailed(
                    f"stopped by {stop} in {cell.name} after step {cell.done_steps()}; the same "
                    "command goes on from there", 128 + stop.number
                ) from None  # fmt: skip
            finally:
                os.close(lock.descriptor)
            seconds = time.monotonic() - start
            if failure is None:
                took.setdefault(cell.arm, []).append(seconds)
                print(f"{head}: done in {duration(seconds)}", flush=True)
            else:
                failures[cell.name] = failure
                print(f"{head}: failed after {duration(seconds)}\n{failure}", flush=True)
    if queue:
        raise CellsFailed(f"stopped with {len(queue)} cells left", 128 + signals.received)
    if failures:
        codes = {failure.code for failure in failures.values()}
        raise CellsFailed(
            f"{len(failures)} of {len(missing)} cells failed: {', '.join(failures)}; see their "
            f"failure.txt in {missing[0].output / 'cells'}. The same command tries them again",
            codes.pop() if len(codes) == 1 else 1,
        )


def _make(cell, launcher: str, evaluation_launcher: str, signals):
    """Train and evaluate one cell; its `Failure`, also in failure.txt, or None."""
    from studies import _work

    failure = None
    if not cell.trained():
        failure = _work.train(cell, launcher, signals)
        if failure is None and not cell.trained():
            differing = [f"{k}: there {a!r}, now {b!r}" for k, (a, b) in cell.differing().items()]
            said = "; ".join(differing) or f"it stopped after step {cell.done_steps()}"
            failure = _work.Failure("train.py", 1, [f"the run is not finished: {said}"])
    lacking = [] if failure else cell.lacking()
    if lacking:
        commands = [(one.task, ["--datasets", *names, *one.options]) for one, names in lacking]
        failure = _work.evaluate(cell, commands, evaluation_launcher, signals)
    if failure is None and (left := cell.lacking()):
        names = ", ".join(f"{one.task} on {' '.join(sets)}" for one, sets in left)
        failure = _work.Failure("eval", 1, [f"no rows were written by {names}"])
    path = cell.notes / "failure.txt"
    if failure is not None:
        path.write_text(f"{failure}\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)
        cell.finish()
    return failure


def _hold(cell):
    """A lock on the cell, or None where another process has it."""
    from engine.run_lock import RunLock

    try:
        return RunLock(cell.notes, lambda line: None, patience=0)
    except DataError:
        return None


def _what(cell) -> str:
    if cell.trained():
        return ", ".join(one.task for one, _ in cell.lacking())
    done = f" from step {cell.done_steps()}" if cell.done_steps() else ""
    return ", ".join([f"train{done}", *(one.task for one in cell.evaluations)])


if __name__ == "__main__":
    run_cli(main)
