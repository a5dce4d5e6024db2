"""Parts of the tests of lists: building one, reading what it holds."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.download import url_list
from data_prep.download.list_rows import Row

REPOSITORY = Path(__file__).resolve().parents[2]


def make_rows(count: int) -> list[Row]:
    return [Row(i, f"http://host/{i}.jpg", f"caption {i}", b"raw %d" % i) for i in range(count)]


def build(out: Path, rows, size: int = 10, source: bytes = b"source", **changes) -> dict:
    """A list in `out` from rows at hand; the input file is beside it."""
    path = out.parent / f"{out.name}.tsv"
    if not path.exists():
        path.write_bytes(source)
    return url_list.build(out, lambda notes: rows, [path], {"a": 1}, size, **changes)


def read_table(out: Path) -> pa.Table:
    """All rows in the order of the sorted files."""
    return pa.concat_tables(pq.read_table(p) for p in sorted((out / "list").glob("*.parquet")))


def read_rejected(out: Path) -> list[tuple[int, str, bytes]]:
    """Row (from 0), reason and raw line of each."""
    head, *lines = (out / "list" / "rejected.tsv").read_text("ascii").splitlines()
    assert head == "line\treason\ttext"
    fields = [line.split("\t") for line in lines]
    return [(int(n) - 1, why, raw.encode().decode("unicode_escape").encode("latin-1"))
            for n, why, raw in fields]  # fmt: skip
