"""A table of texts for samples: key -> what goes into their `json`. CSV, TSV, JSONL or parquet.

In CSV a cell is as spreadsheets write it, with quotes and line breaks inside of quotes; in TSV
quotes have no meaning. In JSONL and parquet a cell may also be a list of texts.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from data_prep.download.list_input import identify, read_lines
from loaders.errors import ConfigError, DataError

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
_SHOWN = 60  # characters of a cell in a message
_FIELD_BYTES = 1 << 24  # of a CSV cell; csv's own limit is 131,072


def parse_columns(words: Sequence[str]) -> dict[str, list[str]]:
    """{'rewrites': ['a', 'b']} for 'rewrites=a+b'; raises `ConfigError`."""
    found: dict[str, list[str]] = {}
    for word in words:
        field, _, columns = word.partition("=")
        names = columns.split("+")
        if not field or not all(names):
            raise ConfigError(f"--columns {word}: give FIELD=COLUMN, or FIELD=COLUMN+COLUMN")
        if field in found:
            raise ConfigError(f"--columns: {field} stands twice")
        found[field] = names
    return found


def parse_lines(words: Sequence[str], fields: Mapping[str, Any]) -> dict[str, int]:
    """{'rewrites': 4} for 'rewrites=4'; raises `ConfigError`."""
    found = {}
    for word in words:
        field, _, count = word.partition("=")
        if field not in fields or not count.isdecimal() or not int(count):
            known = ", ".join(fields)
            raise ConfigError(f"--lines {word}: give FIELD=NUMBER with one of the fields {known}")
        found[field] = int(count)
    return found


def digest(path: Path) -> str:
    """SHA-256 of the file."""
    return identify([path])[0]["sha256"]


def read(
    path: Path, key_column: str, columns: Mapping[str, Sequence[str]], lines: Mapping[str, int]
) -> dict[str, bytes]:
    """The table: key -> a JSON object with its fields. Fields whose cells are empty are left out.

    Args:
        columns: field -> columns; of several, each gives one text of a list. lines: field -> how
            many texts it must have; a cell that is one text is split at its line breaks.

    Raises:
        DataError: not one of FORMATS, a column that is not there, a key that is empty or stands
            twice, a cell that is no text, or another number of texts; names the row, from 1.
    """
    found: dict[str, bytes] = {}
    for number, row in rows(path, [key_column, *chain(*columns.values())]):
        where = f"{path}, row {number}"
        key = row[key_column]
        if isinstance(key, int) and not isinstance(key, bool):
            raise DataError(
                f"{where}: key {key} is a number, and keys have leading zeros; write it as a text"
            )
        if not isinstance(key, str) or not key:
            raise DataError(f"{where}: {key_column}={_show(key)} is no key")
        if key in found:
            raise DataError(f"{where}: key {key!r} stands twice; keep one row of it")
        fields = {}
        for field, names in columns.items():
            value = _value([row[name] for name in names], lines.get(field), f"{where}, {field}")
            if value is not None:
                fields[field] = value
        found[key] = json.dumps(fields, ensure_ascii=False).encode()
    if not found:
        raise DataError(f"{path}: no rows")
    return found


def _value(cells: list[Any], count: int | None, where: str) -> str | list[str] | None:
    """Text or list of texts of a field, None where all its cells are empty."""
    if all(cell is None or cell in ("", []) for cell in cells):
        return None
    if len(cells) > 1:
        texts = cells
    elif isinstance(cells[0], list):
        texts = cells[0]
    elif count is not None and isinstance(cells[0], str):
        texts = [line for line in cells[0].splitlines() if line.strip()]
    else:
        return _text(cells[0], where)
    texts = [_text(text, where) for text in texts]
    if count is not None and len(texts) != count:
        raise DataError(f"{where}: {len(texts)} texts where --lines says {count}; mend the table")
    return texts


def _text(cell: Any, where: str) -> str:
    if not isinstance(cell, str) or not cell.strip():
        raise DataError(f"{where}: {_show(cell)} is no text; mend the table, or leave the row out")
    return cell


def _show(cell: Any) -> str:
    text = repr(cell)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, column -> cell) of each row, of these columns; the header is no row.

    Raises `DataError` for a file that is none of FORMATS, a column that is not there, and a row
    that is not as its format asks. In JSONL only the first column must be in each row.
    """
    kinds = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix not in kinds:
        raise DataError(f"{path}: a table is one of {', '.join(FORMATS)}, told by its ending")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        yield from kinds[path.suffix](path, columns)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _need(path: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    lacking = [name for name in columns if name not in header]
    if lacking:
        raise DataError(f"{path}: no column {', '.join(lacking)}; it has {', '.join(header)}")
    twice = sorted({name for name in columns if list(header).count(name) > 1})
    if twice:
        raise DataError(f"{path}: the column {', '.join(twice)} stands twice; rename one")


def _table(
    path: Path, rows: Iterator[list[str]], columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    header = next(rows, [])
    _need(path, header, columns)
    places = {name: header.index(name) for name in columns}
    for number, cells in enumerate(rows, start=1):
        if len(cells) != len(header):
            raise DataError(
                f"{path}, row {number}: {len(cells)} cells under {len(header)} columns; a tab, "
                "comma or quote inside of a text has to be written as this format asks"
            )
        yield number, {name: cells[place] for name, place in places.items()}


def _csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(_FIELD_BYTES)
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = (row for row in csv.reader(file, strict=True) if row)
        try:
            yield from _table(path, rows, columns)
        except csv.Error as error:
            raise DataError(f"{path}: not CSV: {error}; write it again") from None


def _tsv(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = (line.decode("utf-8").split("\t") for _, line in read_lines([path], show=False))
    yield from _table(path, rows, columns)


def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in read_lines([path], show=False):
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            raise DataError(f"{path}, row {number + 1}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number + 1}: not a JSON object")
        _need(path, list(row), columns[:1])  # a field that a row lacks is an empty cell
        yield number + 1, {name: row.get(name) for name in columns}


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        _need(path, file.schema_arrow.names, columns)
        number = 0
        for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pa.ArrowException as error:
        raise DataError(f"{path}: not parquet, or damaged ({error}); write it again") from None
