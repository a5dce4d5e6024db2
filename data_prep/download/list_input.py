"""The published files that a list is made from: their identity, and their lines."""

import bz2
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from loaders.errors import DataError
from loaders.progress import Progress

_BAR_LINES = 5_000
_DAMAGED = (EOFError, zlib.error)


def identify(paths: Sequence[Path], known: Sequence[dict] = ()) -> list[dict]:
    """Name, bytes, mtime_ns and sha256 of each file.

    A file whose name, size and time of change are those of its entry in `known` is not read
    again: the metadata of YFCC100M is 65 GB, and every task of an array asks. Raises `DataError`
    for a missing file.
    """
    entries = []
    for place, path in enumerate(paths):
        status = _stat(path)
        entry = {"name": path.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        stated = known[place] if place < len(known) else {}
        unchanged = entry.items() <= stated.items()
        entries.append(stated if unchanged else entry | {"sha256": _hash_file(path)})
    return entries


def join_digests(digests: Sequence[str]) -> str:
    """One digest for several files: of the only one, else the sha256 over the hex digests."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def read_lines(
    paths: Sequence[Path], show: bool = True, starts: list[tuple[int, Path]] | None = None
) -> Iterator[tuple[int, bytes]]:
    """Lines of text files as (number, bytes): numbers from 0 on over all files.

    Plain, gzip or bzip2, told by the content. A UTF-8 byte order mark at the start of a file, LF
    or CRLF line ends, and empty lines at the end of a file are taken off, nothing else. `show`:
    progress by bytes of the files on disk. `starts`: gets the number of the first line of each
    file. Raises `DataError` for a missing file and for compressed data that ends early.
    """
    total = sum(_stat(path).st_size for path in paths)
    first = done = 0
    with Progress(desc="", unit="B", scaled=True, total=total, after=1, show=show) as bar:
        for path in paths:
            bar.name(path.name)
            with open(path, "rb", buffering=0) as raw:
                number, empty = first - 1, []  # empty lines: none if no other follows
                if starts is not None:
                    starts.append((first, path))
                for number, line in enumerate(_lines(path, raw), first):
                    if number == first:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    line = line.removesuffix(b"\n").removesuffix(b"\r")
                    if not line:
                        empty.append((number, line))
                        continue
                    if empty:
                        yield from empty
                        empty = []
                    yield number, line
                    if number % _BAR_LINES == 0:
                        bar.update(done + raw.tell() - bar.n)
                first, done = number + 1, done + raw.tell()
                bar.update(done - bar.n)


def _lines(path: Path, raw) -> Iterator[bytes]:
    """Lines of an open file that may be compressed; `raw.tell()` shows how far it was read."""
    start = raw.read(3)
    raw.seek(0)
    if start == b"BZh":
        stream = bz2.BZ2File(raw)
    elif start[:2] == b"\x1f\x8b":
        stream = gzip.GzipFile(fileobj=raw)
    else:
        with open(os.dup(raw.fileno()), "rb", buffering=1 << 20) as stream:
            yield from stream
        return
    try:
        yield from stream
    except (*_DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; those of bz2 and gzip have no number
        raise DataError(
            f"{path}: the compressed data is damaged or ends early ({error}); fetch it again"
        ) from None


def _stat(path: Path) -> os.stat_result:
    if not path.is_file():
        raise DataError(f"{path}: no such file; name the file as it was published")
    return path.stat()


def _hash_file(path: Path) -> str:
    total = hashlib.sha256()
    with (
        open(path, "rb") as file,
        Progress(
            desc=f"sha256 of {path.name}", unit="B", scaled=True, total=_stat(path).st_size, after=1
        ) as bar,
    ):
        while block := file.read(1 << 22):
            total.update(block)
            bar.update(len(block))
    return total.hexdigest()
