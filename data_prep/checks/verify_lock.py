"""verify.py alone on a set: not beside another one, nor while a part of the set is prepared."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.checks.verify_shard import RESULTS
from data_prep.sets import set_folder
from loaders.errors import DataError


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Refuse to run beside another verify.py, or while a part of the set is being prepared."""
    for path in sorted((out / set_folder.WORK).glob("*.lock")):
        with open(path) as lock:
            if not _locked(lock, fcntl.LOCK_SH):
                raise DataError(
                    f"{out}: part {path.stem} is being prepared by another process; wait for it"
                )
    (out / RESULTS).mkdir(exist_ok=True)
    with open(out / RESULTS / ".lock", "w") as lock:
        if not _locked(lock, fcntl.LOCK_EX):
            raise DataError(f"{out}: another verify.py works on it; wait for it")
        yield


def _locked(file, how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
