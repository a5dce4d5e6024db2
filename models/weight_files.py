"""Files of weights: safetensors, and pickles of nothing but tensors and plain containers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
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
            facts = facts and json.loads(facts)
            tensors = load_file(path)
        except (SafetensorError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: not a safetensors file: {error}") from error
        if facts and not (isinstance(facts, dict) and facts.keys() >= {*EXPORT_KEYS}):
            raise DataError(f"{path}: its metadata {EXPORT_METADATA} lacks one of {EXPORT_KEYS}")
        return tensors, facts or None
    content = _unpickle(path)
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: expected a dict of weights, found {type(content).__name__}")
    if all(key in content for key in ("state_dict", *EXPORT_KEYS)):
        return _tensors(content["state_dict"], path), {key: content[key] for key in EXPORT_KEYS}
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    # `module.` stands before every name that a wrapped model saved.
    tensors = _tensors(content, path)
    return {name.removeprefix("module."): value for name, value in tensors.items()}, None


@contextlib.contextmanager
def plain_data_only(what: Path, classes: Sequence[type] = ()) -> Iterator[None]:
    """Within it every `torch.load` refuses code, also one that asks for `weights_only=False`.

    For libraries that read checkpoints themselves. Nothing but tensors, plain containers and
    `classes` is unpickled (torch's own switch, TORCH_FORCE_WEIGHTS_ONLY_LOAD).

    Args:
        what: the checkpoint, for the message.

    Raises:
        DataError: a file held something else.
    """
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        with torch.serialization.safe_globals(list(classes)):
            yield
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{what}: one of its files holds more than tensors and training state and is not "
            f"opened, since that could run code: {_reason(error)}. Files of a run of this "
            "repository never do: take an earlier checkpoint, and find out who wrote this one"
        ) from error
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


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


def _unpickle(path: Path) -> Any:
    with path.open("rb") as stream:
        if stream.read(2) not in (b"PK", b"\x80\x02"):  # an archive, or torch's older pickles
            raise DataError(f"{path}: not a PyTorch checkpoint")
    _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: holds more than tensors and is not opened, since that could run code: "
            f"{_reason(error)}. If you trust its source, save its weights alone: "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)"
        ) from error
    except Exception as error:  # the unpickler raises anything on damaged files
        raise DataError(f"{path}: not a PyTorch checkpoint: {error}") from error


def _check_archive(path: Path) -> None:
    """Refuse archives of code, and compressed ones: torch writes none, and a bomb is one."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise DataError(f"{path}: not a PyTorch checkpoint: {error}") from error
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise DataError(
            f"{path}: a TorchScript archive, as OpenAI published CLIP; it holds code and "
            "is not opened. If you trust its source, save its weights alone: torch.save({"
            "k: v.float() for k, v in torch.jit.load(FILE, 'cpu').state_dict().items()}, "
            "NEW_FILE)"
        )
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise DataError(
                f"{path}: {member.filename[:200]!r} is compressed, which torch.save never does; "
                "get the file again, or unpack it and pack it without compression"
            )


def _reason(error: pickle.UnpicklingError) -> str:
    """What torch's long message is about: the object that the file asks for, or its complaint."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found:
        return f"it asks for {found.group(1)[:200]}"
    sentence = re.split(r"WeightsUnpickler error: ", str(error))[-1].partition(". ")[0]
    return sentence.strip().partition("\n")[0][:200]


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
