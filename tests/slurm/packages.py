"""Debian's packages of SLURM and munge, installed where they are missing."""

import os
import shutil
from pathlib import Path

from tests import apt

SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
POLICY = Path("/usr/sbin/policy-rc.d")  # Debian asks it whether an installed service may start


def missing_programs() -> list[str]:
    """Names of SLURM's and munge's programs that are not there."""
    names = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
    return [name for name in names if shutil.which(name, path=SEARCH) is None]


def install() -> str | None:
    """Install Debian's packages where they are missing; why that cannot be done, or None."""
    with apt.alone():
        return _install()


def _install() -> str | None:
    if not missing_programs():
        return None
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"no {', '.join(missing_programs())}, and only root on Debian can install them"
    ours = not POLICY.exists()
    if ours:
        POLICY.write_text("#!/bin/sh\nexit 101\n")  # the packages start no daemon of their own
        POLICY.chmod(0o755)
    try:
        return apt.get("slurmctld", "slurmd", "slurm-client", "munge")
    finally:
        if ours:
            POLICY.unlink()
