"""Pickles of nothing but tensors and plain containers: code in them never runs."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loaders.errors import DataError
from models.formats.checkpoint_layout import ENTRIES, holding

# Names of foreign classes that a refused file may need before its structure is given up.
FOREIGN_CLASSES = 30


def read(path: Path) -> Any:
    """What `torch.save` wrote into a file.

    Raises:
        DataError: not such a file, or one that could run code when opened; says how to convert it.
    """
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
        except Exception as error:  # as in `read`
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
