"""Try again the rows of a downloaded set that gave no image, in shards after the others.

    python data_prep/retry_failed.py D [--reasons timeout dns ... | all]

The parquet files of the finished shards say what became of each row. Rows that never gave an
image are grouped by their last reason, those of the chosen groups are appended to D/list/, and
new shards are made of them; finished shards stay as they are. Images are stored, and left out for
their size or ratio, as the set was begun. An interrupted retry is finished by the same command,
before rows are chosen anew.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.download import img2ds, options, url_list
from data_prep.download.reasons import FAILURES, SUCCESS, TEMPORARY, reason_group
from data_prep.sets import set_folder
from loaders.errors import ConfigError, DataError, run_cli
from loaders.progress import Progress
from loaders.specs import as_path

ALL = "all"
_PREFIX = "retry-"


def failed_rows(out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows that no finished shard has an image of: row numbers (n,) int64 ascending, and the
    reason group of the last try of each (n,) str. Raises `DataError` for an unreadable parquet.
    """
    rows, groups = [np.empty(0, np.int64)], [np.empty(0, str)]
    for shard in Progress(set_folder.finished(out), desc="reading what failed", unit="shard"):
        path = out / set_folder.SHARDS / f"{set_folder.shard_name(shard)}.parquet"
        try:
            table = pq.read_table(path, columns=["row", "status", "error_message"])
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path}: cannot be read ({error}); move shard {shard} to {set_folder.QUARANTINE}/ "
                "and fetch it again with the command that began the set"
            ) from None
        succeeded = pc.equal(table["status"], SUCCESS)
        messages = pc.if_else(succeeded, SUCCESS, pc.fill_null(table["error_message"], ""))
        coded = messages.combine_chunks().dictionary_encode()
        names = np.array([reason_group(text) for text in coded.dictionary.to_pylist()])
        rows.append(table["row"].to_numpy())
        groups.append(names[coded.indices.to_numpy()])
    row, group = np.concatenate(rows), np.concatenate(groups)
    last, place = np.unique(row[::-1], return_index=True)
    failed = ~np.isin(last, row[group == SUCCESS])
    return last[failed], group[::-1][place][failed]


def select(out: Path, index: dict, rows: np.ndarray) -> pa.Table:
    """The rows (n,) of the list that the set began with, in its order."""
    tables = []
    for entry in _base(index)["files"]:
        table = pq.read_table(out / set_folder.LIST / entry["file"])
        tables.append(table.filter(pa.array(np.isin(table["row"].to_numpy(), rows))))
    return pa.concat_tables(tables).select(index["columns"])


def begin_retry(out: Path, reasons: list[str]) -> int:
    """Append the failed rows of some reason groups to the list; returns their number.

    Prints the rows of each group. Raises `DataError` if another process prepares the set.
    """
    with set_folder.working_folder(out, 0, 1):
        index = url_list.read_index(out)
        rows, groups = failed_rows(out)
        chosen = np.isin(groups, reasons)
        for group, count in Counter(groups.tolist()).most_common():
            print(f"  {group:<20} {count:>10}  {'tried again' if group in reasons else 'left'}")
        if chosen.any():
            used = {entry["appended"] for entry in index["files"] if "appended" in entry}
            prefix = f"{_PREFIX}{len(used) + 1:03d}"
            url_list.append(out, select(out, index, rows[chosen]), prefix)
            _plan_appended(out)
    return int(chosen.sum())


def check_reasons(names: list[str]) -> list[str]:
    """Reason groups that were asked for; `ConfigError` for unknown ones."""
    unknown = sorted(set(names) - {ALL, *FAILURES})
    if unknown:
        raise ConfigError(
            f"--reasons: unknown {', '.join(map(repr, unknown))}; there are "
            + ", ".join(map(repr, (*FAILURES, ALL)))
        )
    return list(FAILURES) if ALL in names else names


def _base(index: dict) -> dict:
    """The part of a list's index that the set began with."""
    return {"files": [entry for entry in index["files"] if "appended" not in entry]}


def _plan_appended(out: Path) -> None:
    """Plan the shards of all files of the list."""
    preparation = set_folder.load(out)
    shards = url_list.shard_count(url_list.read_index(out), preparation.samples_per_shard)
    if shards != preparation.shards:
        set_folder.update(out, shards=shards)


def main() -> None:
    """Command line: finish the open retry, or begin one; then download."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=as_path, help="folder of the set")
    parser.add_argument(
        "--reasons",
        nargs="+",
        default=list(TEMPORARY),
        help=f"reason groups to try again, or {ALL} (default: {', '.join(TEMPORARY)})",
    )
    options.add_network_arguments(parser)
    arguments = parser.parse_args()
    out, reasons = arguments.folder, check_reasons(arguments.reasons)
    preparation = set_folder.load(out)
    same = options.from_identity(preparation.identity)
    fetching = options.read(arguments, **same)
    base = url_list.base_shards(out)
    _plan_appended(out)  # a kill may have come between the list and the plan
    missing = set_folder.missing(out)
    if missing and missing[0] < base:
        raise DataError(
            f"{out}: {sum(shard < base for shard in missing)} of {base} shards are not finished "
            f"yet; first run {preparation.tool} again with the same options"
        )
    if missing:
        print(f"{out}: finishing the retry that was begun; run it again to choose rows anew")
    elif not begin_retry(out, reasons):
        print(f"{out}: no failed row of these groups: nothing to try again")
        return
    missing = set_folder.missing(out)
    img2ds.fetch(out, 0, 1, fetching)
    img2ds.summarise(out, missing)
    print(f"next: python data_prep/verify.py {out}")


if __name__ == "__main__":
    run_cli(main)
