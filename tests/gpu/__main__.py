"""`python -m tests.gpu`: all checks that need a GPU, in less than five minutes, and a table.

    make gpu-check                      in the environment of `make test`
    python -m tests.gpu                 in any other; it needs pytest and what train.py needs

Exit code 0: every check that ran passed; 1: one failed, or there is no CUDA device.
"""

import sys
from pathlib import Path

import pytest
import torch

SECONDS = 240  # to begin checks in; the longest takes less than the minute that is left


def main() -> int:
    """The exit code."""
    if not torch.cuda.is_available():
        print(
            f"no CUDA device: torch {torch.__version__} finds none here, so nothing was checked",
            file=sys.stderr,
        )
        return 1
    folder = str(Path(__file__).parent)
    # Without the conftest of all tests, which needs pytest-xdist.
    arguments = [folder, f"--confcutdir={folder}", f"--gpu-seconds={SECONDS}", "-m", "gpu"]
    return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
