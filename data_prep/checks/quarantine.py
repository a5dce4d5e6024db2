"""Shards that cannot be read are taken away, with the reason, to be made again."""

import os
import re
from pathlib import Path

from data_prep.checks.verify_shard import RESULTS
from data_prep.sets import set_folder
from loaders.errors import DataError

REASON = "reason.txt"


def quarantine(out: Path, shard: int, reason: str) -> Path:
    """Move the files of a shard to D/quarantine/NNNNN/ (or NNNNN.1, .2, …) with the reason.

    The tar goes first: from then on the shard counts as missing, whatever happens.
    """
    set_folder.reopen(out)
    name, number = set_folder.shard_name(shard), 0
    place = out / set_folder.QUARANTINE / name
    while place.exists():
        number += 1
        place = place.with_name(f"{name}.{number}")
    place.mkdir(parents=True)
    (place / REASON).write_text(f"{reason}\n", encoding="utf-8", errors="surrogateescape")
    for end in (".tar", ".parquet", "_stats.json"):
        path = out / set_folder.SHARDS / f"{name}{end}"
        if path.is_symlink():  # of an imported set; moved as it is, a relative link would break
            (place / path.name).symlink_to(os.path.abspath(path.parent / os.readlink(path)))
            path.unlink()
        elif path.exists():
            os.replace(path, place / path.name)
    (out / RESULTS / f"{name}.json").unlink(missing_ok=True)
    return place


def quarantine_unfinished(out: Path) -> dict[int, str]:
    """Take away tars without statistics; returns the reasons by shard."""
    finished, reasons = set_folder.finished(out), {}
    for tar in sorted((out / set_folder.SHARDS).glob("*.tar")):
        if not tar.exists():
            raise DataError(
                f"{tar}: links to {os.readlink(tar)}, which is not there; mount the disk or bring "
                "the file back"
            )
        if not re.fullmatch(r"\d{5,}", tar.stem):
            raise DataError(f"{tar}: not a shard of this set (NNNNN.tar); move it elsewhere")
        if int(tar.stem) not in finished:
            stats = f"{tar.stem}_stats.json"
            what = "is damaged" if tar.with_name(stats).exists() else "is not there"
            reasons[int(tar.stem)] = f"{tar}: unfinished: {stats} {what}"
    for shard, reason in reasons.items():
        quarantine(out, shard, reason)
    return reasons
