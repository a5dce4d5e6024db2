"""Files of weights: safetensors, and pickles of nothing but tensors and plain containers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from loaders.errors import DataError
from models import unpickling
from models.formats.checkpoint_layout import find_weights

# Our own exports: entries of the .pt file beside `state_dict`; in a .safetensors file they lie as
# JSON under this key of its metadata.
EXPORT_KEYS = ("config", "step", "tokenizer", "image")
EXPORT_METADATA = "unicl_export"

INDEX_SUFFIX = ".index.json"
PART = re.compile(r"-\d{5}-of-(\d{5})\.\w+$")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a weights file by name, and of our own exports the entries `EXPORT_KEYS`.

    Names are the file's own; where they lie in it, `checkpoint_layout.find_weights` says. The parts
    of a sharded file are read through its index. Nothing but tensors and plain containers is
    unpickled.

    Raises:
        DataError: not such a file, or one that could run code when opened; says how to convert it.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return _read_parts(path), None
    if part := PART.search(path.name):
        raise DataError(
            f"{path}: one of {int(part.group(1))} parts of a model; give the folder {path.parent}"
        )
    if path.suffix == ".safetensors":
        tensors, facts = _load_safetensors(path)
        if facts and not (isinstance(facts, dict) and facts.keys() >= {*EXPORT_KEYS}):
            raise DataError(f"{path}: its metadata {EXPORT_METADATA} lacks one of {EXPORT_KEYS}")
        return tensors, facts or None
    content = unpickling.read(path)
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: expected a dict of weights, found {type(content).__name__}")
    if all(key in content for key in ("state_dict", *EXPORT_KEYS)):
        return _tensors(content["state_dict"], path), {key: content[key] for key in EXPORT_KEYS}
    return _tensors(find_weights(content, path), path), None


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors, and what the metadata says of an export of ours."""
    try:
        with safe_open(path, "pt") as file:
            facts = (file.metadata() or {}).get(EXPORT_METADATA)
        return load_file(path), facts and json.loads(facts)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a safetensors file: {error}") from error


def parts(index: Path) -> dict[str, list[str]]:
    """Parts of a sharded file, as DeepSpeed's `zero_to_fp32.py`, transformers and accelerate write.

    Args:
        index: a `.index.json`, whose `weight_map` says which tensor lies in which part.

    Returns:
        names of tensors by name of the part, a file beside the index.

    Raises:
        DataError: no such index, or a part is missing or lies elsewhere.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found: dict[str, list[str]] = {}
        for name, part in content.items():
            found.setdefault(part, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{index}: not the index of a sharded model ({type(error).__name__}: {error})"
        ) from error
    for part in found:
        if (
            not isinstance(part, str)
            or Path(part).name != part
            or not (index.parent / part).is_file()
        ):
            raise DataError(f"{index}: names the part {str(part)[:200]!r}, which is not beside it")
    return found


def _read_parts(index: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part, names in parts(index).items():
        path = index.parent / part
        safe = path.suffix == ".safetensors"
        found = _tensors(_load_safetensors(path)[0] if safe else unpickling.read(path), path)
        if missing := [name for name in names if name not in found]:
            raise DataError(f"{path}: has no {missing[0]!r}, which {index.name} says it has")
        tensors |= {name: found[name] for name in names}
    return tensors


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a mapping by name.

    Raises:
        DataError: no mapping, or a tensor that claims more numbers than the file holds (a view
            that repeats one number a billion times costs nothing until it is copied).
    """
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: expected a dict of weights, found {type(content).__name__}")
    found = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    limit = path.stat().st_size
    for name, tensor in found.items():
        if tensor.numel() * tensor.element_size() > limit:
            raise DataError(
                f"{path}: {name[:200]!r} claims the shape {tuple(tensor.shape)}, more than the "
                f"file's {limit} bytes can hold; get the file again"
            )
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; of an index, that of its own and its parts' digests."""
    with path.open("rb") as stream:
        own = hashlib.file_digest(stream, "sha256").hexdigest()
    if not path.name.endswith(INDEX_SUFFIX):
        return own
    whole = [own, *(digest(path.parent / part) for part in sorted(parts(path)))]
    return hashlib.sha256("".join(whole).encode()).hexdigest()
