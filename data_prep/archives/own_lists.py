"""Lists of one's own images, CSV, TSV, JSONL or parquet, on their way to `url_list.build`.

The image of a row is the path of a file or a web address; a list holds one of the two. Paths are
relative to a folder, the list's own unless another is named, and backslashes in them are read as
`/`. What cannot be used, files that are not there among it, goes to rejected.tsv with the reason.
"""

import itertools
import json
import os
import re
import stat
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np

from data_prep.archives import annotation_table
from data_prep.archives.own_classes import class_table, read_names
from data_prep.download.list_rows import WEB, Notes, Rejected, Row
from data_prep.sets import split
from loaders.errors import ConfigError, DataError
from loaders.progress import Progress

LOCAL = ("file",)
BROKEN_LINES = "captions with a line break, now a blank"
_CHECKED_ROWS = 1000
_ADDRESS = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True)
class Columns:
    """Which columns of a list or set hold what. `label` and `group` may be None."""

    image: str
    captions: tuple[str, ...] = ()
    label: str | None = None
    group: str | None = None

    @property
    def all(self) -> list[str]:
        """Their names, the image first."""
        return [self.image, *self.captions, *filter(None, (self.label, self.group))]


@dataclass(frozen=True)
class Side:
    """One side of a split: `name` (train or validation), and the rule that decides."""

    name: str
    fraction: Fraction
    seed: int


@dataclass(frozen=True)
class OwnList:
    """A list, how its columns are read, and which rows of it are wanted (`side` None: all)."""

    files: tuple[Path, ...]
    columns: Columns
    root: Path | None = None
    names: Path | None = None
    side: Side | None = None

    def __post_init__(self) -> None:
        """Raise `ConfigError` for columns that make no set."""
        if not self.columns.captions and self.columns.label is None:
            raise ConfigError("a list needs --caption-column, --label-column, or both")

    @cached_property
    def what(self) -> str:
        """The list in a message."""
        return str(self.files[0]) + (f" and {len(self.files) - 1} more" * (len(self.files) > 1))

    @cached_property
    def is_local(self) -> bool:
        """Whether the images are files, by the majority of the first thousand rows with one."""
        web, cells = 0, 0
        for _, row, _ in itertools.islice(self._rows(show=False), _CHECKED_ROWS):
            cell = row[self.columns.image]
            if cell is not None and not isinstance(cell, str):
                raise DataError(
                    f"{self.what}: column {self.columns.image} holds {type(cell).__name__}, not "
                    "paths or addresses; a set with the images inside of it is read by "
                    "data_prep/own.py huggingface"
                )
            if cell and cell.strip():
                web, cells = web + _is_web(cell), cells + 1
        if not cells:
            raise DataError(f"{self.what}: no row has an image in column {self.columns.image}")
        return 2 * web < cells

    @property
    def schemes(self) -> tuple[str, ...]:
        """What `url_list.build` lets through."""
        return LOCAL if self.is_local else WEB

    @property
    def parameters(self) -> dict[str, Any]:
        """What decides which rows the set has, for the index of its list."""
        about: dict[str, Any] = {"image": self.columns.image, "captions": self.columns.captions}
        about["labels"] = self.columns.label
        if self.names is not None:
            about["names_sha256"] = annotation_table.digest(self.names)
        if self.is_local:
            about["root"] = [str(root) for root in dict.fromkeys(self._roots.values())]
        if self.side is not None:
            about |= {"side": self.side.name, "validation": str(self.side.fraction)}
            about |= {"seed": self.side.seed, "groups": self.columns.group}
        return about

    def read_rows(self, notes: Notes) -> Iterator[Row | Rejected]:
        """The rows for `url_list.build`. Puts `classes`, and whether an image has several captions,
        `several`, into the facts."""
        number_of, limit = self._look_ahead(notes)
        several = False
        for number, row, path in self._rows(notes.starts if len(self.files) > 1 else None):
            raw = json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace")
            try:
                if limit is not None and not self._is_wanted(row, limit):
                    continue
                image = self._image(row, path)
                self._need_file(image)
                captions = self._captions(row, notes)
                label = () if self.columns.label is None else (number_of[self._key(row)],)
            except ValueError as error:
                yield Rejected(number, str(error), raw)
                continue
            several |= len(captions) > 1
            yield Row(number, image, "\n".join(captions), raw, label)
        notes.facts["several"] = several

    def _look_ahead(self, notes: Notes) -> tuple[dict[str, int], int | None]:
        """Number of each class, and the limit of the split: both are known at the end alone."""
        keys, hashes = set(), array("Q")
        if self.columns.label is None and self.side is None:
            return {}, None
        for _, row, path in self._rows():
            try:
                self._image(row, path)
                if self.columns.label is not None:
                    keys.add(self._key(row))
                if self.side is not None:
                    hashes.append(self._hash(row))
            except ValueError:
                continue  # said when the rows are read
        number_of, limit = {}, None
        if self.columns.label is not None:
            names = read_names(self.names)
            notes.facts["classes"], number_of = class_table(keys, names, self.what)
        if self.side is not None:
            found = np.frombuffer(hashes, dtype=np.uint64)
            limit = split.validation_limit(found, self.side.fraction, self.what)
        return number_of, limit

    def _rows(
        self, starts: list[tuple[int, Path]] | None = None, show: bool = True
    ) -> Iterator[tuple[int, dict[str, Any], Path]]:
        """(line from 0 over all files, row, file): a header counts as a line. `starts` gets the
        number of the first line of each file."""
        start = 0
        with Progress(unit="row", desc=self.files[0].name, show=show) as bar:
            for path in self.files:
                if starts is not None:
                    starts.append((start, path))
                headed = path.suffix in (".csv", ".tsv")
                number = 0
                for number, row in annotation_table.rows(path, self.columns.all):
                    yield start + number - (not headed), row, path
                    bar.update()
                start += number + headed

    @cached_property
    def _roots(self) -> dict[Path, Path]:
        return {path: (self.root or path.parent).resolve() for path in self.files}

    def _image(self, row: dict, path: Path) -> str:
        """Address of the image of a row, of a file as a file: address; `ValueError` with the
        reason if there is none, or one of the other kind than the list has."""
        cell = row[self.columns.image]
        if not isinstance(cell, str) or not cell.strip():
            raise ValueError("no image")
        if _ADDRESS.match(cell) and not _is_web(cell):
            raise ValueError("scheme is not http or https")
        if _is_web(cell) == self.is_local:
            raise ValueError(
                "address in a list of files" if self.is_local else "file in a list of addresses"
            )
        if not self.is_local:
            return cell
        return (self._roots[path] / cell.strip().replace("\\", "/")).as_uri()

    def _need_file(self, address: str) -> None:
        """Raise `ValueError` with the reason where the file of an image is not there, or empty."""
        if self.is_local:
            try:
                about = os.stat(local_path(address))
            except OSError as error:
                raise ValueError(f"no file: {error.strerror}") from None
            if not stat.S_ISREG(about.st_mode) or not about.st_size:
                raise ValueError("no file: empty, or a folder")

    def _is_wanted(self, row: dict, limit: int) -> bool:
        return (self._hash(row) <= limit) == (self.side.name == split.VALIDATION)

    def _captions(self, row: dict, notes: Notes) -> list[str]:
        """The captions of a row, each one line; `ValueError` where one is no text."""
        found = []
        for name in self.columns.captions:
            found += texts_of(row[name])
        broken = sum(len(text.splitlines()) > 1 for text in found)
        notes.counts[BROKEN_LINES] += broken
        return [" ".join(text.splitlines()) for text in found] if broken else found

    def _key(self, row: dict) -> str:
        return label_key(row[self.columns.label])

    def _hash(self, row: dict) -> int:
        return split.group_hash(self.side.seed, group_of(row, self.columns))


