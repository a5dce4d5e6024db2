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
from models.checkpoint_layout import ENTRIES, find_weights, holding

# Our own exports: entries of the .pt file beside `state_dict`; in a .safetensors file they lie as
# JSON under this key of its metadata.
EXPORT_KEYS = ("config", "step", "tokenizer", "image")
EXPORT_METADATA = "unicl_export"

INDEX_SUFFIX = ".index.json"
# Names of foreign classes that a refused file may need before its structure is given up.
FOREIGN_CLASSES = 30
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
    content = _unpickle(path)
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
        found = _tensors(_load_safetensors(path)[0] if safe else _unpickle(path), path)
        if missing := [name for name in names if name not in found]:
            raise DataError(f"{path}: has no {missing[0]!r}, which {index.name} says it has")
        tensors |= {name: found[name] for name in names}
    return tensors


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
            f"{_save_line(path)}"
        ) from error
    except Exception as error:  # the unpickler raises anything on damaged files
        raise DataError(f"{path}: not a PyTorch checkpoint: {error}") from error


class _Inert:
    """Stands for an object of a refused file: knows nothing and does nothing."""

    def __new__(cls, *_arguments: Any, **_named: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, _state: Any) -> None:
        """Nothing is kept."""


def _new_dict(*_arguments: Any) -> dict:
    return {}


def _save_line(path: Path) -> str:
    """Python that saves a refused file's weights, with the name of the entry that holds them.

    Its structure is read with `_Inert` in place of every class; none of the file's is imported.
    """
    opened = f"torch.load({str(path)!r}, weights_only=False)"
    content, classes = None, []
    for _ in range(FOREIGN_CLASSES):
        try:
            with torch.serialization.safe_globals(classes):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # as in `_unpickle`
            found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
            if found is None:
                break
            name = found.group(1) if "." in found.group(1) else f"builtins.{found.group(1)}"
            classes.append((_new_dict if name == "collections.defaultdict" else _Inert, name))
        else:
            break
    content = content if isinstance(content, Mapping | _Inert) else {}
    if isinstance(content, _Inert):  # a whole model
        found = f"{opened}.state_dict()"
    elif keys := holding(content):
        found = f"{opened}[{keys[0]!r:.200}]"
    elif models := [key for key in ENTRIES if isinstance(content.get(key), _Inert)]:
        found = f"{opened}[{models[0]!r:.200}].state_dict()"
    elif any(isinstance(value, Tensor) for value in content.values()):
        found = f"{{k: v for k, v in {opened}.items() if torch.is_tensor(v)}}"
    else:
        return f"torch.save({opened}[KEY], 'NEW.pt'), KEY being the entry that holds them"
    return f"torch.save({found}, 'NEW.pt')"


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
            f"k: v.float() for k, v in torch.jit.load({str(path)!r}, 'cpu').state_dict().items()}}"
            ", 'NEW.pt')"
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
    """SHA-256 of a file, in hexadecimal; of an index, that of its own and its parts' digests."""
    with path.open("rb") as stream:
        own = hashlib.file_digest(stream, "sha256").hexdigest()
    if not path.name.endswith(INDEX_SUFFIX):
        return own
    whole = [own, *(digest(path.parent / part) for part in sorted(parts(path)))]
    return hashlib.sha256("".join(whole).encode()).hexdigest()
