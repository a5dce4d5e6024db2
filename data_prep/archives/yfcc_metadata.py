"""The metadata of YFCC100M (Thomee et al., CACM 2016) joined with a list of photo ids.

Two published forms are read. SQLite: table `yfcc100m_dataset`, 100 million rows, no photo hash
(`yfcc100m_dataset.sql` of the bucket multimedia-commons). TSV: 25 columns without a header, by
number: 0 line, 1 photo id, 2 hash, 8 title, 9 description, 16 download url, 18 licence url, 24
marker, 0 for a photo and 1 for a video; gzip and bzip2 are read as they are. Texts are
URL-encoded with + for a blank in both.
"""

import hashlib
import re
import sqlite3
from array import array
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote_plus

import numpy as np

from data_prep.download.list_input import read_lines
from data_prep.download.list_rows import NOT_UTF8, Notes, Rejected
from loaders.errors import DataError
from loaders.progress import Progress

TABLE = "yfcc100m_dataset"
TSV_COLUMNS = 25
CAPTIONS = ("title", "description", "title_description", "random")
_FIELDS = {"title": 8, "description": 9, "downloadurl": 16, "licenseurl": 18, "marker": 24}
_BATCH = 20_000
_CACHE_KIB = 400_000  # holds the temporary table of 15 million ids
_HASH_BYTES = 32
_PHOTO_ID = re.compile(rb"\d{1,18}")
_LIST_LINE = re.compile(rb"(\d{1,18})\t(\d{1,18})\t([0-9a-f]{6,32})")
# A tag begins with a letter, so that "<3" stays.
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_LINK = re.compile(r"https?://\S+|www\.\S+", re.IGNORECASE)


@dataclass
class Photos:
    """Photos of a list: position p in the ascending ids is entry `order[p]` of the list."""

    ids: np.ndarray  # (n,) int64, ascending
    order: np.ndarray  # (n,) int64
    rows: np.ndarray  # int32, line of the list, from 0
    hashes: np.ndarray  # S32

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, position: int) -> int:
        """Line of the list, from 0."""
        return int(self.rows[self.order[position]])

    def hash(self, position: int) -> str:
        """Name of the photo in the bucket."""
        return self.hashes[self.order[position]].decode()


class Metadata(NamedTuple):
    """One photo as the metadata holds it; texts still URL-encoded."""

    position: int  # in `Photos`
    title: str
    description: str
    download_url: str
    license_url: str


def clean(text: str) -> str:
    """Title or description as plain text.

    URL-decoded (+ is a blank), html tags removed, links removed, white space joined to single
    blanks. After the YFCC card of dalle-mini and make_dataset.py of SLIP; SLIP removes <a>, <b>
    and <i> only, keeps white space as it is, and makes a blank of an encoded plus sign too.
    """
    return " ".join(_LINK.sub("", _TAG.sub("", unquote_plus(text))).split())


def photo_hash(download_url: str) -> str:
    """Name of a photo in the bucket: md5 of its download url, bytes in hex without leading zero.

    After convert_metadata.py of github.com/zc277584121/yfcc100m (a fork of jfolz/yfcc100m).
    """
    return "".join(f"{byte:x}" for byte in hashlib.md5(download_url.encode()).digest())


def join_caption(title: str, description: str, rule: str, photo_id: int) -> str:
    """The caption of a photo from its cleaned texts by a rule of `CAPTIONS`; may be empty."""
    if rule == "title":
        return title
    if rule == "description":
        return description
    texts = [text for text in (title, description) if text]
    if rule == "title_description" or not texts:
        return ". ".join(texts)
    draw = hashlib.blake2b(b"%d" % photo_id, digest_size=8).digest()
    return texts[int.from_bytes(draw, "little") % len(texts)]


def read_photos(path: Path, chosen: np.ndarray | None, rejected: list[Rejected]) -> Photos:
    """Read OpenAI's list: line number of the metadata, photo id and hash, no header.

    `chosen`: line numbers to keep, all if None. Lines that are not of the list, and repeated
    ids, are added to `rejected`. Raises `DataError` if none of the first 1000 lines is good.
    """
    ids, rows, hashes, good = array("q"), array("i"), bytearray(), False
    for row, line in read_lines([path]):
        match = _LIST_LINE.fullmatch(line)
        if not match:
            rejected.append(Rejected(row, "not a line of the list", line))
            if row == 999 and not good:
                raise DataError(
                    f"{path}: the first 1000 lines are not (line number, photo id, hash), the "
                    f"first is {rejected[0].raw[:200]!r}; use yfcc100m_subset_data.tsv.bz2"
                )
            continue
        good, number = True, int(match[1])
        if chosen is None or (number < len(chosen) and chosen[number]):
            ids.append(int(match[2]))
            rows.append(row)
            hashes += match[3].ljust(_HASH_BYTES, b"\0")
    # Views and one order, no sorted copies: the hashes of 15 million photos are 0.5 GB.
    lines, names = np.frombuffer(rows, np.int32), np.frombuffer(hashes, f"S{_HASH_BYTES}")
    numbers, order = np.unique(np.frombuffer(ids, np.int64), return_index=True)
    repeated = np.ones(len(lines), dtype=bool)
    repeated[order] = False
    for place in np.flatnonzero(repeated):
        rejected.append(Rejected(int(lines[place]), "photo id again", b"%d" % ids[place]))
    return Photos(numbers, order, lines, names)


