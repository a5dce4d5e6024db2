"""One run folder has one run: a second one at the same time would mix its checkpoints with ours."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from loaders.errors import DataError

NAME = ".running"
# A file system over the network keeps the lock of a lost node for its lease (NFS 4: 90 s).
PATIENCE = 120.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """A lock on `folder` (made if missing) that ends with this process, however it ends.

    It is a POSIX record lock, which data workers do not inherit when they are forked.

    Args:
        tell: called with what there is to know while this process waits for another one.
        patience: seconds to wait for that one.

    Raises:
        DataError: another process still holds the folder; it is named.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None], patience: float = PATIENCE):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline, told = time.monotonic() + patience, False
        while not self._taken(tell):
            holder = os.pread(self.descriptor, 200, 0).decode(errors="replace").strip()
            if time.monotonic() > deadline:
                os.close(self.descriptor)
                raise DataError(
                    f"{folder}: another run is at work here ({holder or 'unknown'}); wait for its "
                    "end, stop it, or give this run another output_dir"
                )
            if not told:
                tell(f"{folder} is held by {holder or 'another process'}: waiting {patience:.0f} s")
                told = True
            time.sleep(0.5)
        job = os.environ.get("SLURM_JOB_ID")
        words = f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job}" if job else "")
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"{words}\n".encode(), 0)

    def _taken(self, tell: Callable[[str], None]) -> bool:
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                tell(
                    f"warning: no locks on the file system of {self.path} ({error.strerror}); make "
                    "sure that no second job uses this folder"
                )
                return True
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return False
        return True
