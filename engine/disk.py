"""Files that must be whole are flushed and renamed into place; all ranks learn of a failure.

A full disk shows on one rank only, while the others already wait in a collective operation. So a
failure is noted where it happens, and the ranks agree on it at the next point that all reach.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import SafetensorError

from engine import dist


class Attempt:
    """Something that all ranks write together, and that fails on all of them or on none.

    Args:
        device: the device of this rank, for the collective operation.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.failure: str | None = None

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note a failure of the disk instead of raising it; other errors pass through."""
        try:
            yield
        except Exception as error:
            reason = _reason(error)
            if reason is None:
                raise
            self.failure = self.failure or f"rank {dist.rank()}: {reason}"

    def agree(self) -> str | None:
        """The failures of all ranks in words, or None; collective."""
        if not dist.max_over_ranks(int(self.failure is not None), self.device):
            return None
        failures: list[str | None] = [self.failure]
        if dist.world_size() > 1:
            failures = [None] * dist.world_size()
            torch.distributed.all_gather_object(failures, self.failure)
        return "; ".join(failure for failure in failures if failure)


def flush(path: Path) -> None:
    """Have the operating system write a file, or the names in a folder, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_line(path: Path, line: str) -> None:
    """Replace a small text file: after a crash it holds the old text or the new one."""
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    flush(path.parent)


def discard(folder: Path) -> None:
    """Delete a folder so that a kill on the way never leaves a part of it under its name."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    # A file that another node still reads cannot go on every file system; see `clear`.
    shutil.rmtree(aside, ignore_errors=True)


def clear(root: Path, pattern: str) -> None:
    """Delete folders that writers who were killed, or `discard`, left behind."""
    for left in root.glob(pattern):
        shutil.rmtree(left, ignore_errors=True)


def free(path: Path) -> int:
    """Free bytes where `path` is, or will be made; quotas are not seen."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def gigabytes(count: int) -> str:
    """A number of bytes for a message."""
    return f"{count / 1e9:.3f} GB"


@contextlib.contextmanager
def flushing(engine, attempt: Attempt) -> Iterator[None]:
    """Within it, DeepSpeed's `save_checkpoint` flushes its files, and failures to write are noted.

    There are collective operations between its writes, so a rank that raised would leave the others
    waiting in one.
    """
    inner, copy = engine.checkpoint_engine, engine._copy_recovery_script

    def copy_noted(save_path: str) -> None:
        with attempt.noted():
            copy(save_path)

    engine.checkpoint_engine = _Writer(inner, attempt)
    engine._copy_recovery_script = copy_noted
    try:
        yield
    finally:
        engine.checkpoint_engine = inner
        del engine._copy_recovery_script


class _Writer:
    """DeepSpeed's writer of files, except for `save`."""

    def __init__(self, inner, attempt: Attempt):
        self.inner, self.attempt = inner, attempt

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        # torch gets an open file, because with a path it loses the reason of a failed write.
        with self.attempt.noted(), open(path, "wb") as file:
            torch.save(state_dict, file)
            file.flush()
            os.fsync(file.fileno())


def _reason(error: BaseException | None) -> str | None:
    """Why something could not be written; None for an error that is not one of the disk.

    torch.save raises a RuntimeError: into an open file while it handles the OSError of the
    write, into a path (as DeepSpeed's converter calls it) without any reason.
    """
    while error is not None:
        if isinstance(error, OSError | SafetensorError):
            return str(error)
        cause = error.__cause__ or error.__context__
        if cause is None and "iostream error" in str(error):
            return "torch.save could not write a whole file"
        error = cause
    return None
