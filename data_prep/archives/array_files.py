"""A folder of arrays for samples: FOLDER/KEY.npy or FOLDER/SHARD/KEY.npy."""

import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from loaders.arrays import BadArray, parse
from loaders.errors import ConfigError, DataError
from loaders.tarreader import ARRAYS

ENDING = ".npy"


def parse_folders(words: Sequence[str]) -> dict[str, Path]:
    """{'objects': Path('F')} for 'objects=F'; raises `ConfigError`."""
    found: dict[str, Path] = {}
    for word in words:
        name, _, folder = word.partition("=")
        if name not in ARRAYS or not folder or name in found:
            raise ConfigError(
                f"--arrays {word}: give NAME=FOLDER, each NAME once, of {', '.join(ARRAYS)}"
            )
        found[name] = Path(folder)
    return found


def find(folder: Path) -> dict[str, bytes]:
    """Key -> path of every array in the folder and its sub-folders, in the order of the keys.

    Raises `DataError` where there is none.
    """
    found = {}
    for place, _, names in os.walk(os.fsencode(folder)):
        for name in names:
            if name.endswith(ENDING.encode()):
                path = os.path.join(place, name)
                key = os.path.relpath(path, os.fsencode(folder))[: -len(ENDING)]
                found[os.fsdecode(key)] = path
    if not found:
        raise DataError(f"{folder}: no folder with files KEY{ENDING} or SHARD/KEY{ENDING}")
    return dict(sorted(found.items()))


def digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 of names, sizes and times of change: not of the contents, of which there are many."""
    digest = sha256()
    for key, path in files.items():
        facts = os.stat(path)
        digest.update(repr((key, facts.st_size, facts.st_mtime_ns)).encode())
    return digest.hexdigest()


def read(path: bytes) -> bytes:
    """The bytes of an array that training can read.

    Raises:
        DataError: it is none of `loaders.arrays.parse`, or larger than training reads.
    """
    shown = os.fsdecode(path)
    try:
        if os.stat(path).st_size > max(ARRAYS.values()):
            raise BadArray("array_length", "too large to be read")
        with open(path, "rb") as file:
            data = file.read()
        parse(data)
    except BadArray as error:
        raise DataError(f"{shown}: {error}; write it again, or take it away") from None
    except OSError as error:
        raise DataError(f"{shown}: cannot be read ({error.strerror})") from None
    return data
