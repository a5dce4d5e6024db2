"""The one wrapper of img2dataset (Beaumont, github.com/rom1504/img2dataset, version 1.47).

img2dataset ends with code 0 when every download failed, waits for ever when one of its workers
was killed, and leaves half-written tars under their final names. So it runs as a child process
into a folder of its own, and each shard is checked before it joins the set (img2ds_launch.py).
The output is what img2dataset documents: NNNNN.tar with jpg, txt, json, and NNNNN.parquet with a
row for every address tried. Images keep their ratio, the shorter side at most `image_size`.
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow.parquet as pq

from data_prep.download import img2ds_launch, url_list
from data_prep.download.advice import COLUMNS, DNS_SHARE, Hosts, leading_advice, resolver_advice
from data_prep.download.options import Options
from data_prep.download.reasons import DNS, PRIVATE, SUCCESS
from data_prep.sets import set_folder
from loaders.errors import DataError
from loaders.progress import Progress


def download(out: Path, part: int, parts: int, options: Options) -> None:
    """Fetch the missing shards of one part of the set that `set_folder.begin` opened in `out`.

    May be killed at any moment; the same call continues with the shards that are not finished.
    Prints a summary. Raises `DataError` when the disk is full, when shards cannot be finished,
    and when not one image of the part could be had.
    """
    fetch(out, part, parts, options)
    summarise(out, range(part, set_folder.load(out).shards, parts))


def fetch(out: Path, part: int, parts: int, options: Options) -> None:
    """`download` without the summary."""
    set_folder.check_part(part, parts)
    rows = shard_rows(out)
    planned = set_folder.load(out).shards
    if len(rows) < planned:
        raise DataError(
            f"{out}: {set_folder.RUN} plans {planned} shards, but the list in {set_folder.LIST}/ "
            f"makes {len(rows)}; restore the folder, or begin again in an empty one"
        )
    if not set_folder.missing(out, part, parts):
        return
    with set_folder.working_folder(out, part, parts) as stage:
        set_folder.reopen(out)
        done = [s for s in set_folder.finished(out) if s % parts == part]
        with Progress(
            desc=set_folder.load(out).name,
            unit="row",
            total=sum(rows[part:planned:parts]),
            initial=sum(rows[s] for s in done),
        ) as bar:
            _launch_until_finished(out, part, parts, options, rows, stage, bar)


def _launch_until_finished(out, part, parts, options, rows, stage, bar) -> None:
    """Start img2dataset until no shard is missing; a start that finishes none is a failure."""
    failures, number = 0, 0
    while todo := set_folder.missing(out, part, parts):
        done = [s for s in set_folder.finished(out).items() if s[0] % parts == part]
        before = img2ds_launch.count_reasons(stats for _, stats in done)
        home = stage / f"out-{number}"
        launch = img2ds_launch.Launch(out, home, todo, rows, options, bar, before)
        try:
            reason = launch.run()
        except OSError as error:
            if error.errno not in img2ds_launch.DISK_FULL:
                raise
            raise set_folder.disk_full(out, part, parts, launch.staged) from None
        number += 1
        left = set_folder.missing(out, part, parts)
        if not left:
            return
        failures = failures + 1 if len(left) == len(todo) else 1
        last = f"{out}: {reason}. The last lines of img2dataset:\n{launch.tail()}"
        Progress.write(last, sys.stderr)
        if failures > options.max_restarts:
            raise DataError(
                f"{out}: shards {img2ds_launch.some(left)} could not be finished ({reason}; "
                f"{failures} starts in a row without a finished shard). Finished shards are "
                "valid. Look at the lines above (killed for memory: fewer --threads and "
                "--processes), then run the same command again"
            )
        Progress.write(f"{out}: starting it again for {len(left)} shards", sys.stderr)


def shard_rows(out: Path) -> list[int]:
    """Number of rows of each shard, in img2dataset's numbering over the sorted list files."""
    size = set_folder.load(out).samples_per_shard
    rows = []
    for entry in sorted(url_list.read_index(out)["files"], key=lambda entry: entry["file"]):
        rows += [min(size, entry["rows"] - start) for start in range(0, entry["rows"], size)]
    return rows


def summarise(out: Path, shards: Iterable[int]) -> None:
    """Print what became of the rows of finished shards, and one advice.

    Shards of a retry hold rows that were chosen because they failed: no share of theirs speaks of
    the list. Raises `DataError` if no image of the set was kept.
    """
    done = set_folder.finished(out)
    chosen = {shard: done[shard] for shard in shards if shard in done}
    groups = img2ds_launch.count_reasons(chosen.values())
    rows = sum(groups.values())
    if not rows:
        return
    base = url_list.base_shards(out)
    again = sum(stats["count"] for shard, stats in chosen.items() if shard >= base)
    what = f"{rows} rows" if not again else f"{rows} rows ({again} of them tried again)"
    print(f"{out}: kept {groups[SUCCESS]} of {what} ({groups[SUCCESS] / rows:.1%})")
    failures = {group: n for group, n in groups.most_common() if group != SUCCESS}
    lines = [f"  {group:<20} {n:>10} {n / rows:7.2%}" for group, n in failures.items()]
    print(*lines, sep="\n")
    unselected = {shard: stats for shard, stats in chosen.items() if shard < base}
    advice = _resolver_advice(out, unselected) or leading_advice(out, failures)
    if any(stats["successes"] for stats in done.values()):
        if advice:
            print(advice)
        return
    top = ", ".join(f"{group} {n}" for group, n in list(failures.items())[:3])
    if next(iter(failures)) != PRIVATE:
        advice = (
            "Check the network, the list and the proxy variables, then: python "
            f"data_prep/retry_failed.py {out} --reasons all"
        )
    raise DataError(f"{out}: not one of {rows} rows gave an image ({top}). {advice}")


def _resolver_advice(out: Path, statistics: Mapping[int, dict]) -> str | None:
    """Advice about name resolution from shards of the list as it was; None if there is none."""
    groups = img2ds_launch.count_reasons(statistics.values())
    rows, hosts = sum(groups.values()), Hosts()
    if groups[DNS] <= DNS_SHARE * rows:
        return None  # so that no address need be read
    for shard in statistics:
        path = out / set_folder.SHARDS / f"{set_folder.shard_name(shard)}.parquet"
        hosts.add(pq.read_table(path, columns=list(COLUMNS)))
    return resolver_advice(out, rows, groups[DNS], hosts)