def join(path: Path, photos: Photos, notes: Notes) -> Iterator[Metadata | Rejected]:
    """Metadata of the listed photos in the order of the metadata, each once.

    Photos that it lacks, videos and unreadable entries come as `Rejected`. Raises `DataError` for
    a file that is neither of the two forms, or damaged.
    """
    with open(path, "rb") as file:
        is_sqlite = file.read(16) == b"SQLite format 3\0"
    seen = np.zeros(len(photos), dtype=bool)
    for position, fields, raw in (_join_sqlite if is_sqlite else _join_tsv)(path, photos):
        row = photos.row(position)
        if seen[position]:
            notes.counts["photos twice in the metadata, the first was taken"] += 1
            continue
        seen[position] = True
        if fields is None:
            yield Rejected(row, "damaged line of the metadata", raw)
            continue
        try:
            *texts, marker = (field.decode("utf-8") for field in fields)
        except UnicodeDecodeError:
            yield Rejected(row, NOT_UTF8, raw)
            continue
        if marker.strip() not in ("", "0"):
            yield Rejected(row, "a video", raw)
        else:
            yield Metadata(position, *texts)
    for position in np.flatnonzero(~seen):
        raw = b"%d" % photos.ids[position]
        yield Rejected(photos.row(position), "not in the metadata", raw)


def _join_sqlite(path: Path, photos: Photos) -> Iterator[tuple[int, list[bytes] | None, bytes]]:
    """One pass over the metadata table; each id is looked up in a temporary table of the list."""
    columns = ", ".join(f"m.{name}" for name in _FIELDS)
    with closing(sqlite3.connect("", uri=True)) as database:  # "": a temporary file
        try:
            database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            database.execute("PRAGMA journal_mode = OFF")
            database.execute("CREATE TABLE ids (photoid INTEGER PRIMARY KEY, position INTEGER)")
            for start in range(0, len(photos), _BATCH):  # 15 million Python ints are 0.6 GB
                pairs = enumerate(photos.ids[start : start + _BATCH].tolist(), start)
                database.executemany("INSERT INTO ids (position, photoid) VALUES (?, ?)", pairs)
            database.commit()
            uri = f"file:{quote(str(path.resolve()))}?mode=ro"
            database.execute("ATTACH DATABASE ? AS metadata", (uri,))
            database.text_factory = bytes  # text that is not UTF-8 must not end the query
            # CROSS JOIN keeps this order: the big table once in rowid order, ids by key.
            cursor = database.execute(
                f"SELECT ids.position, {columns} FROM metadata.{TABLE} AS m "
                "CROSS JOIN ids ON ids.photoid = m.photoid"
            )
            for position, *values in Progress(
                cursor, total=len(photos), unit="photo", desc=path.name, after=1
            ):
                fields = [_as_bytes(value) for value in values]
                yield position, fields, b"\t".join(fields)
        except sqlite3.Error as error:
            raise DataError(
                f"{path}: {error}; wanted is SQLite with the table {TABLE} (photoid, "
                f"{', '.join(_FIELDS)}), unharmed; fetch it again and compare its md5"
            ) from None


def _join_tsv(path: Path, photos: Photos) -> Iterator[tuple[int, list[bytes] | None, bytes]]:
    """Lines whose id is in the list: looked up a batch at a time, split only when found."""
    lines = (line for _, line in read_lines([path]))
    first = True
    while (batch := list(islice(lines, _BATCH))) or first:
        heads = [line.split(b"\t", 2) for line in batch]
        counts = [line.count(b"\t") + 1 for line in batch[:1000]] if first else [TSV_COLUMNS]
        if TSV_COLUMNS not in counts:
            raise DataError(
                f"{path}: no line of the first 1000 has {TSV_COLUMNS} columns (the first has "
                f"{next(iter(counts), 0)}); wanted is the metadata of YFCC100M with line number, "
                "photo id and hash in front, or its SQLite file"
            )
        first = False
        numbers = [h[1] if len(h) == 3 and _PHOTO_ID.fullmatch(h[1]) else b"-1" for h in heads]
        ids = np.array([int(number) for number in numbers], dtype=np.int64)
        places = np.searchsorted(photos.ids, ids)
        places[places == len(photos)] = 0
        for index in np.flatnonzero(photos.ids[places] == ids):
            fields = batch[index].split(b"\t")
            whole = len(fields) == TSV_COLUMNS
            chosen = [fields[number] for number in _FIELDS.values()] if whole else None
            yield int(places[index]), chosen, batch[index]


def _as_bytes(value: bytes | float | None) -> bytes:
    """A value of the table, whose numbers may be stored as text or as numbers."""
    if isinstance(value, bytes):
        return value
    return b"" if value is None else str(value).encode()
