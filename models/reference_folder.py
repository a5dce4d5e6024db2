"""Reference folders: image-text pairs as features, for models of the kind `reference`.

    DIR/reference.json         what the folder holds, of which data and encoders, and its checksums
    DIR/features.safetensors   image (R, d_u) and text (R, d_w) float16, rows of unit length
    DIR/encoder.safetensors    the frozen image encoder that made `image`, with its configuration
    DIR/samples.tsv            key, shard and SHA-256 of the image file of each row

The encoder lies in the folder because a query made by another one would find nothing that is near.
`eval.reference` makes such a folder. The features are mapped into memory, not read.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loaders.errors import ConfigError, DataError
from models.config import ImageConfig, ReferenceConfig
from models.formats import writing
from models.formats.weight_files import digest
from models.image_timm import TimmTower

MANIFEST = "reference.json"
FEATURES = "features.safetensors"
ENCODER = "encoder.safetensors"
SAMPLES = "samples.tsv"
FILES = (FEATURES, ENCODER, SAMPLES)
CONFIG = "image_config"  # key of the encoder's metadata
COMMAND = "python -m eval.reference --data SHARDS --encoder RUN --text-encoder RUN --output DIR"


@dataclass(frozen=True)
class ReferenceFolder:
    """A folder whose files are what its manifest says.

    `path` is absolute; `checksum` is over the checksums of all files; `samples` is R; `facts` is
    the manifest.
    """

    path: Path
    checksum: str
    samples: int
    facts: dict[str, Any]

    def features(self) -> tuple[Tensor, Tensor]:
        """image (R, d_u) and text (R, d_w), float16 on the CPU, mapped from the file."""
        found = load_file(self.path / FEATURES)
        return found["image"], found["text"]

    def encoder(self) -> tuple[TimmTower, ImageConfig]:
        """The frozen image encoder in evaluation mode, and its configuration."""
        path = self.path / ENCODER
        with safe_open(path, "pt") as file:
            cfg = ImageConfig.from_dict(json.loads(file.metadata()[CONFIG]))
        tower = TimmTower(cfg)
        tower.load_state_dict(load_file(path))
        return tower.eval().requires_grad_(False), cfg


def find(cfg: ReferenceConfig) -> ReferenceFolder:
    """The folder of a configuration, every byte of it checked once a process.

    Raises:
        DataError: it is not there, a file of it is damaged, or it is not the one that a model was
            trained with. ConfigError: it holds fewer samples than are to be looked up.
    """
    folder = Path(cfg.folder).absolute()
    where = f"model.reference.folder={cfg.folder}"
    if not (folder / MANIFEST).is_file():
        needed = f" with the checksum {cfg.checksum}" if cfg.checksum else ""
        raise DataError(
            f"{where}: no reference folder{needed} there (no {MANIFEST}); put it there, a link is "
            f"enough, or make one with {COMMAND}"
        )
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        stated, checksum, samples = facts["files"], facts["checksum"], facts["samples"]
        damaged = [name for name in FILES if _digest_now(folder / name) != stated[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: {type(error).__name__}: {error}; make it again") from None
    if damaged or checksum != _checksum(stated):
        names = ", ".join(damaged) or MANIFEST
        raise DataError(f"{where}: {names} changed since the folder was made; make it again")
    if cfg.checksum not in (None, checksum):
        raise DataError(
            f"{where}: its checksum is {checksum}, and the model was trained with the reference "
            f"{cfg.checksum}; put that one there, a link is enough"
        )
    if samples < cfg.neighbours:
        raise ConfigError(
            f"model.reference.neighbours={cfg.neighbours}: {folder} holds {samples} samples"
        )
    return ReferenceFolder(folder, checksum, samples, facts)


def write(
    folder: Path,
    image: Tensor,
    text: Tensor,
    encoder: tuple[TimmTower, ImageConfig],
    samples: Sequence[tuple[str, str, str]],
    facts: Mapping[str, Any],
) -> None:
    """Make a reference folder, whole or not at all: it is renamed once everything is in it.

    Args:
        folder: must not exist. image, text: rows of unit length, of any float type.
        encoder: what made `image`. samples: (key, shard, SHA-256 of the image file) of each row.
        facts: further entries of the manifest.
    """
    scratch = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)  # of an earlier attempt that was killed
    scratch.mkdir(parents=True)
    rows = {"image": image.half().contiguous(), "text": text.half().contiguous()}
    save_file(rows, scratch / FEATURES)
    tower, cfg = encoder
    metadata = {CONFIG: json.dumps(dataclasses.asdict(cfg))}
    save_file(writing.contiguous(tower.state_dict()), scratch / ENCODER, metadata)
    lines = ["key\tshard\tsha256", *("\t".join(sample) for sample in samples)]
    (scratch / SAMPLES).write_text("\n".join(lines) + "\n", "utf-8", "surrogateescape")
    files = {name: digest(scratch / name) for name in FILES}
    made = {"checksum": _checksum(files), "samples": len(image), **facts, "files": files}
    writing.write_json(scratch / MANIFEST, made)
    os.rename(scratch, folder)


def _checksum(files: Mapping[str, str]) -> str:
    """SHA-256 over the checksums of the files, in the order of `FILES`."""
    return hashlib.sha256("".join(files[name] for name in FILES).encode()).hexdigest()


def _digest_now(path: Path) -> str:
    facts = path.stat()
    return _digest(path, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _digest(path: Path, size: int, changed: int) -> str:
    """`digest`, once a process as long as the file stays the same."""
    return digest(path)
