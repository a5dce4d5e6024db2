"""What the evaluation commands share before torch is needed: arguments, and the sets they name."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from eval.sources.presence import those_present
from eval.sources.registry import EvalDataset, Registry
from loaders.errors import CommandParser, DataError
from loaders.specs import as_path


def parser(command: str, description: str) -> CommandParser:
    """The arguments of `python -m eval.<command>` that every evaluation has; add your own."""
    made = CommandParser(prog=f"python -m eval.{command}", description=description)
    made.add_argument(
        "--checkpoint",
        nargs="+",
        required=True,
        type=as_path,
        metavar="RUN",
        help="run or checkpoint folders, exports, files of UniCL, open_clip or OpenAI CLIP",
    )
    made.add_argument(
        "--datasets", nargs="+", required=True, metavar="NAME", help="sets or collections"
    )
    made.add_argument("--output", type=as_path, required=True, metavar="DIR", help="result rows")
    made.add_argument(
        "--data-root",
        type=as_path,
        metavar="DIR",
        help="where benchmark sets lie (default: $UNICL_EVAL_DATA, else data/eval)",
    )
    made.add_argument("--batch-size", type=int, default=256, help="images per process")
    made.add_argument("--workers", type=int, default=2, help="decoding processes per process")
    return made


def choose(
    args: argparse.Namespace,
    command: str,
    registry: Path | str,
    listed: str | None = None,
    protocol: str | None = None,
) -> list[EvalDataset]:
    """Rows of `registry` that `args.datasets` names, that list the task `listed` (default: that of
    the command's name), and that are there.

    Raises ConfigError as `Registry.select`, DataError as `those_present`, and DataError where no
    set is left or a model of `args.checkpoint` is not there.
    """
    task = listed or command
    selected = Registry(registry, args.data_root).select(args.datasets, task, protocol)
    found = those_present(selected, task, args.datasets)
    if not found:
        raise DataError(f"none of {', '.join(args.datasets)} is there for {command}: nothing to do")
    require(args.checkpoint)
    return found


def require(models: Sequence[Path]) -> None:
    """Raise DataError for a model that is not there, as `models.weights.load` would much later."""
    for path in models:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
