"""apt-get for tests that run at the same time."""

import fcntl
import os
import subprocess
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


def get(*packages: str) -> str | None:
    """Install Debian packages, inside `alone`; why that cannot be done, or None."""
    for arguments in (("update",), ("install", "-y", "--no-install-recommends", *packages)):
        done = subprocess.run(
            ["apt-get", "-q", *arguments], capture_output=True, text=True, check=False,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, timeout=600,
        )  # fmt: skip
        if done.returncode != 0:
            return f"apt-get {arguments[0]}: {(done.stderr or done.stdout).strip()[-500:]}"
    return None
