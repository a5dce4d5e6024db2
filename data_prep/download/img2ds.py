"""The one wrapper of img2dataset (Beaumont, github.com/rom1504/img2dataset, version 1.47).

img2dataset ends with code 0 when every download failed, waits for ever when one of its workers
was killed, and leaves half-written tars under their final names. So it runs as a child process
into a folder of its own, and each shard is checked before it joins the set (img2ds_launch.py).
The output is what img2dataset documents: NNNNN.tar with jpg, txt, json, and NNNNN.parquet with a
row for every address tried. Images keep their ratio, the shorter side at most `image_size`.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tqdm import tqdm

from data_prep.download import img2ds_launch, url_list
from data_prep.download.advice import COLUMNS, DNS_SHARE, Hosts, leading_advice, resolver_advice
from data_prep.download.reasons import DNS, PRIVATE, SUCCESS
from data_prep.sets import set_folder
from loaders.errors import ConfigError, DataError


@dataclass(frozen=True)
class Options:
    """How images are fetched and stored. Sizes in pixels and bytes, times in seconds unless named.

    `timeout` is for one socket operation, `image_seconds` for a whole image with its redirects.
    `local_root`: the folder below which file: addresses are allowed.
    """

    image_size: int = 256
    encode_quality: int = 95
    min_image_size: int = 0
    max_aspect_ratio: float = math.inf
    processes: int = len(os.sched_getaffinity(0))
    threads: int = 32
    timeout: float = 10
    retries: int = 2
    image_seconds: float = 60
    max_image_bytes: int = 64 << 20
    max_image_pixels: int = 50_000_000
    stall_minutes: float = 10
    max_restarts: int = 3
    user_agent_token: str = "img2dataset"
    disallowed_header_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    allow_private_addresses: bool = False
    local_root: Path | None = None

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values that cannot work."""
        for name in (
            "image_size",
            "processes",
            "threads",
            "timeout",
            "image_seconds",
            "max_image_bytes",
            "max_image_pixels",
            "stall_minutes",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be above 0")
        if self.min_image_size < 0:
            raise ConfigError("--min-image-size must not be negative")
        if not self.max_aspect_ratio >= 1:
            raise ConfigError("--max-aspect-ratio is the longer side by the shorter: at least 1")
        if not 0 <= self.encode_quality <= 100:
            raise ConfigError(f"--encode-quality {self.encode_quality}: a JPEG quality is 0 to 100")
        if self.retries < 0 or self.max_restarts < 0:
            raise ConfigError("--retries and --max-restarts must not be negative")
        if self.stall_minutes * 60 <= self.image_seconds * (1 + self.retries):
            raise ConfigError(
                f"--stall-minutes {self.stall_minutes:g} is not longer than one image may take: "
                f"{1 + self.retries} tries of --image-seconds {self.image_seconds:g}"
            )


_HELP = {
    "image_size": "shorter side of a stored image; smaller ones stay as they are",
    "encode_quality": "JPEG quality",
    "min_image_size": "images with a shorter side below this are left out",
    "max_aspect_ratio": "images whose longer side is more than this many times the shorter are "
    "left out",
    "processes": "worker processes, each with one shard at a time",
    "threads": "downloads at the same time in each process",
    "timeout": "seconds for one socket operation",
    "retries": "further tries of a failed download",
    "image_seconds": "seconds for a whole image",
    "max_image_bytes": "larger files are given up",
    "max_image_pixels": "larger images are refused before they are decoded",
    "stall_minutes": "minutes without any download after which img2dataset is restarted",
    "max_restarts": "restarts in a row without a finished shard before giving up",
    "user_agent_token": "name in the User-Agent header, and in X-Robots-Tag rules for us alone",
}
_LIMITS = ("min_image_size", "max_aspect_ratio")  # part of the plan where they are in force
_STORED = ("image_size", "encode_quality", *_LIMITS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for every field of `Options` but `local_root`."""
    for name in _STORED:
        _add(parser, name)
    parser.add_argument(
        "--disallowed-header-directives",
        nargs="*",
        default=list(Options.disallowed_header_directives),
        help="X-Robots-Tag values that keep an image out; none given: all are taken "
        "(default: %(default)s)",
    )
    add_network_arguments(parser)


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that may differ between two runs over the same set."""
    for name in _HELP:
        if name not in _STORED:
            _add(parser, name)
    parser.add_argument(
        "--allow-private-addresses",
        action="store_true",
        help="also fetch from loopback, private and link-local addresses (a mirror of your own)",
    )


def _add(parser: argparse.ArgumentParser, name: str) -> None:
    default = getattr(Options, name)
    flag, kind = f"--{name.replace('_', '-')}", Options.__annotations__[name]
    parser.add_argument(
        flag, type=kind, default=default, help=f"{_HELP[name]} (default: {default})"
    )


def options(arguments: argparse.Namespace, **changes: Any) -> Options:
    """`Options` from parsed flags; `changes` win. Raises `ConfigError`."""
    given = {key: value for key, value in vars(arguments).items() if key in Options.__annotations__}
    given |= changes
    given["disallowed_header_directives"] = tuple(given["disallowed_header_directives"])
    return Options(**given)


def identity(options: Options, samples_per_shard: int) -> dict[str, Any]:
    """What must stay the same while a set is prepared, for `Preparation.identity`."""
    same: dict[str, Any] = {
        name: getattr(options, name)
        for name in _STORED
        if name not in _LIMITS or getattr(options, name) != getattr(Options, name)
    }
    same["disallowed_header_directives"] = list(options.disallowed_header_directives)
    same["samples_per_shard"] = samples_per_shard
    if options.local_root is not None:
        same["local_root"] = str(options.local_root)
    return same


def from_identity(stored: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Options` that a set was begun with, from its `Preparation.identity`."""
    same = {name: stored.get(name, getattr(Options, name)) for name in _LIMITS}
    same |= {name: stored[name] for name in ("image_size", "encode_quality")}
    same["disallowed_header_directives"] = stored["disallowed_header_directives"]
    return same | {"local_root": Path(stored["local_root"]) if "local_root" in stored else None}


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
        with tqdm(
            total=sum(rows[part:planned:parts]),
            initial=sum(rows[s] for s in done),
            desc=set_folder.load(out).name,
            unit="img",
            mininterval=1,
        ) as bar:
            _launch_until_finished(out, part, parts, options, rows, stage, bar)


def _launch_until_finished(out, part, parts, options, rows, stage, bar) -> None:
    """Start img2dataset until no shard is missing; a start that finishes none is a failure."""
    failures, number = 0, 0
    while todo := set_folder.missing(out, part, parts):
        launch = img2ds_launch.Launch(out, stage / f"out-{number}", todo, rows, options, bar)
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
        tqdm.write(f"{out}: {reason}. The last lines of img2dataset:\n{launch.tail()}", sys.stderr)
        if failures > options.max_restarts:
            raise DataError(
                f"{out}: shards {img2ds_launch.some(left)} could not be finished ({reason}; "
                f"{failures} starts in a row without a finished shard). Finished shards are "
                "valid. Look at the lines above (killed for memory: fewer --threads and "
                "--processes), then run the same command again"
            )
        tqdm.write(f"{out}: starting it again for {len(left)} shards", sys.stderr)


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


def check_out(out: Path) -> None:
    """Raise `ConfigError` for a folder that cannot be downloaded to, before it is touched."""
    img2ds_launch.check_path(out)
