"""Files that grow batch by batch and appear when they are whole: CSV, JSON lines, parquet, npy.

Each takes columns: a name and its values of the batch. A column of vectors is an array (b, D).
"""

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy
from pyarrow import parquet

Columns = Mapping[str, Sequence | np.ndarray]
Add = Callable[[Columns], None]


@contextmanager
def growing(path: Path) -> Iterator[Add]:
    """A function that appends a batch to the file of the suffix of `path`, one of SUFFIXES.

    Until the end it is PATH.partial, which is removed after an error. What was there is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with SUFFIXES[path.suffix](path) as add:
        yield add


@contextmanager
def _whole(*paths: Path) -> Iterator[list[Path]]:
    """Scratch paths; renamed to `paths` at the end, removed after an error."""
    scratch = [path.with_name(f"{path.name}.partial") for path in paths]
    try:
        yield scratch
        for old, new in zip(scratch, paths, strict=True):
            os.replace(old, new)
    finally:
        for old in scratch:
            old.unlink(missing_ok=True)


@contextmanager
def _csv(path: Path) -> Iterator[Add]:
    with _whole(path) as (scratch,), open(scratch, "w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)

        def add(columns: Columns) -> None:
            if file.tell() == 0:
                lines.writerow(columns)
            lines.writerows(zip(*columns.values(), strict=True))

        yield add


@contextmanager
def _json_lines(path: Path) -> Iterator[Add]:
    with _whole(path) as (scratch,), open(scratch, "w", encoding="utf-8") as file:

        def add(columns: Columns) -> None:
            for row in zip(*columns.values(), strict=True):
                text = json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False)
                file.write(text + "\n")

        yield add


@contextmanager
def _parquet(path: Path) -> Iterator[Add]:
    with _whole(path) as (scratch,), ExitStack() as opened:
        writers: list[parquet.ParquetWriter] = []

        def add(columns: Columns) -> None:
            table = pa.table({name: _array(values) for name, values in columns.items()})
            if not writers:  # the types are those of the first batch
                writers.append(opened.enter_context(parquet.ParquetWriter(scratch, table.schema)))
            writers[0].write_table(table)

        yield add


def _array(values: Sequence | np.ndarray) -> pa.Array:
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return pa.array(values)


@contextmanager
def _npy(path: Path) -> Iterator[Add]:
    """Two columns: texts, into `keys_of(path)`, one a line, and vectors, the rows of the array."""
    with (
        _whole(path, keys_of(path)) as (scratch, names),
        open(scratch, "wb") as file,
        open(names, "w", encoding="utf-8") as keys,
    ):
        rows, facts = 0, {}

        def add(columns: Columns) -> None:
            nonlocal rows
            texts, vectors = columns.values()
            if rows == 0:
                facts.update(npy.header_data_from_array_1_0(vectors))
                npy.write_array_header_1_0(file, facts)
            file.write(vectors.tobytes())
            keys.writelines(f"{text}\n" for text in texts)
            rows += len(vectors)

        yield add
        file.seek(0)  # numpy leaves room in the header for any number of rows
        npy.write_array_header_1_0(file, {**facts, "shape": (rows, facts["shape"][1])})


def keys_of(path: Path) -> Path:
    """The file of keys beside an npy file."""
    return path.with_suffix(".keys.txt")


SUFFIXES = {".csv": _csv, ".jsonl": _json_lines, ".parquet": _parquet, ".npy": _npy}
