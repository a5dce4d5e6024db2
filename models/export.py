"""Export the model of a run to the formats of other libraries.

    python -m models.export --checkpoint RUN --format open_clip --output DIR

Reads the whole weights that every checkpoint holds, whatever its ZeRO stage, as float32. What can
be reloaded here is reloaded, and its features are compared, before the command succeeds. With
`--push-to-hub NAME --license ID` a model card is written beside it, and all is uploaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a file: Python put models/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from loaders.errors import ConfigError, DataError, run_cli
from loaders.specs import as_path

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.loaded_run import LoadedRun
    from models.model_card import Card

FORMATS = ("pt", "safetensors", "open_clip", "hf", "timm")


def writer(format_name: str) -> Callable[[LoadedRun, Path], str]:
    """What writes one of `FORMATS` into an empty folder, and returns the Python that loads it, as
    lines that run."""
    # Imports are late so that --help and a wrong flag answer at once.
    from models.formats import hugging_face, open_clip, plain, timm_image

    return {
        "pt": plain.write_pt,
        "safetensors": plain.write_safetensors,
        "open_clip": open_clip.write,
        "hf": hugging_face.write,
        "timm": timm_image.write,
    }[format_name]


def export(
    checkpoint: str | Path, format_name: str, output: str | Path, card: Card | None = None
) -> str:
    """Write the model of a run or checkpoint folder into the new folder `output`, with its card.

    Returns:
        The lines of Python that load it with its transform and its tokenizer, and as a comment
        among them what is left out: `model.regions`, which only training uses, is in our own
        formats alone.

    Raises:
        ConfigError: `output` holds files already, or the format cannot express the model; the
            message names the part. With a card also what is bound to this machine. Nothing is
            left behind then.
        DataError: the checkpoint cannot be read.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--output {folder} exists and is not an empty folder; name a new one")
    from models import weights

    run, write = weights.load_run(checkpoint), writer(format_name)
    _refuse_inexpressible(run.model.cfg, format_name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        how = write(run, folder) + _left_out(run.model.cfg, format_name)
        if card is not None:
            from models import model_card

            model_card.write(run, format_name, folder, card)
        return how
    except BaseException:
        shutil.rmtree(folder)
        raise


def _refuse_inexpressible(cfg: ModelConfig, format_name: str) -> None:
    """Name the setting of a model that other libraries have nothing like."""
    foreign = {
        "kind": ("two_tower", "open_clip", "hf", "timm"),
        "similarity": ("cosine", "open_clip", "hf"),
        "augmentation": (None, "open_clip", "hf"),
    }
    for name, (usual, *formats) in foreign.items():
        value = getattr(cfg, name)
        if value != usual and format_name in formats:
            told = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
            raise ConfigError(
                f"--format {format_name} cannot express model.{name}={told}, only "
                f"{usual or 'null'}; use --format safetensors or pt, which `models.weights.load` "
                "reads"
            )


def _left_out(cfg: ModelConfig, format_name: str) -> str:
    """A line on what the formats of other libraries have no place for and evaluation no use."""
    if cfg.regions is None or format_name in ("pt", "safetensors"):
        return ""
    return "\n# left out: model.regions, which only training uses"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m models.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", type=as_path, required=True, help="run or checkpoint folder"
    )
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument(
        "--output", type=as_path, required=True, metavar="DIR", help="new or empty folder"
    )
    parser.add_argument(
        "--push-to-hub", metavar="NAME", help="upload to this repository, say you/your-model"
    )
    parser.add_argument(
        "--license", metavar="ID", help="of the weights, as the hub names it, say apache-2.0"
    )
    parser.add_argument(
        "--results", type=as_path, metavar="DIR", help="result rows for the model card"
    )
    arguments = parser.parse_args(argv)
    if not arguments.checkpoint.exists():  # said before torch is loaded
        raise DataError(f"{arguments.checkpoint}: no such file or folder")
    name, license_id = arguments.push_to_hub, arguments.license
    if (name is None) != (license_id is None) or (arguments.results and name is None):
        raise ConfigError(
            "--push-to-hub NAME needs --license ID, the licence that you give the weights; "
            "--license and --results are for the card that goes with it"
        )
    card = _card(arguments) if name else None
    how = export(arguments.checkpoint, arguments.format, arguments.output, card)
    print(f"{arguments.output}: {arguments.format}, load it with\n{how}")
    if name:
        from models import hub

        message = f"{arguments.checkpoint.resolve().name} as {arguments.format}"
        print(f"-> {hub.push(arguments.output, name, message)}")


def _card(arguments: argparse.Namespace) -> Card:
    from models import hub
    from models.model_card import Card

    hub.require_access(arguments.push_to_hub)
    return Card(arguments.push_to_hub, arguments.license, arguments.results)


if __name__ == "__main__":
    run_cli(main)
