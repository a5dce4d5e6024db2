"""Finds the rank that keeps the others waiting: every rank notes what it does, for others to read.

A collective operation that one rank does not reach blocks all others. torch ends them after a
time-out, but cannot say whom they waited for, and nccl ends the process before Python could speak.
Here a thread of each rank writes a note into the store of the process group every few seconds:
step, phase, and the line of code that the rank is at. When a rank has not left its phase for nearly
the time-out, its thread reads all notes, names the ranks that are behind, and ends the process.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from engine import dist
from loaders.errors import LostRank, UserError

ROOT = Path(__file__).resolve().parent.parent
Notes = dict[int, dict[str, Any]]


class Place(NamedTuple):
    """Where a rank is: how many phases it has entered, its step and phase, and since when."""

    count: int
    step: int
    phase: str
    patient: bool  # the phase may outlast the time-out as long as all ranks are alive
    since: float


class Watch:
    """Notes of this rank, and the judgement on the others.

    Args:
        timeout_minutes: the time-out of collective operations.
        tell: called with the last words before this process is ended, or with a warning.
    """

    def __init__(self, timeout_minutes: float, tell: Callable[[str], None]):
        self.tell, self.timeout_minutes = tell, timeout_minutes
        self.limit = 60 * timeout_minutes
        self.interval = min(5.0, self.limit / 20)  # seconds between two notes
        self.patience = min(10.0, self.limit / 4)  # seconds to wait for the store's answer
        self.place = Place(0, 0, "starting", True, time.monotonic())
        self.ended: str | None = None
        self.came = False  # a collective operation failed under this rank, which had come to it
        self.beat = 0
        self.main = threading.main_thread().ident
        self.over = threading.Event()
        if dist.world_size() > 1:
            self.store = dist.connect(timedelta(seconds=10))
            self._write()
            for job in (self._keep_writing, self._judge):
                threading.Thread(target=job, daemon=True).start()

    def at(self, step: int, phase: str, patient: bool = False) -> None:
        """This rank enters a phase; `patient`: one like saving, which may be long on all ranks."""
        self.place = Place(self.place.count + 1, step, phase, patient, time.monotonic())

    def stop(self, why: str | None = None) -> None:
        """This rank leaves; `why` is the error that ends it, which ranks that miss it will tell."""
        self.over.set()
        self.ended = why or "finished"
        if dist.world_size() > 1:
            _within(2.0, self._write)

    def report(self) -> "Finding":
        """Say which ranks are missing and what they did last; this takes a few seconds."""
        first = _within(self.patience, _read)
        time.sleep(2.5 * self.interval)
        second = _within(self.patience, _read)
        if first is None or second is None:
            return Finding(
                False,
                f"the store at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} does not "
                "answer: rank 0 (or the launcher on its node) was stopped or killed, or its node "
                "cannot be reached",
            )
        return diagnose(first, second, dist.world_size())

    def explain(self, error: Exception) -> UserError | None:
        """A `LostRank` that names the ranks, if `error` comes from a collective operation."""
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if dist.world_size() == 1 or not lost:
            return None
        self.came = True
        return LostRank(
            f"{self._own()}: a collective operation failed ({dist.first_line(error)}): "
            f"{self.report().words}. The last good checkpoint is kept; the same command continues"
        )

    def _own(self) -> str:
        return (
            f"rank {dist.rank()} on {socket.gethostname()}, step {self.place.step}, "
            f"{self.place.phase}"
        )

    def _write(self) -> None:
        self.beat += 1
        place = self.place
        note = {
            "beat": self.beat, "host": socket.gethostname(), "pid": os.getpid(),
            "count": place.count, "step": place.step, "phase": place.phase,
            "seconds": round(time.monotonic() - place.since, 1), "ended": self.ended,
            **_line_of(self.main),
        }  # fmt: skip
        note["collective"] |= self.came
        self.store.set(f"watch/{dist.rank()}", json.dumps(note))

    def _keep_writing(self) -> None:
        while not self.over.wait(self.interval):
            try:
                self._write()
            except RuntimeError:  # the store has gone with its rank, which the judge will notice
                return

    def _judge(self) -> None:
        warned = -1
        # This comes before torch's own time-out, which would end the process without names.
        limit = self.limit - min(60.0, self.limit / 4)
        while not self.over.wait(self.interval):
            place = self.place
            if time.monotonic() - place.since < limit or place.count == warned:
                continue
            found = self.report()
            if self.place is not place or self.over.is_set():
                continue
            message = (
                f"{self._own()} for {(time.monotonic() - place.since) / 60:.2g} minutes "
                f"(timeout_minutes={self.timeout_minutes:g}): {found.words}"
            )
            if place.patient and found.all_alive:
                warned = place.count
                self.tell(f"warning: {message}")
                continue
            self._end(
                f"{message}. The last good checkpoint is kept; the same command continues, and a "
                "larger timeout_minutes waits longer"
            )

    def _end(self, message: str) -> NoReturn:
        # The main thread is inside an operation that nothing can interrupt.
        self.ended = "waited too long for others"
        self.tell(f"error: {message}")
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(LostRank.exit_code)


class Finding(NamedTuple):
    """Whether every rank still writes notes, and in words which ranks are missing."""

    all_alive: bool
    words: str


def diagnose(first: Notes, second: Notes, world_size: int) -> Finding:
    """Find out who is missing, from two readings of the notes a few beats apart.

    Args:
        first, second: notes by rank; a rank may be absent.
    """
    ranks = range(world_size)
    ended = [r for r in ranks if second.get(r, {}).get("ended")]
    silent = [
        r for r in ranks
        if r not in ended and (r not in second or first.get(r, {}).get("beat") == second[r]["beat"])
    ]  # fmt: skip
    if ended or silent:
        parts = []
        if ended:
            said = "; ".join(f"rank {r}: {second[r]['ended']}" for r in ended[:4])
            parts.append(f"{dist.spans(ended)} ended ({said})")
        if silent:
            parts.append(
                f"{dist.spans(silent)} gave no sign of life (stopped, killed, or the node is "
                f"lost): {_last(second, silent)}"
            )
        return Finding(False, "; ".join(parts))
    furthest = max(note["count"] for note in second.values())
    behind = [r for r in ranks if second[r]["count"] < furthest]
    outside = [r for r in ranks if not second[r]["collective"]]
    missing = behind or (outside if len(outside) < world_size else [])
    if missing:
        words = f"{dist.spans(missing)} did not come: {_last(second, missing)}"
        return Finding(True, f"all ranks are alive, but {words}")
    return Finding(
        True,
        "all ranks are alive and at the same place, so the network between the nodes is the "
        f"suspect (NCCL_DEBUG=INFO shows more): {_last(second, list(ranks))}",
    )


def _last(notes: Notes, ranks: list[int]) -> str:
    """What the first few of these ranks did last."""
    words = []
    for r in ranks[:4]:
        note = notes.get(r)
        words.append(
            f"rank {r} never wrote a note"
            if note is None
            else f"rank {r} on {note['host']} (process {note['pid']}) was in step {note['step']}, "
            f"{note['phase']} since {note['seconds']:.0f} s, at {note['line']}"
        )
    return "; ".join(words)


def _line_of(thread: int | None) -> dict[str, Any]:
    """The innermost line of this repository that a thread is at, and whether a collective waits."""
    frame = sys._current_frames().get(thread)
    stack = traceback.StackSummary.extract(
        traceback.walk_stack(frame), lookup_lines=False, capture_locals=False
    )  # innermost first
    ours = [
        entry for entry in stack
        if Path(entry.filename).is_relative_to(ROOT) and "site-packages" not in entry.filename
    ]  # fmt: skip
    line = next(iter(ours or stack), None)
    place = "an unknown line"
    if line is not None:
        place = f"{os.path.relpath(line.filename, ROOT)}:{line.lineno} ({line.name})"
    return {
        "line": place,
        "collective": any("torch/distributed/" in e.filename for e in stack[:3]),
    }


def _read() -> Notes:
    """Read all notes that there are, over a connection of their own."""
    store = dist.connect(timedelta(seconds=10))
    keys = [(r, f"watch/{r}") for r in range(dist.world_size())]
    return {r: json.loads(store.get(key)) for r, key in keys if store.check([key])}


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """The function's result, or None if it fails or does not return, say from a stopped store."""
    box: list[Any] = []

    def call() -> None:
        try:
            box.append(function())
        except RuntimeError:
            return

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return box[0] if box else None
