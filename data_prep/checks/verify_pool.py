"""The worker processes of `verify.py`: they outlive no parent, and report the bytes they read."""

import multiprocessing
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from data_prep.checks.verify_shard import Task, check_shard
from loaders.errors import DataError
from loaders.progress import Progress

_read = None  # bytes read by all workers, set in each of them


def check_all(name: str, tasks: Sequence[Task], workers: int) -> dict[int, dict]:
    """Check shards, the largest first; results by shard number.

    `workers`: processes; 1: this one. Raises `DataError` as `check_shard`, and when a worker is
    killed.
    """
    sizes = {task.shard: task.state()["bytes"] for task in tasks}
    tasks = sorted(tasks, key=lambda task: -sizes[task.shard])
    total = sum(sizes[task.shard] for task in tasks if task.successes)
    with Progress(
        desc=f"verify {name}", unit="B", scaled=True, total=total, show=bool(tasks)
    ) as bar:
        if min(workers, len(tasks)) <= 1:
            return {task.shard: check_shard(task, bar.update) for task in tasks}
        return _in_parallel(tasks, min(workers, len(tasks)), bar)


def _in_parallel(tasks: Sequence[Task], workers: int, bar: Progress) -> dict[int, dict]:
    # Not fork: pyarrow has threads, and locks that a forked process would inherit.
    context = multiprocessing.get_context("spawn")
    read = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (read,))
    futures = {pool.submit(_work, task): task.shard for task in tasks}
    try:
        _follow(futures, bar, read)
        return {shard: future.result() for future, shard in futures.items()}
    except BrokenProcessPool:
        raise DataError(
            f"{tasks[0].out}: a worker process was killed (out of memory?). Shards that were "
            "checked are kept: run the same command again, or with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _follow(futures: Iterable[Future], bar: Progress, read) -> None:
    """Advance the bar until all are done; raises what the first failing one raised."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.3)
        bar.update(read.value - bar.n)
        for future in done:
            future.result()


def _start_worker(read) -> None:
    global _read
    _read = read
    end_with_parent()


def end_with_parent() -> None:
    """Have this worker process end with its parent: after a kill -9 nobody else would end it."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(task: Task) -> dict:
    def count(size: int) -> None:
        with _read.get_lock():
            _read.value += size

    return check_shard(task, count)
