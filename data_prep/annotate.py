"""Join a table of texts into the samples of a set: rewrites, summaries, synthetic captions, tags.

    python data_prep/annotate.py data/gcc3m --table rewrites.jsonl --out data/gcc3m_rewrites \\
        --columns rewrites=rewrites --lines rewrites=4
    python data_prep/annotate.py data/gcc3m --table captions.csv --key-column url \\
        --sample-key json.url --columns synthetic=caption --max-unmatched 0.02 --out data/gcc3m_alip

--columns FIELD=COLUMN puts a column of the table under FIELD of each sample's json, where training
reads it as data.caption=json.FIELD; FIELD=A+B+C makes a list of several columns. --lines FIELD=N
says that FIELD is a list of N texts; a cell of several lines is split.

The new set has the samples, shards, keys and members of IN, in the same order; only json changes,
and a field that it has already is never overwritten. IN stays as it is. A key of the table is the
key of a sample, or shard/key where several shards have the key; --sample-key json.url takes a
field of the json in its place. Samples without a row are counted, and more than --max-unmatched
of them are an error; so is a key that stands twice, a cell that is no text, or another number of
texts.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.archives import annotation_table
from data_prep.reshard import caption_lines, check_closed, describe_inputs
from data_prep.sets import set_folder
from data_prep.sets.sample_copier import Copier, json_object
from data_prep.sets.selection import iterate_keys
from data_prep.sets.shard_writer import Layout, plan, write_shards
from loaders.errors import ConfigError, DataError, run_cli
from loaders.manifest import ShardSet, open_shards
from loaders.specs import as_path, local


class Annotator:
    """Reads samples of a set with their fields of the table, for `write_shards`."""

    def __init__(self, shards: ShardSet, table: dict[str, bytes], rows: list[str | None]):
        """`rows`: for each sample the key of its row in `table`, or None."""
        self._copier = Copier(shards, np.arange(len(shards)))
        self._shards, self._table, self._rows = shards, table, rows

    def __call__(self, i: int) -> dict[str, bytes]:
        """Members of sample i; raises `Unusable` for a damaged json, `DataError` for a field that
        it has already."""
        members = self._copier.members(i)
        key = self._rows[i]
        if key is None:
            return members
        content, fields = json_object(members.get("json", b"{}")), json.loads(self._table[key])
        refuse_taken(content, fields, f"{self._shards.shard_of(i)}: sample {self._shards.key(i)!r}")
        if fields:
            members["json"] = json.dumps({**content, **fields}, ensure_ascii=False).encode()
        return members


def refuse_taken(content: dict, fields: Any, where: str) -> None:
    """Raise `DataError` where a json holds one of the fields already."""
    taken = [name for name in fields if name in content]
    if taken:
        raise DataError(
            f"{where}: its json has {', '.join(taken)} already, and nothing is overwritten; choose "
            "another FIELD in --columns"
        )


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


def check_share(counts: Counter, limit: float, shards: ShardSet, table: dict) -> None:
    """Raise `DataError` where too many samples have no row."""
    if counts["unmatched"] <= limit * counts["samples"]:
        return
    raise DataError(
        f"{counts['unmatched']} of {counts['samples']} samples of {shards.name} have no text in "
        f"the table, more than --max-unmatched {limit:g} allows, and {counts['unused']} rows of "
        f"the table fit no sample. A key of the table: {next(iter(table))!r}; of a sample: "
        f"{shards.key(0)!r}. Complete the table, allow more, or name what to match by --sample-key"
    )


def parse_arguments() -> argparse.Namespace:
    """The checked command line; raises `ConfigError` or `DataError`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=local, metavar="IN", help="a set, or a folder of tars")
    parser.add_argument("--table", type=as_path, required=True, help="CSV, TSV, JSONL or parquet")
    parser.add_argument("--columns", nargs="+", required=True, metavar="FIELD=COLUMN")
    parser.add_argument("--key-column", default="key", help="default: %(default)s")
    parser.add_argument("--sample-key", default="key", metavar="key|json.FIELD")
    parser.add_argument("--lines", nargs="+", default=[], metavar="FIELD=N")
    parser.add_argument(
        "--max-unmatched", type=float, default=0.0, help="share of samples; default: %(default)s"
    )
    parser.add_argument("--out", type=as_path, required=True, help="folder of the new set")
    parser.add_argument("--part", type=int, default=0, help="number of this part, from 0")
    parser.add_argument("--parts", type=int, default=1, help="number of parts (array tasks)")
    arguments = parser.parse_args()
    arguments.columns = annotation_table.parse_columns(arguments.columns)
    arguments.lines = annotation_table.parse_lines(arguments.lines, arguments.columns)
    if not 0 <= arguments.max_unmatched <= 1:
        raise ConfigError("--max-unmatched lies between 0 and 1")
    if arguments.sample_key != "key" and not arguments.sample_key.removeprefix("json."):
        raise ConfigError("--sample-key: give key or json.FIELD")
    if arguments.sample_key != "key" and not arguments.sample_key.startswith("json."):
        raise ConfigError(f"--sample-key {arguments.sample_key}: give key or json.FIELD")
    set_folder.check_part(arguments.part, arguments.parts)
    set_folder.check_folder(arguments.out)
    return arguments


