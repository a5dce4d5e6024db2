"""What the evaluation commands share before torch is needed: arguments, and the sets they name."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from eval.sources import own
from eval.sources.presence import those_present
from eval.sources.registry import EvalDataset, Registry
from loaders.errors import CommandParser, ConfigError, DataError, launched_rank
from loaders.specs import as_path


def parser(
    command: str, description: str, class_names: bool = True, templates: bool = False
) -> CommandParser:
    """The arguments of `python -m eval.<command>` that every evaluation has; add your own.

    `class_names`, `templates`: whether the evaluation knows classes, and puts them into texts.
    """
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
        "--datasets",
        nargs="+",
        required=True,
        metavar="NAME|DIR",
        help="sets or collections of eval/datasets.yaml, or paths of folders of your own",
    )
    made.add_argument(
        "--registry",
        type=as_path,
        metavar="FILE",
        help="further sets for --datasets: YAML in the form of eval/datasets.yaml",
    )
    if class_names:
        made.add_argument(
            "--classnames",
            type=as_path,
            metavar="FILE",
            help="of a DIR: a name a line, or FOLDER, a tab and the name (default: classnames.txt "
            "in it, else the names it has)",
        )
    if templates:
        made.add_argument(
            "--templates",
            metavar="FILE|PRESET",
            help="of a DIR: a template a line, or a preset of prompts/templates.json (default: "
            f"templates.txt in it, else {own.DEFAULT_TEMPLATES})",
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
    """Rows that `args.datasets` names, that list the task `listed` (default: that of the command's
    name), and that are there: of `registry`, of `args.registry`, and of folders.

    Raises ConfigError as `Registry.select` and `Registry.add`, and for flags that belong to a
    folder where none is given; DataError as `those_present` and `own.describe`, and where no set
    is left or a model of `args.checkpoint` is not there.
    """
    task = listed or command
    known = Registry(registry, args.data_root)
    if args.registry:
        known.add(args.registry)
    folders = [word for word in dict.fromkeys(args.datasets) if _is_folder(word, known)]
    named = [word for word in args.datasets if word not in folders]
    texts = getattr(args, "classnames", None), getattr(args, "templates", None)
    _check_texts(folders, *texts)
    if folders and protocol:
        raise ConfigError(
            f"--protocol {protocol} is for sets that state it; of {folders[0]} give --templates, "
            "or a row in a --registry"
        )
    found = those_present(known.select(named, task, protocol), task, named)
    found += [own.describe(folder, task, *texts) for folder in folders]
    if not found:
        raise DataError(f"none of {', '.join(args.datasets)} is there for {command}: nothing to do")
    names = [row.name for row in found]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ConfigError(f"{', '.join(twice)}: one set, given by several folders; give it once")
    require(args.checkpoint)
    for row in found[len(found) - len(folders) :] if launched_rank() == 0 else []:
        print(own.summary(row), flush=True)
    return found


def _is_folder(word: str, known: Registry) -> bool:
    """Whether a word of --datasets is a path; a name of the registry wins over a folder beside."""
    if word in known.datasets or word in known.collections:
        return False
    return os.sep in word or word.startswith((".", "~")) or Path(word).is_dir()


def _check_texts(folders: list[str], names: Path | None, templates: str | None) -> None:
    """Raise ConfigError for flags of texts that belong to no folder, or to one of several."""
    if not folders and (names or templates):
        flag = "--classnames" if names else "--templates"
        raise ConfigError(
            f"{flag} is for a folder of --datasets; sets with a name have theirs in their registry"
        )
    if names and len(folders) > 1:
        raise ConfigError(
            f"--classnames with {len(folders)} folders: evaluate them one after the other"
        )


def require(models: Sequence[Path]) -> None:
    """Raise DataError for a model that is not there, as `models.weights.load` would much later."""
    for path in models:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
