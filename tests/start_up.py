"""Commands one after the other in one fresh interpreter; `test_commands.py` starts it.

Reads [[module, arguments], …] as JSON from stdin; arguments are null for a module to import only.
Writes for each [exit code, what was printed, packages of HEAVY that are loaded by then].
"""

import contextlib
import importlib
import io
import json
import sys

from loaders.errors import run_cli

HEAVY = (
    "torch", "torchvision", "timm", "transformers", "accelerate", "deepspeed", "sklearn", "scipy",
    "datasets", "matplotlib", "pycocotools",
)  # fmt: skip


def run(module: str, arguments: list[str] | None) -> tuple[int, str, list[str]]:
    """Exit code, output and heavy packages of `python -m module arguments`."""
    output, code = io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        loaded = importlib.import_module(module)
        if arguments is not None:
            sys.argv = [module, *arguments]
            try:
                run_cli(loaded.main)
            except SystemExit as end:
                code = end.code or 0
    return code, output.getvalue(), [name for name in HEAVY if name in sys.modules]


if __name__ == "__main__":
    json.dump([run(*case) for case in json.load(sys.stdin)], sys.stdout)
