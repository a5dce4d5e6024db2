"""Export the model of a run to the formats of other libraries.

    python -m models.export --checkpoint RUN --format open_clip --output DIR

Reads the whole weights that every checkpoint holds, whatever its ZeRO stage, as float32. What can
be reloaded here is reloaded, and its features are compared, before the command succeeds.
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

from loaders.errors import ConfigError, run_cli
from loaders.specs import as_path

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.loaded_run import LoadedRun

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


def export(checkpoint: str | Path, format_name: str, output: str | Path) -> str:
    """Write the model of a run or checkpoint folder into the new folder `output`.

    Returns:
        The lines of Python that load it with its transform and its tokenizer, and as a comment
        among them what is left out: `model.regions`, which only training uses, is in our own
        formats alone.

    Raises:
        ConfigError: `output` holds files already, or the format cannot express the model; the
            message names the part. Nothing is left behind then.
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
        return write(run, folder) + _left_out(run.model.cfg, format_name)
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
    arguments = parser.parse_args(argv)
    how = export(arguments.checkpoint, arguments.format, arguments.output)
    print(f"{arguments.output}: {arguments.format}, load it with\n{how}")


if __name__ == "__main__":
    run_cli(main)
