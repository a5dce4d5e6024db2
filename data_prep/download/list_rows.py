"""Rows of a list on their way to parquet: which are usable, which are repeated.

Kept are rows with a url of an allowed scheme and a caption, the first of equal (url, caption)
rows. In a list with labels the caption may be empty, and rows with other labels are not equal.
Every other row but a repeated one is written to rejected.tsv with its line and its reason.
"""

import bisect
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from urllib.parse import quote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WEB = ("http", "https")
NOT_UTF8 = "not UTF-8"
LABEL = "label"  # extra column of class numbers, which the loader reads from the json of a sample
REJECTED_COLUMNS = ("line", "reason", "text")  # of rejected.tsv
_BATCH = 100_000  # rows that are Python objects at a time
_PLAIN_URL = re.compile(r"https?://[^\s/?#][!-~]*", re.ASCII)
_UNSAFE = re.compile(r"[^!-~]")  # blanks, control characters, non-ASCII


class Row(NamedTuple):
    """A row that a reader found; `raw` is what rejected.tsv shows if it turns out unusable."""

    row: int
    url: str
    caption: str
    raw: bytes
    extra: tuple[str | int | None, ...] = ()  # an int under LABEL


class Rejected(NamedTuple):
    """A row that a reader could not use, and why (a few fixed words, they are counted)."""

    row: int
    reason: str
    raw: bytes


@dataclass
class Notes:
    """What a reader tells besides rows: counts to show, facts to keep in index.json, and the first
    row of each file of a list of several."""

    counts: Counter = field(default_factory=Counter)
    facts: dict[str, Any] = field(default_factory=dict)
    starts: list[tuple[int, Path]] = field(default_factory=list)  # of a list of several files


def editor_line(row: int, starts: Sequence[tuple[int, Path]]) -> str:
    """Where an editor shows a row: its line counted from 1, `FILE:LINE` in a list of several."""
    if not starts:
        return str(row + 1)
    first, path = starts[bisect.bisect_right([start for start, _ in starts], row) - 1]
    return f"{path}:{row - first + 1}"


def encode_url(url: str, schemes: Sequence[str] = WEB) -> str:
    """The url with blanks, control and non-ASCII characters percent-encoded, host names as IDNA.

    Printable ASCII, a percent sign included, stays as it is. Raises `ValueError` with the reason.
    """
    url = url.strip()
    if _PLAIN_URL.fullmatch(url) and url.partition(":")[0] in schemes:
        return url
    if not url:
        raise ValueError("missing url")
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        if not host.isascii():
            name, colon, port = host.partition(":")
            url = url.replace(host, name.encode("idna").decode("ascii") + colon + port, 1)
    except ValueError:
        raise ValueError("not a url") from None
    if not parts.scheme or (parts.scheme in WEB and not parts.hostname) or " " in host:
        raise ValueError("not a url")
    if parts.scheme not in schemes:
        raise ValueError(f"scheme is not {' or '.join(schemes)}")
    return _UNSAFE.sub(lambda match: quote(match[0]), url)


class Seen:
    """The 64-bit hashes met so far, sorted: 8 bytes each where a Python set takes about 100.

    Two different rows among 15 million have equal hashes with probability 6e-6.
    """

    def __init__(self) -> None:
        self.hashes = np.empty(0, dtype=np.uint64)

    def first(self, hashes: np.ndarray) -> np.ndarray:
        """Mark (n,) bool the hashes that were not met before, and remember them."""
        values, where = np.unique(hashes, return_index=True)
        place = np.searchsorted(self.hashes, values)
        inside = place < len(self.hashes)
        new = np.ones(len(values), dtype=bool)
        new[inside] = self.hashes[place[inside]] != values[inside]
        self.hashes = np.insert(self.hashes, place[new], values[new])
        mask = np.zeros(len(hashes), dtype=bool)
        mask[where[new]] = True
        return mask


