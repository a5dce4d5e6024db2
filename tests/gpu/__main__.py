"""`python -m tests.gpu`: all checks that need a GPU, in less than five minutes, and a table.

    make gpu-check                      in the environment of `make test`
    python -m tests.gpu                 in any other; it needs pytest and what train.py needs

Exit code 0: every check that ran passed; 1: one failed, or there is no CUDA device.
"""

import argparse
import sys
from pathlib import Path

SECONDS = 240  # to begin checks in; the longest takes less than the minute that is left


def main() -> int:
    """The exit code."""
    argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()  # fmt: skip
    import pytest  # late, as torch, so that --help answers at once
    import torch

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
