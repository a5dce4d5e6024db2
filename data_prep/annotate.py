"""Join texts or arrays into the samples of a set: rewrites, summaries, captions, tags, objects.

    python data_prep/annotate.py data/gcc3m --table rewrites.jsonl --out data/gcc3m_rewrites \\
        --columns rewrites=rewrites --lines rewrites=4
    python data_prep/annotate.py data/gcc3m --table captions.csv --key-column url \\
        --sample-key json.url --columns synthetic=caption --max-unmatched 0.02 --out data/gcc3m_alip
    python data_prep/annotate.py data/gcc3m --arrays objects=FOLDER --out data/gcc3m_objects

--columns FIELD=COLUMN puts a column of the table under FIELD of each sample's json, where training
reads it as data.caption=json.FIELD; FIELD=A+B+C makes a list of several columns. --lines FIELD=N
says that FIELD is a list of N texts; a cell of several lines is split.

--arrays objects=FOLDER takes FOLDER/KEY.npy, or FOLDER/SHARD/KEY.npy, into each sample as its
member objects.npy: a table of float16 or float32, a row for each object, the surest first, and
equally many numbers in all rows of the set.

The new set has the samples, shards, keys and members of IN, in the same order; only json changes,
arrays are added, and what is there already is never overwritten. IN stays as it is. A key of the
table is the key of a sample, or shard/key where several shards have the key; --sample-key json.url
takes a field of the json in its place. Samples without a row, or an array, are counted, and more
than --max-unmatched of them are an error; so is a key that stands twice, a cell that is no text,
another number of texts, or an array that training could not read.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.archives import annotation_table, array_files
from data_prep.archives.joining import FILES, Join, check_share, match, report
from data_prep.reshard import caption_lines, check_closed, describe_inputs
from data_prep.sets import set_folder
from data_prep.sets.sample_copier import Copier, json_object
from data_prep.sets.shard_writer import Layout, plan, write_shards
from loaders.errors import ConfigError, DataError, run_cli
from loaders.manifest import ShardSet, open_shards
from loaders.specs import as_path, local


class Annotator:
    """Reads samples of a set with what is joined to them, for `write_shards`."""

    def __init__(self, shards: ShardSet, table: Join | None, arrays: dict[str, Join]):
        self._copier = Copier(shards, np.arange(len(shards)))
        self._shards, self._table, self._arrays = shards, table, arrays

    def __call__(self, i: int) -> dict[str, bytes]:
        """Members of sample i; raises `Unusable` for a damaged json, `DataError` for a field or
        an array that it has already, and an array that training could not read."""
        members = self._copier.members(i)
        where = f"{self._shards.shard_of(i)}: sample {self._shards.key(i)!r}"
        key = self._table.rows[i] if self._table else None
        if key is not None:
            content = json_object(members.get("json", b"{}"))
            fields = json.loads(self._table.entries[key])
            refuse_taken(content, fields, where)
            members["json"] = json.dumps({**content, **fields}, ensure_ascii=False).encode()
        for name, join in self._arrays.items():
            if join.rows[i] is None:
                continue
            if f"{name}.npy" in members:
                raise DataError(f"{where} has {name}.npy already, and nothing is overwritten")
            members[f"{name}.npy"] = array_files.read(join.entries[join.rows[i]])
        return members


def refuse_taken(content: dict, fields: Any, where: str) -> None:
    """Raise `DataError` where a json holds one of the fields already."""
    taken = [name for name in fields if name in content]
    if taken:
        raise DataError(
            f"{where}: its json has {', '.join(taken)} already, and nothing is overwritten; choose "
            "another FIELD in --columns"
        )


def parse_arguments() -> argparse.Namespace:
    """The checked command line; raises `ConfigError` or `DataError`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=local, metavar="IN", help="a set, or a folder of tars")
    parser.add_argument("--table", type=as_path, help="CSV, TSV, JSONL or parquet")
    parser.add_argument("--columns", nargs="+", default=[], metavar="FIELD=COLUMN")
    parser.add_argument("--arrays", nargs="+", default=[], metavar="NAME=FOLDER")
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
    arguments.arrays = array_files.parse_folders(arguments.arrays)
    if bool(arguments.table) != bool(arguments.columns):
        raise ConfigError("--table and --columns go together")
    if not arguments.table and not arguments.arrays:
        raise ConfigError("give --table with --columns, or --arrays, or both")
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


def join_table(shards: ShardSet, arguments: argparse.Namespace) -> Join | None:
    """The table of the command line, matched; None without one. Prints what was found."""
    if not arguments.table:
        return None
    columns, lines = arguments.columns, arguments.lines
    table = annotation_table.read(arguments.table, arguments.key_column, columns, lines)
    first = shards.read_json(0) or {}
    refuse_taken(first, columns, f"{shards.shard_of(0)}: sample {shards.key(0)!r}")
    about = {"columns": columns, "lines": lines, "sample_key": arguments.sample_key}
    about |= {"key_column": arguments.key_column}
    found = Join(table, about, annotation_table.digest(arguments.table))
    found.rows, found.counts = match(shards, table, arguments.sample_key)
    check_share(found.counts, arguments.max_unmatched, shards, table)
    print(*report(found.counts), sep="\n")
    return found


def join_arrays(shards: ShardSet, arguments: argparse.Namespace) -> dict[str, Join]:
    """The arrays of the command line by name, matched. Prints what was found."""
    joins = {}
    for name, folder in arguments.arrays.items():
        files = array_files.find(folder)
        found = Join(files, {"folder": folder.name}, array_files.digest(files))
        found.rows, found.counts = match(shards, files, "key")
        check_share(found.counts, arguments.max_unmatched, shards, files, FILES)
        print(*(f"{name}: {line}" for line in report(found.counts, FILES)), sep="\n")
        joins[name] = found
    return joins


def main() -> None:
    arguments = parse_arguments()
    check_closed([arguments.input])
    shards, out = open_shards(arguments.input), arguments.out
    if out.resolve() in (Path(s.path).resolve().parent.parent for s in shards.shards):
        raise ConfigError(f"--out {out} is the set that is read; name another folder")
    table, arrays = join_table(shards, arguments), join_arrays(shards, arguments)
    inputs, identity, annotations = describe_inputs(shards), {}, {}
    if table:
        identity |= {"table_sha256": table.sha256, **table.about}
        annotations |= {"table": arguments.table.name, **table.about, **table.counts}
    if arrays:
        identity |= {f"{name}_sha256": join.sha256 for name, join in arrays.items()}
        about = {name: {**join.about, **join.counts} for name, join in arrays.items()}
        annotations["arrays"] = about
    preparation = plan(
        len(shards),
        max(shard.samples for shard in shards.shards),
        {"fingerprint": shards.fingerprint, **identity},
        tool="data_prep/annotate.py",
        name=out.resolve().name,
        kind=shards.kind,
        source="; ".join(dict.fromkeys(entry["source"] for entry in inputs)),
        license="; ".join(dict.fromkeys(entry["license"] for entry in inputs)),
        extra={"inputs": inputs, "annotations": annotations} | caption_lines(shards),
        shards=len(shards.shards),
    )
    classes = [{**asdict(entry), "names": list(entry.names)} for entry in shards.classes]
    set_folder.begin(out, preparation, classes)
    if set_folder.missing(out, arguments.part, arguments.parts):
        read = Annotator(shards, table, arrays)
        order = np.arange(len(shards))
        write_shards(out, order, read, arguments.part, arguments.parts, layout_of(shards))
    print(f"next: python data_prep/verify.py {out}")


if __name__ == "__main__":
    run_cli(main)