class ListWriter:
    """Writes rows to NNNNN.parquet in `stage`, `file_rows` each, the others to `rejects`.

    `starts`: `Notes.starts`, filled while rows are added.
    """

    def __init__(
        self,
        stage: Path,
        columns: Sequence[str],
        schemes: Sequence[str],
        file_rows: int,
        rejects: TextIO,
        starts: Sequence[tuple[int, Path]] = (),
    ) -> None:
        self.stage, self.schemes, self.file_rows, self.rejects = stage, schemes, file_rows, rejects
        self._starts = starts
        rejects.write("\t".join(REJECTED_COLUMNS) + "\n")
        kinds = {"row": pa.int64(), LABEL: pa.int64()}
        self.schema = pa.schema([(name, kinds.get(name, pa.string())) for name in columns])
        self._label = list(columns).index(LABEL) if LABEL in columns else None
        self._captions = "caption" in columns
        self.rows = self.duplicates = self.encoded_urls = 0
        self.rejected: Counter = Counter()
        self.files: list[dict] = []
        self._batch, self._pair_hashes, self._url_hashes = [], [], []
        self._pairs, self._urls = Seen(), Seen()
        self._parquet: pq.ParquetWriter | None = None

    def add(self, item: Row | Rejected) -> None:
        """Take a row, or note why not."""
        if isinstance(item, Rejected):
            self._reject(*item)
            return
        try:
            url = encode_url(item.url, self.schemes)
            if self._label is None and not item.caption.strip():
                raise ValueError("empty caption")
            caption = [item.caption] if self._captions else []
            values = (url, *caption, item.row, *item.extra)
            key = url.encode()
            pair = key + b"\t" + item.caption.encode()
            if self._label is not None:
                pair += b"\t%d" % values[self._label]
        except UnicodeError:
            self._reject(item.row, NOT_UTF8, item.raw)
        except ValueError as error:
            self._reject(item.row, str(error), item.raw)
        else:
            self.encoded_urls += url != item.url.strip()
            self._batch.append(values)
            self._pair_hashes.append(hashlib.blake2b(pair, digest_size=8).digest())
            self._url_hashes.append(hashlib.blake2b(key, digest_size=8).digest())
            if len(self._batch) == _BATCH:
                self._flush()

    def close(self) -> None:
        """Write what is left and flush the files to disk; `files` then describes them."""
        self._flush()
        self._end_file()
        self.rejects.flush()
        os.fsync(self.rejects.fileno())

    @property
    def same_url_other_caption(self) -> int:
        """Kept rows whose url an earlier row had."""
        return self.rows - len(self._urls.hashes)

    def _reject(self, row: int, reason: str, raw: bytes) -> None:
        self.rejected[reason] += 1
        escaped = raw.decode("latin-1").encode("unicode_escape").decode("ascii")
        self.rejects.write(f"{editor_line(row, self._starts)}\t{reason}\t{escaped}\n")

    def _flush(self) -> None:
        """Write the rows of the batch that are new."""
        if not self._batch:
            return
        new = self._pairs.first(_hash_array(self._pair_hashes))
        self._urls.first(_hash_array(self._url_hashes)[new])
        columns = zip(zip(*self._batch, strict=True), self.schema.types, strict=True)
        table = pa.table([pa.array(*column) for column in columns], schema=self.schema)
        table = table.filter(pa.array(new))
        self.duplicates += len(self._batch) - table.num_rows
        self.rows += table.num_rows
        self._batch, self._pair_hashes, self._url_hashes = [], [], []
        while table.num_rows:
            if self._parquet is None:
                name = f"{len(self.files):05d}.parquet"
                self.files.append({"file": name, "rows": 0})
                self._parquet = pq.ParquetWriter(self.stage / name, self.schema, compression="zstd")
            entry = self.files[-1]
            piece = table.slice(0, self.file_rows - entry["rows"])
            self._parquet.write_table(piece)
            entry["rows"] += piece.num_rows
            table = table.slice(piece.num_rows)
            if entry["rows"] == self.file_rows:
                self._end_file()

    def _end_file(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
            self.files[-1]["sha256"] = flush_and_hash(self.stage / self.files[-1]["file"])
            self._parquet = None


def flush_and_hash(path: Path) -> str:
    """Flush a file to disk and return the sha256 of what it holds."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_array(digests: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), dtype="<u8")
