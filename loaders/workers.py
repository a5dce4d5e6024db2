"""Data workers: who gets the signals, and what a worker that dies or hangs was reading."""

import atexit
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from loaders.errors import DataError
from loaders.manifest import ShardSet

NOTHING = -1
SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)


class GuardedLoader(DataLoader):
    """A DataLoader whose workers leave signals that go to the whole job to their owner.

    SLURM sends TERM and USR1 to every process of a step: a worker that died of it would break the
    step that the owner still finishes. Workers end with their loader, and torch's watchdog ends
    them when the owner is gone. A worker never meets these signals: they are held back from
    before it is forked until it ignores them, since torch's own handler ends it.

    Args:
        worker_init_fn: called in each worker with its number. options: of DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        worker_init_fn: Callable[[int], None] | None = None,
        **options: object,
    ) -> None:
        start = partial(_start_worker, then=worker_init_fn)
        super().__init__(dataset, worker_init_fn=start, **options)

    def __iter__(self):
        atexit.unregister(end_workers)
        atexit.register(end_workers)  # before multiprocessing's own, which would wait for ever
        held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)


def ignore_deaths() -> None:
    """From here on torch raises no error, at whatever line, when a worker dies."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def end_workers() -> None:
    """Kill the workers that are left, in the main thread, when this process ends by an error.

    They ignore TERM, so one that the loader did not stop in order would be waited for at the
    exit of the interpreter, for ever.
    """
    ignore_deaths()
    for process in multiprocessing.active_children():
        if process.daemon:  # as multiprocessing itself chooses
            process.kill()
            process.join()


def _start_worker(worker: int, then: Callable[[int], None] | None) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if then:
        then(worker)


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

    def explain(self, error: Exception, sources: Sequence[ShardSet]) -> DataError | None:
        """What to tell when `error` is about a worker that was killed or that gives no batch.

        Args:
            error: raised by the loader: torch's words about a worker, or a broken connection
                where it noticed that before the death; or by torch's signal handler, at any place
                of the trainer. sources: as the dataset has them.
        """
        text = str(error).splitlines()[0] if str(error) else ""
        late = "DataLoader timed out" in text
        if isinstance(error, OSError | EOFError):
            text = self._death()
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

    def _death(self, patience: float = 2.0) -> str:
        """Torch's words for the first worker that is dead, or dies within `patience` seconds."""
        deadline = time.monotonic() + patience
        while True:
            for pid in self.table[:, 0].tolist():
                if pid != NOTHING and (how := _how_it_ended(pid)):
                    return f"DataLoader worker (pid {pid}) {how}"
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.01)


def _describe(row: list[int], sources: Sequence[ShardSet], late: bool) -> str:
    pid, source, index, since = row
    if source == NOTHING:
        return f"Worker {pid} was between two samples"
    shards = sources[source]
    state = f"has been reading for {(_now() - since) / 1000:.0f} s" if late else "was reading"
    return f"Worker {pid} {state} {shards.shard_of(index)}, sample {shards.key(index)!r}"


def _how_it_ended(pid: int) -> str | None:
    """In torch's words; None while the child runs. Leaves its status for others to collect."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # somebody has collected it already
        return "exited unexpectedly"
    if ended is None:
        return None
    if ended.si_code == os.CLD_EXITED:
        return f"exited unexpectedly with exit code {ended.si_status}"
    return f"is killed by signal: {signal.strsignal(ended.si_status)}"


def _now() -> int:
    return time.monotonic_ns() // 1_000_000
