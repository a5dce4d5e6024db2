"""apt-get for tests that run at the same time."""

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other worker is inside: apt-get would not wait, but fail."""
    with (Path(tempfile.gettempdir()) / "unicl-tests-apt.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
