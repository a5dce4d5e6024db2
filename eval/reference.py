"""Makes a reference folder for models of the kind `reference`: `python -m eval.reference --data
SHARDS --encoder RUN --text-encoder RUN --output DIR`.

Every image-text pair of the shards becomes two rows of unit length: the image by a frozen image
encoder, as pooled before its projection, and its first caption by a frozen text encoder, likewise.
The folder also holds the image encoder, which a model needs to look anything up. The pairs must not
be trained on. DIR appears when it is whole; a command that was stopped is run again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put eval/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval import cli
from loaders.errors import CommandParser, ConfigError, run_cli
from loaders.manifest import open_shards
from loaders.specs import as_path


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this file."""
    parser = CommandParser(
        prog="python -m eval.reference", description="Makes a reference folder of image-text pairs."
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="SHARDS",
        help="set folder, tar, brace range or glob: pairs that no model is trained on",
    )
    parser.add_argument(
        "--encoder",
        required=True,
        metavar="RUN",
        help="frozen image encoder: run, checkpoint, export, or a timm name with its weights",
    )
    parser.add_argument(
        "--text-encoder",
        type=as_path,
        required=True,
        metavar="RUN",
        help="frozen text encoder: run, checkpoint, export, or a folder of transformers",
    )
    parser.add_argument(
        "--caption", default="txt", metavar="SOURCE", help="txt (default) or json.KEY"
    )
    parser.add_argument("--output", type=as_path, required=True, metavar="DIR", help="new folder")
    parser.add_argument("--batch-size", type=int, default=256, help="pairs at a time")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes")
    args = parser.parse_args(argv)
    if args.output.exists():
        raise ConfigError(f"--output {args.output} exists; name a new folder, or remove it")
    cli.require([args.text_encoder])
    shards = open_shards(args.data, kind="image_text")
    # Late: torch and the towers take ten seconds, and the answers above should not.
    from eval.tasks import reference

    print(reference.make(args, shards))


if __name__ == "__main__":
    run_cli(main)
