"""What loading gives: a model with the facts of where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.base import Model


@dataclass(frozen=True)
class LoadedRun:
    """A model with what an evaluation row has to say about it.

    `cfg` has at least the `model:` section (image statistics, tokenizer and context length
    included); a run's is complete. `step` is None where the file does not say. `path` is the
    checkpoint folder of a run, else the file. `name` is for tables: the run folder's name, the
    folder's or the file's stem.
    """

    model: Model
    cfg: dict[str, Any]
    step: int | None
    checkpoint_hash: str
    path: Path
    name: str

    @property
    def reference(self) -> str | None:
        """Checksum of the reference folder that the model looks up; None for other kinds."""
        reference = self.model.cfg.reference
        return reference and reference.checksum
