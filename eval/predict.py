"""Names the classes of pictures, or writes their embeddings: `python -m eval.predict --checkpoint
RUN IMAGE [IMAGE …] --classes "a cat, a dog"`.

An IMAGE is a file, a folder of images, a glob, or tars: a set's folder, a tar, a brace range. They
are read as a stream, so a folder may hold millions. Pictures that cannot be used are named and
counted. No labels are needed; with labels `eval.zero_shot` measures.
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put eval/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval import cli
from eval.sources import class_texts
from eval.tasks import pictures
from loaders import texts
from loaders.errors import CommandParser, ConfigError, DataError, run_cli
from loaders.manifest_file import is_text
from loaders.plain_text import read_text, text_lines
from loaders.printable import printable
from loaders.specs import as_path

TABLES, EMBEDDINGS = (".csv", ".jsonl", ".parquet"), (".parquet", ".npy")
TEMPLATES = "clip_80"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this file."""
    args = _parser().parse_args(argv)
    _check_files(args)
    shown = class_names(args.classes) if args.classes else []
    args.templates = class_texts.read_templates(args.templates).lines
    cli.require([args.checkpoint])
    found = pictures.find(args.images)
    # Late: torch and the towers take ten seconds, and the answers above should not.
    from eval.tasks import predict

    written = [texts.label_text([name], ["{}"], random.Random(0)) for name in shown]
    print(predict.run(args, found, [printable(name) for name in shown], written))


def _parser() -> CommandParser:
    made = CommandParser(
        prog="python -m eval.predict",
        description="Names the classes of pictures, or writes their embeddings.",
    )
    made.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder, glob, or tars")
    made.add_argument(
        "--checkpoint",
        type=as_path,
        required=True,
        metavar="RUN",
        help="run or checkpoint folder, export, file of UniCL, open_clip or OpenAI CLIP",
    )
    made.add_argument(
        "--classes",
        metavar="CLASSES",
        help='"a, b, c", or a file: a name a line, a JSON list, or one of prompts/',
    )
    made.add_argument(
        "--templates",
        default=TEMPLATES,
        metavar="NAME",
        help=f"of prompts/templates.json, or a JSON file with a list (default: {TEMPLATES})",
    )
    made.add_argument("--top", type=int, default=5, help="classes of an image (default: 5)")
    made.add_argument(
        "--output", type=as_path, metavar="FILE", help="the table: .csv, .jsonl or .parquet"
    )
    made.add_argument(
        "--embed", type=as_path, metavar="FILE", help="embeddings with keys: .parquet or .npy"
    )
    made.add_argument("--batch-size", type=int, default=256, help="images at a time")
    made.add_argument("--workers", type=int, default=2, help="decoding processes")
    return made


def _check_files(args) -> None:
    """Raise ConfigError for what does not go together."""
    if not (args.classes or args.embed):
        raise ConfigError("give --classes to name what pictures show, --embed FILE, or both")
    if args.output and not args.classes:
        raise ConfigError("--output is the table of classes: give --classes too, or --embed FILE")
    for name, value, suffixes in (
        ("--output", args.output, TABLES),
        ("--embed", args.embed, EMBEDDINGS),
    ):
        if value and value.suffix not in suffixes:
            raise ConfigError(f"{name} {value}: the suffix must be one of {', '.join(suffixes)}")
    if args.output and args.output == args.embed:
        raise ConfigError(f"--output and --embed are both {args.output}: name two files")
    for name, least in (("top", 1), ("batch_size", 1), ("workers", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}")


def class_names(given: str) -> list[str]:
    """Class names of `--classes`: separated by commas, or of a file: one a line, a JSON list, or a
    table like those of prompts/ (the first name of each class).

    Raises:
        ConfigError: fewer than two, an empty one, or one that is there twice. DataError: a file
            that cannot be read.
    """
    path = as_path(given)
    if path.is_file():
        names = _of_file(path)
    elif path.suffix in (".txt", ".json") and "," not in given:
        raise DataError(f"--classes {given}: no such file")
    else:
        names = given.split(",")
    names = [name.strip() for name in names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if "" in names or len(names) < 2 or twice:
        wrong = f"named twice: {twice[:5]}" if twice else f"{len(names)} names: {names[:5]}"
        raise ConfigError(f"--classes {given}: give two names or more, each once; {wrong}")
    return names


def _of_file(path: Path) -> list[str]:
    text = read_text(path)
    if path.suffix != ".json":
        return text_lines(text)
    try:
        names = json.loads(text)
        if isinstance(names, dict):
            # ImageNet's table has two names twice, which no prompt tells apart: one class each.
            names = list(dict.fromkeys(entry["names"][0] for entry in names["classes"]))
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(map(is_text, names)):
        raise DataError(f"{path}: neither a JSON list of names nor a table as in prompts/")
    return names


if __name__ == "__main__":
    run_cli(main)
