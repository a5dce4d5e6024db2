"""Samples that are at hand (archives, folders, other shards) written as tar shards.

Samples are written in a seeded permuted order, because a one-pass copy of ImageNet gives shards
of one class each. The tars are deterministic: two runs give the same bytes.
"""

import json
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sets import set_folder
from loaders.errors import DataError
from loaders.progress import Progress

SUCCESS = "success"
_BLOCK = 512
_RECORD = 20 * _BLOCK
_WEYL = np.uint64(0x9E3779B97F4A7C15)

_NAME_BYTES = 100
_TEMPLATE = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)  # no name, size 0, mode 0644
_TEMPLATE_SUM = int(_TEMPLATE[148:154], 8)
_REST = _TEMPLATE[154:]  # from the end of the checksum's digits


@dataclass(frozen=True)
class Layout:
    """Which positions each shard holds, `first[s]` to `first[s + 1]`, and the key of each row."""

    first: Sequence[int]
    key: Callable[[int, int], str]  # of (shard, row)

    @classmethod
    def even(cls, count: int, size: int) -> "Layout":
        """Shards of `size`, with img2dataset's keys."""
        first = [min(count, s * size) for s in range(-(-count // size) + 1)]
        return cls(first, lambda shard, row: set_folder.sample_key(shard, row, size))


class Unusable(Exception):
    """A sample that cannot be written; its message is the reason, counted in the statistics."""


def permutation(count: int, seed: int) -> np.ndarray:
    """A seeded order of 0..count-1, (count,) int64, the same on every machine and numpy version.

    Sorted by SplitMix64 of (seed, index) (Steele et al., OOPSLA 2014).
    """
    with np.errstate(over="ignore"):
        value = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed) * np.uint64(1 << 40)
        value = value * _WEYL
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        value ^= value >> np.uint64(31)
    return np.argsort(value, kind="stable").astype(np.int64)


def plan(
    count: int, samples_per_shard: int, identity: Mapping[str, Any], **about: Any
) -> set_folder.Preparation:
    """The preparation of `count` samples that are at hand, begun today.

    `about`: tool, name, kind, source, license and extra of the set; `shards` where they are not
    all full.
    """
    return set_folder.Preparation(
        **{"shards": -(-count // samples_per_shard), **about},
        date=date.today().isoformat(),
        samples_per_shard=samples_per_shard,
        attempted=count,
        identity={**identity, "samples_per_shard": samples_per_shard},
    )


def write_shards(
    out: Path,
    order: np.ndarray,
    read: Callable[[int], Mapping[str, bytes]],
    part: int = 0,
    parts: int = 1,
    layout: Layout | None = None,
) -> Counter:
    """Write the missing shards of one part of the set that `set_folder.begin` opened in `out`.

    `order` (n,) int64: sample indices in the order of writing; shard s holds the positions
    s * samples_per_shard and on. `read(i)` gives the members of sample i, extension -> bytes, in
    the order of writing, or raises `Unusable`. `layout`: other shards and keys than those. Returns
    the number of samples by status, over this call. Raises `DataError` when the disk is full;
    finished shards stay valid.
    """
    set_folder.check_part(part, parts)
    preparation = set_folder.load(out)
    size = preparation.samples_per_shard
    layout = layout or Layout.even(len(order), size)
    if preparation.shards != len(layout.first) - 1 or layout.first[-1] != len(order):
        raise ValueError(f"{len(order)} samples do not make {preparation.shards} shards of {size}")
    todo = set_folder.missing(out, part, parts)
    if todo:
        set_folder.reopen(out)
    total: Counter = Counter()
    written: Counter = Counter()
    rows = sum(layout.first[s + 1] - layout.first[s] for s in todo)
    try:
        with (
            set_folder.working_folder(out, part, parts) as stage,
            Progress(total=rows, unit="sample", desc=preparation.name, show=bool(rows)) as bar,
        ):
            for shard in todo:
                chosen = order[layout.first[shard] : layout.first[shard + 1]]
                total += _write_shard(stage, shard, layout, chosen, read, bar, written)
                set_folder.publish(out, shard, stage)
    except OSError as error:
        if error.errno not in set_folder.FULL:
            raise
        expected = size * written["bytes"] // max(1, written["samples"])
        raise set_folder.disk_full(out, part, parts, expected) from None
    return total


def _write_shard(
    stage: Path, shard: int, layout: Layout, chosen, read, bar: Progress, written: Counter
) -> Counter:
    """Write one tar and its statistics into `stage`; adds to the samples and bytes `written`."""
    name, status, start = set_folder.shard_name(shard), Counter(), time.time()
    with open(stage / f"{name}.tar", "wb", buffering=1 << 20) as file:
        for row, index in enumerate(chosen):
            try:
                members = read(int(index))
            except Unusable as error:
                status[str(error)] += 1
            else:
                key = layout.key(shard, row)
                for extension, data in members.items():
                    written["bytes"] += write_member(file, f"{key}.{extension}", data)
                status[SUCCESS] += 1
            written["samples"] += 1
            bar.update()
        end_tar(file)
    if not status[SUCCESS]:
        raise DataError(
            f"shard {name}: none of {len(chosen)} samples is usable: {dict(status)}; remove them "
            "from the source, or put more samples in a shard"
        )
    stats = {
        "count": len(chosen),
        "successes": status[SUCCESS],
        "failed_to_download": 0,
        "failed_to_resize": len(chosen) - status[SUCCESS],
        "duration": time.time() - start,
        "start_time": start,
        "end_time": time.time(),
        "status_dict": dict(status),
    }
    (stage / f"{name}_stats.json").write_text(json.dumps(stats, indent=4), encoding="utf-8")
    return status


def write_member(file, name: str, data: bytes) -> int:
    """Append a regular file to a tar that is being written: time, user and group are 0.

    Returns the bytes that it takes in the tar.
    """
    padding = bytes(-len(data) % _BLOCK)
    file.write(_header(name.encode(), len(data)))
    file.write(data)
    file.write(padding)
    return _BLOCK + len(data) + len(padding)


def _header(name: bytes, size: int) -> bytes:
    """The header block, as `tarfile` makes it (20 us) but from a template (2 us)."""
    if len(name) > _NAME_BYTES or size >= 8**11:
        info = tarfile.TarInfo(name.decode())
        info.size, info.mode = size, 0o644
        return info.tobuf(tarfile.USTAR_FORMAT)
    digits = b"%011o" % size
    total = _TEMPLATE_SUM + sum(name) + sum(digits) - 11 * ord("0")
    return b"".join(
        (name, _TEMPLATE[len(name) : 124], digits, _TEMPLATE[135:148], b"%06o" % total, _REST)
    )


def end_tar(file) -> None:
    """Write the end mark of a tar, padded to a record as `tar` does."""
    file.write(bytes(2 * _BLOCK))
    file.write(bytes(-file.tell() % _RECORD))
