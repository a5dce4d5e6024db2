"""A published list of images as the parquet files that the downloader reads.

    D/list/NNNNN.parquet   url, caption, row (line of the source, from 0) and extra columns
    D/list/index.json      the input, the parameters, the files and what was counted; written last
    D/list/rejected.tsv    line (as editors count, from 1), reason and text of every row that is
                           not in the files

Each file but the last holds `FILE_SHARDS` shards, so shard numbers run on over the sorted files.
One process builds a list while others wait for it; a list without index.json is built again.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.download.list_input import identify, join_digests
from data_prep.download.list_rows import WEB, ListWriter, Notes, Rejected, Row, flush_and_hash
from data_prep.sets import set_folder
from loaders.errors import DataError

FILE_SHARDS = 100
INDEX = "index.json"
REJECTED = "rejected.tsv"
# What a manifest tells of its list, keys of the index.
SUMMARY = (
    "input",
    "input_sha256",
    "rows",
    "rejected",
    "duplicates",
    "same_url_other_caption",
    "notes",
)
_LOCK = ".lock"
_STAGE = ".building"


def build(
    out: Path,
    read_rows: Callable[[Notes], Iterable[Row | Rejected]],
    input_paths: Sequence[Path],
    parameters: dict[str, Any],
    samples_per_shard: int,
    extra_columns: Sequence[str] = (),
    schemes: Sequence[str] = WEB,
    captions: bool = True,
) -> dict:
    """Write `out`/list from the rows of `read_rows`, or reuse it if it is there; returns its index.

    `extra_columns`: names of `Row.extra`, strings, but for the numbers of `list_rows.LABEL`.
    `captions`: False for a list that has labels alone. `schemes`: url schemes to let through; a
    file url can put any local file in the set, so it must be asked for. Memory: about 40 bytes a
    row for hashes, else constant. Raises `DataError` for a list of other input or parameters,
    unreadable input, no usable row, a full disk, and a folder that holds something else;
    `ConfigError` for a shard size below 1.
    """
    set_folder.check_shard_size(samples_per_shard)
    layout = {
        "samples_per_shard": samples_per_shard,
        "schemes": list(schemes),
        "columns": ["url", *(["caption"] if captions else []), "row", *extra_columns],
    }
    parameters = json.loads(json.dumps({**parameters, **layout}))
    set_folder.check_folder(out)  # before hours of work, not only when the set is begun
    (out / set_folder.LIST).mkdir(parents=True, exist_ok=True)
    with _locked(out):
        stored = read_index(out) if (out / set_folder.LIST / INDEX).exists() else {}
        inputs = identify(input_paths, stored.get("inputs", []))
        head = {
            "input": ", ".join(entry["name"] for entry in inputs),
            "input_sha256": join_digests([entry["sha256"] for entry in inputs]),
            "parameters": parameters,
            "inputs": inputs,
        }
        if not stored:
            return _write_list(out, read_rows, input_paths, head)
    _check_same(out, stored, head)
    return stored


def read_index(out: Path) -> dict:
    """The index of `out`/list. Raises `DataError` if it, or a file that it names, is missing."""
    path = out / set_folder.LIST / INDEX
    try:
        index = json.loads(path.read_bytes())
        names = [entry["file"] for entry in index["files"]]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: the list is not built; run its preparer") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: damaged; delete {path.parent} and run the preparer") from None
    absent = [name for name in names if not (path.parent / name).is_file()]
    if absent:
        raise DataError(f"{path}: its files {', '.join(absent[:5])} are gone; restore them")
    return index


def digest(out: Path) -> str:
    """sha256 over the sha256 of the files of the list in order, appended files left out.

    So it names the rows that the set began with, and stays when failed rows are tried again.
    """
    files = read_index(out)["files"]
    return join_digests([entry["sha256"] for entry in files if "appended" not in entry])


def shard_count(index: dict, samples_per_shard: int) -> int:
    """Number of shards of the files of a list, appended ones included."""
    return sum(-(-entry["rows"] // samples_per_shard) for entry in index["files"])


def base_shards(out: Path) -> int:
    """Number of shards that the set began with, appended ones left out."""
    index = read_index(out)
    files = [entry for entry in index["files"] if "appended" not in entry]
    return shard_count({"files": files}, index["parameters"]["samples_per_shard"])


def append(out: Path, table: pa.Table, prefix: str) -> dict:
    """Add the rows of `table` as files PREFIX-NNNNN.parquet; returns the new index.

    `table` has the columns of the list; `prefix` begins with a letter, so that its files come
    after the others. Each file but the last holds `FILE_SHARDS` shards. `rows` of the index stays:
    the rows are tried again, not new. Doing the same twice is doing it once; other rows under a
    prefix that is in use raise `DataError`.
    """
    if not re.fullmatch(r"[a-z][\w-]*", prefix):
        raise ValueError(f"prefix {prefix!r} must begin with a small letter")
    home = out / set_folder.LIST
    read_index(out)  # a folder without a list has no lock either
    with _locked(out), _stage(out) as stage:
        index = read_index(out)
        if table.column_names != index["columns"]:
            raise ValueError(f"columns {table.column_names}, but the list has {index['columns']}")
        size = FILE_SHARDS * index["parameters"]["samples_per_shard"]
        files = []
        for number, start in enumerate(range(0, table.num_rows, size)):
            piece, name = table.slice(start, size), f"{prefix}-{number:05d}.parquet"
            pq.write_table(piece, stage / name, compression="zstd")
            entry = {"file": name, "rows": piece.num_rows, "appended": prefix}
            files.append(entry | {"sha256": flush_and_hash(stage / name)})
        present = [entry for entry in index["files"] if entry.get("appended") == prefix]
        if present and present != files:
            raise DataError(f"{home}: {prefix} was appended before with other rows")
        if not present:
            for entry in files:
                os.replace(stage / entry["file"], home / entry["file"])
            index["files"] += files
            set_folder.replace_file(home / INDEX, _dump(index))
    return index


def describe(index: dict, part: int, parts: int, todo: str = "download") -> str:
    """What is about to be done with the rows, in words, for the user to see before it starts."""
    size = index["parameters"]["samples_per_shard"]
    shards = shard_count(index, size)
    lines = [f"{index['input']}: {index['rows']} rows to {todo}"]
    lines += [f"  rejected, {reason}: {count}" for reason, count in index["rejected"].items()]
    lines += [f"  {what}: {count}" for what, count in index["notes"].items()]
    for key, what in (
        ("duplicates", "dropped, same url and caption as an earlier row"),
        ("same_url_other_caption", "kept, same url as an earlier row with another caption"),
    ):
        lines += [f"  {what}: {index[key]}"] if index[key] else []
    if index["rejected"]:
        lines.append(f"  the rejected rows are in {set_folder.LIST}/{REJECTED}")
    own = len(range(part, shards, parts))
    lines.append(f"{shards} shards of {size} rows; part {part} of {parts} has {own} of them")
    return "\n".join(lines)


def _write_list(out: Path, read_rows, input_paths: Sequence[Path], head: dict) -> dict:
    """Build the list in a stage folder, then move it to its place, index.json last."""
    home, notes, parameters = out / set_folder.LIST, Notes(), head["parameters"]
    for scrap in home.glob("*.parquet"):  # of a process that was killed while it moved them
        scrap.unlink()
    try:
        with _stage(out) as stage, open(stage / REJECTED, "w", encoding="utf-8") as rejects:
            size = FILE_SHARDS * parameters["samples_per_shard"]
            columns, schemes = parameters["columns"], parameters["schemes"]
            writer = ListWriter(stage, columns, schemes, size, rejects, notes.starts)
            for item in read_rows(notes):
                writer.add(item)
            writer.close()
            if not writer.rows:
                raise DataError(f"{head['input']}: no usable row: {dict(writer.rejected)}")
            if identify(input_paths, head["inputs"]) != head["inputs"]:
                raise DataError(f"{head['input']}: changed while it was read; run this again")
            for name in [REJECTED, *(entry["file"] for entry in writer.files)]:
                os.replace(stage / name, home / name)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        size = sum(entry["bytes"] for entry in head["inputs"])
        raise DataError(
            f"{home}: the disk is full; the list needs at most as much room as its unpacked input "
            f"({size / 1e9:.1f} GB as it is); make room and run the same command again"
        ) from None
    notes.counts["urls percent-encoded"] = writer.encoded_urls
    index = head | {
        "rows": writer.rows,
        "files": writer.files,
        "columns": writer.schema.names,
        "rejected": dict(writer.rejected.most_common()),
        "duplicates": writer.duplicates,
        "same_url_other_caption": writer.same_url_other_caption,
        "notes": {what: count for what, count in notes.counts.most_common() if count},
        "facts": notes.facts,
    }
    set_folder.replace_file(home / INDEX, _dump(index))
    return index


def _check_same(out: Path, stored: dict, head: dict) -> None:
    """`DataError`, naming both, unless the list is of this input and these parameters."""
    old, new = ({"sha256": h["input_sha256"], **h["parameters"]} for h in (stored, head))
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if differing:
        lines = [f"{key}: {old.get(key)} there, {new.get(key)} now" for key in differing]
        raise DataError(
            f"{out / set_folder.LIST}: made from {stored['input']}, now asked for {head['input']}; "
            f"different are {'; '.join(lines)}. Use the same list and options, or another folder"
        )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the list alone; the kernel gives the lock back when a process is killed."""
    with open(out / set_folder.LIST / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{out}: another process works on the list; waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _stage(out: Path) -> Iterator[Path]:
    """An empty folder for files that are not part of the list yet."""
    stage = out / set_folder.LIST / _STAGE
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _dump(index: dict) -> str:
    return json.dumps(index, indent=1, ensure_ascii=False) + "\n"
