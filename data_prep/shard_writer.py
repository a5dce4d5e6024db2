"""Samples that are at hand (archives, folders, other shards) written as tar shards.

Samples are written in a seeded permuted order, because a one-pass copy of ImageNet gives shards
of one class each. The tars are deterministic: two runs give the same bytes.
"""

import errno
import json
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep import folder
from loaders.errors import DataError

SUCCESS = "success"
_BLOCK = 512
_RECORD = 20 * _BLOCK
_WEYL = np.uint64(0x9E3779B97F4A7C15)


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


def write_shards(
    out: Path,
    order: np.ndarray,
    read: Callable[[int], Mapping[str, bytes]],
    part: int = 0,
    parts: int = 1,
) -> Counter:
    """Write the missing shards of one part of the set that `folder.begin` opened in `out`.

    `order` (n,) int64: sample indices in the order of writing; shard s holds the positions
    s * samples_per_shard and on. `read(i)` gives the members of sample i, extension -> bytes, in
    the order of writing, or raises `Unusable`. Returns the number of samples by status, over this
    call. Raises `DataError` when the disk is full; finished shards stay valid.
    """
    folder.check_part(part, parts)
    preparation = folder.load(out)
    size = preparation.samples_per_shard
    if preparation.shards != -(-len(order) // size):
        raise ValueError(f"{len(order)} samples do not make {preparation.shards} shards of {size}")
    todo = folder.missing(out, part, parts)
    if todo:
        folder.reopen(out)
    total: Counter = Counter()
    rows = sum(len(order[s * size : (s + 1) * size]) for s in todo)
    with (
        folder.working_folder(out, part, parts) as stage,
        tqdm(total=rows, unit="img", desc=preparation.name, mininterval=1, disable=not rows) as bar,
    ):
        for shard in todo:
            chosen = order[shard * size : (shard + 1) * size]
            try:
                total += _write_shard(stage, shard, size, chosen, read, bar)
                folder.publish(out, shard, stage)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                staged = (stage / f"{folder.shard_name(shard)}.tar").stat().st_size
                raise folder.disk_full(out, part, parts, staged) from None
    return total


def _write_shard(stage: Path, shard: int, size: int, chosen, read, bar: tqdm) -> Counter:
    """Write one tar and its statistics into `stage`."""
    name, status, start = folder.shard_name(shard), Counter(), time.time()
    with open(stage / f"{name}.tar", "wb", buffering=1 << 20) as file:
        for row, index in enumerate(chosen):
            try:
                members = read(int(index))
            except Unusable as error:
                status[str(error)] += 1
            else:
                key = folder.sample_key(shard, row, size)
                for extension, data in members.items():
                    write_member(file, f"{key}.{extension}", data)
                status[SUCCESS] += 1
            bar.update()
        end_tar(file)
    if not status[SUCCESS]:
        raise DataError(f"shard {name}: none of {len(chosen)} samples is usable: {dict(status)}")
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


def write_member(file, name: str, data: bytes) -> None:
    """Append a regular file to a tar that is being written: time, user and group are 0."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    file.write(data)
    file.write(bytes(-len(data) % _BLOCK))


def end_tar(file) -> None:
    """Write the end mark of a tar, padded to a record as `tar` does."""
    file.write(bytes(2 * _BLOCK))
    file.write(bytes(-file.tell() % _RECORD))
