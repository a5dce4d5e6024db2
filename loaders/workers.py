"""What each data worker is reading, so that a worker that dies or hangs can be explained."""

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from loaders.errors import DataError
from loaders.manifest import ShardSet

NOTHING = -1


class ReadingNotes:
    """One line per worker in memory that it shares with the trainer.

    Args:
        workers: of this rank's loader.
    """

    def __init__(self, workers: int) -> None:
        # pid, source, index in the source, milliseconds of the system's monotonic clock
        self.table = torch.full((workers, 4), NOTHING, dtype=torch.int64).share_memory_()
        self._row: np.ndarray | None = None  # of the worker that this process is

    def start(self, worker: int) -> None:
        """Within a worker that starts."""
        self._row = self.table[worker].numpy()  # quicker to write to than a tensor
        self._row[0] = os.getpid()

    @contextmanager
    def reading(self, source: int, index: int) -> Iterator[None]:
        """Within a worker: note the sample, and cross it out when it is done."""
        if self._row is None:
            yield
            return
        self._row[1:] = source, index, _now()
        try:
            yield
        finally:
            self._row[1] = NOTHING

    def explain(self, error: RuntimeError, sources: Sequence[ShardSet]) -> DataError | None:
        """What to tell when `error` is about a worker that was killed or that gives no batch.

        Args:
            error: raised by the loader; or by torch's signal handler, at any place of the
                trainer, when a worker dies. sources: as the dataset has them.
        """
        text = str(error).splitlines()[0] if str(error) else ""
        late = "DataLoader timed out" in text
        if not late and not ("DataLoader worker" in text and "pid" in text):
            return None
        noted = [row for row in self.table.tolist() if row[0] != NOTHING]
        if late:
            chosen = [row for row in noted if row[1] != NOTHING]
        else:  # the loader may have ended the others meanwhile, so torch's word counts
            pids = [int(number) for number in re.findall(r"\d+", text.split("pid", 1)[1])]
            chosen = [row for row in noted if row[0] in pids]
        words = "; ".join(_describe(row, sources, late) for row in chosen)
        if late:
            advice = (
                "Read that shard by hand: a file system that does not answer, or an image on "
                "which the decoder hangs (leave the shard out, or write it without that sample)"
            )
        else:
            advice = (
                "Killed means nearly always out of memory: set fewer data.workers, or give the "
                "job more memory per task; a crash at the same sample again means that the "
                "decoder cannot take it: leave it out"
            )
        return DataError(f"{text.rstrip('. ')}. {words or 'No worker noted a sample'}. {advice}")

    def end_workers(self) -> None:
        """Kill the workers that are left, in the main thread, when this process ends by an error.

        They ignore TERM, so one that the loader did not stop in order would be waited for at the
        exit of the interpreter, for ever.
        """
        # torch's handler would raise an error for each of them.
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        mine = set(self.table[:, 0].tolist())
        for process in multiprocessing.active_children():
            if process.pid in mine:
                process.kill()
                process.join()
        signal.signal(signal.SIGCHLD, before)


def _describe(row: list[int], sources: Sequence[ShardSet], late: bool) -> str:
    pid, source, index, since = row
    if source == NOTHING:
        return f"Worker {pid} was between two samples"
    shards = sources[source]
    state = f"has been reading for {(_now() - since) / 1000:.0f} s" if late else "was reading"
    return f"Worker {pid} {state} {shards.shard_of(index)}, sample {shards.key(index)!r}"


def _now() -> int:
    return time.monotonic_ns() // 1_000_000
