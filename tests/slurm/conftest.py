"""One SLURM for all tests of this folder."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.packages import install


@pytest.fixture(scope="session")
def slurm_install():
    """Debian's packages; the tests are skipped only where they cannot be installed."""
    reason = install()
    if reason:
        pytest.skip(f"no SLURM here: {reason}")


@pytest.fixture(scope="session")
def cluster(slurm_install):
    """A fresh cluster, stopped and removed afterwards."""
    # Not pytest's folder: munge wants every parent to be open to others.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    it = Cluster(folder)
    try:
        it.start()
        yield it
    finally:
        it.stop()
        shutil.rmtree(folder)
