"""Files that a reader sees whole or not at all, and that a power failure does not empty."""

import errno
import os
import secrets
from pathlib import Path

from loaders.errors import DataError

FULL = (errno.ENOSPC, errno.EDQUOT)  # error numbers of a full disk or quota


def write_once(path: Path, text: str) -> None:
    """Write a file unless it is there; the first of several processes wins, whole."""
    temporary = _write_temporary(path, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new text, never a part."""
    os.replace(_write_temporary(path, text), path)


def _write_temporary(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in FULL:
            raise
        raise DataError(f"{path}: the disk is full; make room, run the same again") from None
    return temporary


def flush(path: Path) -> None:
    """Write a file or the names in a folder to disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