def layout_of(shards: ShardSet) -> Layout:
    """The shards and keys of the input."""
    first = np.cumsum([0, *(shard.samples for shard in shards.shards)]).tolist()
    return Layout(first, lambda shard, row: shards.key(first[shard] + row))


def report(counts: Counter) -> Iterator[str]:
    """What was found, in lines."""
    yield f"{counts['matched']} of {counts['samples']} samples have a row"
    if counts["unmatched"]:
        yield f"{counts['unmatched']} have none, or an empty one, and stay as they are"
    if counts["unused"]:
        yield f"rows of the table that fit no sample: {counts['unused']}"


def main() -> None:
    arguments = parse_arguments()
    check_closed([arguments.input])
    shards, out = open_shards(arguments.input), arguments.out
    if out.resolve() in (Path(s.path).resolve().parent.parent for s in shards.shards):
        raise ConfigError(f"--out {out} is the set that is read; name another folder")
    columns, lines = arguments.columns, arguments.lines
    table = annotation_table.read(arguments.table, arguments.key_column, columns, lines)
    first = shards.read_json(0) or {}
    refuse_taken(first, columns, f"{shards.shard_of(0)}: sample {shards.key(0)!r}")
    rows, counts = match(shards, table, arguments.sample_key)
    check_share(counts, arguments.max_unmatched, shards, table)
    print(*report(counts), sep="\n")
    about = {"columns": columns, "lines": lines, "sample_key": arguments.sample_key}
    about |= {"key_column": arguments.key_column}
    inputs, sha256 = describe_inputs(shards), annotation_table.digest(arguments.table)
    preparation = plan(
        len(shards),
        max(shard.samples for shard in shards.shards),
        {"fingerprint": shards.fingerprint, "table_sha256": sha256, **about},
        tool="data_prep/annotate.py",
        name=out.resolve().name,
        kind=shards.kind,
        source="; ".join(dict.fromkeys(entry["source"] for entry in inputs)),
        license="; ".join(dict.fromkeys(entry["license"] for entry in inputs)),
        extra={"inputs": inputs, "annotations": {"table": arguments.table.name, **about, **counts}}
        | caption_lines(shards),
        shards=len(shards.shards),
    )
    classes = [{**asdict(entry), "names": list(entry.names)} for entry in shards.classes]
    set_folder.begin(out, preparation, classes)
    if set_folder.missing(out, arguments.part, arguments.parts):
        read = Annotator(shards, table, rows)
        order = np.arange(len(shards))
        write_shards(out, order, read, arguments.part, arguments.parts, layout_of(shards))
    print(f"next: python data_prep/verify.py {out}")


if __name__ == "__main__":
    run_cli(main)
