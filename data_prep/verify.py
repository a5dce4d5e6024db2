"""Check every shard of a prepared set, take unreadable ones away, and close the set.

    python data_prep/verify.py D [--decode all|N] [--workers N] [--allow-missing]

Every finished tar is read once: headers, number of samples against its statistics, labels, json,
captions, images, sha256. What was found is kept in D/verify/, one file a shard, so another run
reads only what is new or changed. Unreadable shards go to D/quarantine/NNNNN/ with a reason.txt,
to be made again; single bad samples stay and are listed in D/bad_samples.tsv. When no shard is
missing, D/shards/sizes.json (samples per tar, as open_clip reads it) and then D/manifest.json are
written.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.checks import closing
from data_prep.checks.quarantine import quarantine, quarantine_unfinished
from data_prep.checks.verify_lock import alone
from data_prep.checks.verify_pool import check_all
from data_prep.checks.verify_shard import Task, kept_result
from data_prep.sets import set_folder
from loaders.errors import DataError, run_cli
from loaders.specs import as_path


@dataclass
class Summary:
    """What a run of `verify` found."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    bad: int = 0
    checked: int = 0  # shards read in this run; the others were known
    decoded: int = 0  # images, in this run
    wall_seconds: float = 0.0
    core_seconds: float = 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.shards} shards, {self.samples} samples, {self.bytes / 1e9:.3f} GB, "
            f"{self.bad} bad samples"
        ]
        if self.checked:
            lines.append(
                f"checked {self.checked} shards in {self.wall_seconds:.1f} s: {self.decoded} "
                f"images decoded, {self.decoded / max(self.core_seconds, 1e-3):.0f} images/s "
                "per core"
            )
        else:
            lines.append("nothing has changed since the last run; no shard was read again")
        return "\n".join(lines)


def verify(
    out: Path, decode: int | None = None, workers: int = 1, allow_missing: bool = False
) -> Summary:
    """Check the finished shards of the set in `out` and close it.

    `decode`: images to decode in each shard, a seeded sample; None: all. `allow_missing`: close a
    set although planned shards are missing; the manifest names them. Raises `DataError` if
    shards are missing or were quarantined, if an image_label set has labels outside of its class
    table, or if the set cannot be read or changes meanwhile.
    """
    start = time.monotonic()
    preparation = set_folder.load(out)
    with alone(out):
        lost = quarantine_unfinished(out)
        kind, classes = preparation.kind, len(set_folder.load_classes(out))
        tasks = [
            Task(out, shard, int(stats["successes"]), kind, classes, decode)
            for shard, stats in set_folder.finished(out).items()
        ]
        results = {t.shard: kept for t in tasks if (kept := kept_result(t)) is not None}
        todo = [task for task in tasks if task.shard not in results]
        fresh = check_all(preparation.name, todo, workers)
        for shard, result in fresh.items():
            if result["fault"] is None:
                results[shard] = result
            else:
                lost[shard] = result["fault"]
                quarantine(out, shard, result["fault"])
        results = dict(sorted(results.items()))
        closing.remove_empty_tars(out, results)
        closing.list_bad_samples(out, results)
        missing = set_folder.missing(out)
        if missing and not allow_missing:
            raise closing.missing_shards(out, preparation, missing, lost)
        for shard, reason in lost.items():
            print(f"quarantined shard {set_folder.shard_name(shard)}: {reason}")
        if set_folder.load(out) != preparation or set(set_folder.finished(out)) != set(results):
            raise DataError(f"{out}: shards were added while verify.py ran; run it again")
        closing.close(out, preparation, results, missing)
    good = [result for shard, result in fresh.items() if shard in results]
    return Summary(
        shards=sum(result["samples"] > 0 for result in results.values()),
        samples=sum(result["samples"] for result in results.values()),
        bytes=sum(result["bytes"] for result in results.values() if result["samples"]),
        bad=sum(len(result["bad"]) for result in results.values()),
        checked=len(fresh),
        decoded=sum(result["decoded"] for result in good),
        wall_seconds=time.monotonic() - start,
        core_seconds=sum(result["seconds"] for result in good),
    )


def _decode(text: str) -> int | None:
    if text != "all" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError("give 'all' or a number of images per shard")
    return None if text == "all" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=as_path, help="folder of the set (the --out of its preparer)"
    )
    parser.add_argument("--decode", type=_decode, default="all", help="images per shard, or all")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--allow-missing", action="store_true", help="close an incomplete set")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error("--workers must be at least 1")
    out = arguments.folder
    try:
        summary = verify(out, arguments.decode, arguments.workers, arguments.allow_missing)
    except OSError as error:
        raise DataError(
            f"{error.filename or out}: {error.strerror or error}. The folder must be writable and "
            "have some room; shards that were checked are kept: run the same command again"
        ) from None
    print(summary)
    print(f"closed: {out / set_folder.MANIFEST}")
    print(f"next: python data_prep/report.py {out} --output DIR")


if __name__ == "__main__":
    run_cli(main)
