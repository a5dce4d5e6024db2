"""The old name of `python -m models.export`; works for one release more."""

import runpy
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put engine/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":
    print(
        "`python -m engine.export` is now `python -m models.export`; the old name works for one "
        "release more",
        file=sys.stderr,
    )
    runpy.run_module("models.export", run_name="__main__", alter_sys=True)
