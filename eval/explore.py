"""Look at a model: `python -m eval.explore --checkpoint RUN [RUN2] --data D --output DIR`.

A page for this machine's browser: search a data set by words or by a picture, see the nearest
pictures, captions and classes, and what a labelled set is confused with; of two checkpoints side
by side. Nothing is read from the network or sent to it.
"""

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put eval/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval import cli
from eval.sources.presence import recognise
from loaders.errors import CommandParser, ConfigError, DataError, run_cli
from loaders.specs import as_path

ADDRESS = "127.0.0.1"  # no other machine can ask; docs/evaluation.md says how to look from one


def parser() -> CommandParser:
    """The arguments of the command."""
    made = CommandParser(prog="python -m eval.explore", description="A page to look at a model.")
    made.add_argument(
        "--checkpoint",
        nargs="+",
        required=True,
        type=as_path,
        metavar="RUN",
        help="one or two runs, checkpoint folders, exports, files of UniCL, open_clip or OpenAI",
    )
    made.add_argument(
        "--data",
        nargs="+",
        required=True,
        type=as_path,
        metavar="D",
        help="folders with shards or tars, class folders, local Hugging Face data sets",
    )
    made.add_argument(
        "--output",
        type=as_path,
        required=True,
        metavar="DIR",
        help="keeps the features, 2 bytes a number, so that the next start is quick",
    )
    made.add_argument(
        "--templates",
        metavar="PRESET",
        help="for class names: a preset of prompts/templates.json, or a JSON file with a list "
        "(default: those of the set, else clip_80)",
    )
    made.add_argument("--port", type=int, default=8000, help="0: any that is free")
    made.add_argument("--batch-size", type=int, default=256)
    made.add_argument("--workers", type=int, default=2, help="decoding processes")
    return made


def bind(port: int) -> socket.socket:
    """A listening socket for this machine alone: who asks early waits until the index is there.

    Raises ConfigError for a port that cannot be had.
    """
    try:
        return socket.create_server((ADDRESS, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port {port}: not to be had ({error}); name another, or 0") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; returns when it is interrupted."""
    args = parser().parse_args(argv)
    if len(args.checkpoint) > 2:
        raise ConfigError(f"--checkpoint: {len(args.checkpoint)} given, side by side fit two")
    for folder in args.data:
        if recognise(folder) is None:
            raise DataError(
                f"{folder}: no data set; --data takes a folder with manifest.json, with *.tar "
                "files, with a folder of images for each class, or of Hugging Face datasets"
            )
    cli.require(args.checkpoint)
    with bind(args.port) as bound:
        # Late: torch and the towers take ten seconds, and the answers above should not.
        from eval.explorer import opening, site

        server = site.server(opening.explorer(args), bound)
        print(f"http://{ADDRESS}:{server.port}/ (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    run_cli(main)
