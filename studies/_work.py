"""The processes of a cell: one training, and one for its evaluations.

Each process is a session of its own. The kernel sends it SIGTERM when this one dies, however it
dies, so that no training goes on without anybody who knows; train.py then saves and stops.
"""

import ctypes
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from studies._cells import Cell
from studies._study import ROOT

LAST_LINES = 15  # of a failed process, shown and kept
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What these start is no descendant of theirs, so its time and memory are not seen from here.
_ELSEWHERE = ("srun", "mpirun", "mpiexec", "deepspeed")


@dataclass(frozen=True)
class Failure:
    """A process that ended with something else than 0."""

    command: str
    code: int  # as a shell says it: 128 + number for a signal
    lines: list[str]

    def __str__(self) -> str:
        return "\n".join([f"exit code {self.code}: {self.command}", *self.lines])


class Stopped(Exception):
    """A signal asked this process to stop; its children have ended."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Keeps SIGTERM, SIGINT and SIGUSR1 and hands the first on to the process that runs."""

    def __init__(self) -> None:
        self.received = 0
        self.child: subprocess.Popen | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Handlers are set meanwhile."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        before = [signal.signal(number, self._catch) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _catch(self, number: int, _frame: object) -> None:
        self.received = self.received or number
        if self.child is not None:
            # What Ctrl-C means here is that of SIGTERM: save and stop.
            self.child.send_signal(signal.SIGTERM if number == signal.SIGINT else number)


def train(cell: Cell, launcher: str, signals: Signals) -> Failure | None:
    """Train a cell to its end, from where its run folder stands."""
    command = [*words(launcher), str(ROOT / "train.py"), "--config", str(cell.config)]
    return _run(cell, "train", [*command, *cell.overrides], launcher, signals)


def evaluate(
    cell: Cell, planned: Sequence[tuple[str, list[str]]], launcher: str, signals: Signals
) -> Failure | None:
    """Run commands of eval/ on the last checkpoint of a cell, in one process.

    Args:
        planned: name of each command, and its data sets and options as on its command line.
    """
    command = [*words(launcher), str(ROOT / "eval" / "several.py"), "--checkpoint", str(cell.run)]
    for task, options in planned:
        command += ["--evaluate", shlex.join([task, *options])]
    what = ", ".join(task for task, _ in planned)
    return _run(cell, what, [*command, "--output", str(cell.results)], launcher, signals)


def words(launcher: str) -> list[str]:
    """A launcher as words; its programs are taken from this interpreter's environment."""
    beside = Path(sys.executable).parent
    found = [os.path.expanduser(word) for word in shlex.split(launcher)]
    place = {"python": sys.executable, "torchrun": str(beside / "torchrun")}
    return [place[w] if w in place and Path(place[w]).is_file() else w for w in found]


def _run(
    cell: Cell, what: str, command: list[str], launcher: str, signals: Signals
) -> Failure | None:
    """Run a command to its end, its output behind that of earlier ones, and keep what it took."""
    cell.notes.mkdir(parents=True, exist_ok=True)
    before, start = cell.done_steps(), time.monotonic()
    shown = shlex.join(command)
    with open(cell.notes / "output.txt", "ab") as output:
        output.write(f"\n$ {shown}\n".encode())
        output.flush()
        first = output.tell()
        code, usage = _wait(command, output, signals)
    seconds = time.monotonic() - start
    here = shlex.split(launcher)[0] not in _ELSEWHERE
    line = {
        "what": what,
        "code": code,
        "from_step": before,
        "to_step": cell.done_steps(),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3) if here else None,
        "peak_bytes": usage.ru_maxrss * 1024 if here else None,
        "command": shown,
    }
    with open(cell.notes / "usage.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    if signals.received:
        raise Stopped(signals.received)
    if code == 0:
        return None
    said = (cell.notes / "output.txt").read_bytes()[first:].decode(errors="replace")
    lines = [line for line in said.splitlines() if line.strip()]
    return Failure(shown, code, lines[-LAST_LINES:])


def _wait(command: list[str], output, signals: Signals) -> tuple[int, resource.struct_rusage]:
    """Exit code of a command, and the time and memory of it and all its descendants."""
    parent = os.getpid()

    def end_with_parent() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)  # it died before the call

    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True, preexec_fn=end_with_parent,
        )  # fmt: skip
    except OSError as error:
        output.write(f"{command[0]}: {error.strerror}\n".encode())
        return 127, resource.struct_rusage([0] * 16)
    signals.child = child
    if signals.received:  # it came between two processes
        child.terminate()
    _, status, usage = os.wait4(child.pid, 0)
    signals.child = None
    code = os.waitstatus_to_exitcode(status)
    child.returncode = code  # so that Popen does not wait for it again
    return (128 - code if code < 0 else code), usage
