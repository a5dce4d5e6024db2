"""Samples and what is to be joined to them, rows of a table or files of a folder, by their keys."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data_prep.sets.selection import iterate_keys
from loaders.errors import DataError
from loaders.manifest import ShardSet

# What is joined, its entries, where they are, and what else to do where they do not fit.
TEXTS = ("text", "rows", "table", "name what to match by --sample-key")
FILES = ("array", "files", "folder", "name them SHARD/KEY.npy")


@dataclass
class Join:
    """What is joined: key -> a row of a table, or the path of an array, with what was found.

    Attributes:
        about: what the manifest says of it. sha256: of the table, or of names and times of arrays.
        rows: for each sample the key of its entry, or None. counts: of `report`.
    """

    entries: dict[str, bytes]
    about: dict[str, Any]
    sha256: str
    rows: list[str | None] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)


def match(
    shards: ShardSet, table: dict[str, bytes], sample_key: str
) -> tuple[list[str | None], Counter]:
    """For each sample the key of its row or None, and the counts of `report`.

    Raises `DataError` where one row of the table fits several samples by their keys.
    """
    rows: list[str | None] = []
    used: dict[str, str] = {}
    by_json = sample_key.removeprefix("json.") if sample_key != "key" else None
    for i, path, key in iterate_keys(shards):
        names = [key, f"{path.stem}/{key}"] if by_json is None else [_field(shards, i, by_json)]
        hits = [name for name in names if name in table]
        if len(hits) > 1:
            raise DataError(f"{path}: sample {key!r} has two rows, {hits[0]} and {hits[1]}")
        row = hits[0] if hits else None
        # A picture may be in a set twice, and its address then means both; a key means one.
        if row in used and row is not None and by_json is None:
            raise DataError(
                f"key {row!r} of the table fits several samples, in {used[row]} and {path}; write "
                "shard/key"
            )
        if row is not None:
            used[row] = str(path)
        rows.append(row if row is not None and table[row] != b"{}" else None)
    unmatched = rows.count(None)
    counts = {"samples": len(rows), "unmatched": unmatched, "unused": len(table) - len(used)}
    return rows, Counter(matched=len(rows) - unmatched, **counts)


def _field(shards: ShardSet, i: int, name: str) -> str:
    try:
        value = (shards.read_json(i) or {}).get(name)
    except ValueError:
        return ""  # a damaged json: the sample has no row
    return value if isinstance(value, str) else ""


def check_share(
    counts: Counter, limit: float, shards: ShardSet, table: dict, words: tuple[str, ...] = TEXTS
) -> None:
    """Raise `DataError` where too many samples have no row. `words`: TEXTS or FILES."""
    if counts["unmatched"] <= limit * counts["samples"]:
        return
    what, entries, place, remedy = words
    raise DataError(
        f"{counts['unmatched']} of {counts['samples']} samples of {shards.name} have no {what} in "
        f"the {place}, more than --max-unmatched {limit:g} allows, and {counts['unused']} "
        f"{entries} of the {place} fit no sample. A key of the {place}: {next(iter(table))!r}; of "
        f"a sample: {shards.key(0)!r}. Complete the {place}, allow more, or {remedy}"
    )


def report(counts: Counter, words: tuple[str, ...] = TEXTS) -> Iterator[str]:
    """What was found, in lines. `words`: TEXTS or FILES."""
    what, entries, place, _ = words
    entry = {"text": "a row", "array": "an array"}[what]
    yield f"{counts['matched']} of {counts['samples']} samples have {entry}"
    if counts["unmatched"]:
        yield f"{counts['unmatched']} have none, or an empty one, and stay as they are"
    if counts["unused"]:
        yield f"{entries} of the {place} that fit no sample: {counts['unused']}"
