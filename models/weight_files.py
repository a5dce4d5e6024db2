"""Files of weights: safetensors, and pickles of nothing but tensors and plain containers."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from loaders.errors import DataError

# Our own exports: entries of the .pt file beside `state_dict`; in a .safetensors file they lie as
# JSON under this key of its metadata.
EXPORT_KEYS = ("config", "step", "tokenizer", "image")
EXPORT_METADATA = "unicl_export"


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a weights file by name, and of our own exports the entries `EXPORT_KEYS`.

    Weights may lie under `model` or `state_dict`, and their names may begin with `module.`.
    Nothing but tensors and plain containers is unpickled.

    Raises:
        DataError: not such a file, or one that could run code when opened; says how to convert it.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                facts = (file.metadata() or {}).get(EXPORT_METADATA)
            return load_file(path), facts and json.loads(facts)
        except (SafetensorError, ValueError) as error:
            raise DataError(f"{path}: not a safetensors file: {error}") from error
    content = _unpickle(path)
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: expected a dict of weights, found {type(content).__name__}")
    if all(key in content for key in ("state_dict", *EXPORT_KEYS)):
        return content["state_dict"], {key: content[key] for key in EXPORT_KEYS}
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    # `module.` stands before every name that a wrapped model saved.
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    return {name.removeprefix("module."): value for name, value in tensors.items()}, None


def _unpickle(path: Path) -> Any:
    with path.open("rb") as stream:
        if stream.read(2) not in (b"PK", b"\x80\x02"):  # an archive, or torch's older pickles
            raise DataError(f"{path}: not a PyTorch checkpoint")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise DataError(
                    f"{path}: a TorchScript archive, as OpenAI published CLIP; it holds code and "
                    "is not opened. If you trust its source, save its weights alone: torch.save({"
                    "k: v.float() for k, v in torch.jit.load(FILE, 'cpu').state_dict().items()}, "
                    "NEW_FILE)"
                )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: holds more than tensors and is not opened, since that could run code: "
            f"{_reason(error)}. If you trust its source, save its weights alone: "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise DataError(f"{path}: not a PyTorch checkpoint: {error}") from error


def _reason(error: pickle.UnpicklingError) -> str:
    """The sentence of torch's long message that names the object."""
    return re.split(r"WeightsUnpickler error: ", str(error))[-1].partition(". ")[0].splitlines()[0]


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