def group_of(row: dict, columns: Columns) -> str:
    """What of a row decides its side; `ValueError` for an empty cell of the group column."""
    cell = row[columns.group or columns.image]
    if cell is None or (isinstance(cell, str) and not cell.strip()) or cell != cell:
        raise ValueError("no group" if columns.group else "no image")
    return str(cell).strip()


def texts_of(cell: Any) -> list[str]:
    """The captions in a cell, a text or a list of texts; `ValueError` for anything else."""
    cells = cell if isinstance(cell, list) else [cell]
    texts = [text for text in cells if text is not None and text == text]  # NaN: an empty cell
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("caption is no text")
    return [text for text in texts if text.strip()]


def label_key(cell: Any) -> str:
    """The class that a cell names: a text, or a whole number; `ValueError` with the reason."""
    if cell is None or cell != cell or (isinstance(cell, str) and not cell.strip()):
        raise ValueError("no label")
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # a column of numbers with an empty cell becomes one of floats in pandas
    if isinstance(cell, bool) or not isinstance(cell, str | int):
        raise ValueError("label is no text or whole number")
    return str(cell).strip()


def local_path(address: str) -> str:
    """The file of a file: address, as `Path.as_uri` writes it."""
    return url2pathname(urlsplit(address).path)


def _is_web(cell: str) -> bool:
    match = _ADDRESS.match(cell)
    return bool(match) and match[1].lower() in WEB
