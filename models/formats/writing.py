"""What writers of formats share: small files, and the comparison with what a library rebuilt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loaders.errors import ConfigError
from models.loaded_run import LoadedRun

# Largest difference of unit-length features that counts as rounding. Small models agree to 1e-6,
# deep ones with large weights to a few 1e-5; another function is off by 1e-2 and more.
TOLERANCE = 1e-4


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a state dict that safetensors takes."""
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def write_json(path: Path, content: Any) -> None:
    """Write `content`, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def random_images(run: LoadedRun) -> Tensor:
    """(2, 3, size, size) noise, the same every time, in the layout that our tower works on."""
    size = run.model.cfg.image.size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return images.contiguous(memory_format=torch.channels_last)


def require_same(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Compare features (b, D) after normalisation.

    Raises:
        ConfigError: shape or values differ.
    """
    same = ours.shape == theirs.shape
    if same:
        difference = (F.normalize(ours, dim=-1) - F.normalize(theirs, dim=-1)).abs().max().item()
        same = difference <= TOLERANCE
    if not same:
        found = f"differ by {difference:.1e}" if ours.shape == theirs.shape else "differ in shape"
        raise ConfigError(
            f"{what}: the reloaded features {found}, so this model cannot be exported to this "
            "format; use pt or safetensors"
        )
