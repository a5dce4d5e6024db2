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
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.checks.verify_lock import alone
from data_prep.checks.verify_pool import check_all
from data_prep.checks.verify_shard import LABEL_FAULT, RESULTS, Task, kept_result
from data_prep.sets import set_folder
from loaders.errors import DataError, run_cli
from loaders.manifest import ShardInfo, write_manifest
from loaders.specs import as_path

BAD_SAMPLES = "bad_samples.tsv"
REASON = "reason.txt"


@dataclass
class Summary:
    """What a run of `verify` found. Lists hold shard numbers."""

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
        lost = _quarantine_unfinished(out)
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
        _remove_empty_tars(out, results)
        _list_bad_samples(out, results)
        missing = set_folder.missing(out)
        if missing and not allow_missing:
            raise _missing_shards(out, preparation, missing, lost)
        for shard, reason in lost.items():
            print(f"quarantined shard {set_folder.shard_name(shard)}: {reason}")
        if set_folder.load(out) != preparation or set(set_folder.finished(out)) != set(results):
            raise DataError(f"{out}: shards were added while verify.py ran; run it again")
        _close(out, preparation, results, missing)
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


def _quarantine_unfinished(out: Path) -> dict[int, str]:
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


def _remove_empty_tars(out: Path, results: dict[int, dict]) -> None:
    """Remove tars without a sample: readers that are given a range of tars refuse them."""
    for shard, result in results.items():
        if not result["samples"]:
            (out / set_folder.SHARDS / f"{set_folder.shard_name(shard)}.tar").unlink(
                missing_ok=True
            )


def _list_bad_samples(out: Path, results: dict[int, dict]) -> None:
    """Write D/bad_samples.tsv: `shard/key`, tab, reason."""
    lines = [
        f"{set_folder.shard_name(shard)}/{key}\t{' '.join(reason.split())}\n"
        for shard, result in results.items()
        for key, reason in result["bad"]
    ]
    path = out / BAD_SAMPLES
    if not lines:
        path.unlink(missing_ok=True)
        return
    set_folder.replace_file(path, "".join(lines))
    print(
        f"{len(lines)} bad samples, listed in {path}; training counts and skips them. To leave "
        f"them out: python data_prep/reshard.py {out} --keys {path} --drop --out NEW"
    )


def _missing_shards(out: Path, preparation, missing: list[int], lost: dict) -> DataError:
    moved = "".join(f"\n  {set_folder.shard_name(shard)}: {lost[shard]}" for shard in sorted(lost))
    if moved:
        moved = f"\nMoved to {out / set_folder.QUARANTINE}:{moved}"
    return DataError(
        f"{out}: {len(missing)} of {preparation.shards} shards are missing: {ranges(missing)}. "
        f"Make them with the command that began the set (python {preparation.tool} … --out {out}), "
        "then run verify.py again; or close the set without them: --allow-missing" + moved
    )


def ranges(numbers: Sequence[int]) -> str:
    """Ascending shard numbers in words: `00003, 00007-00012`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    name = set_folder.shard_name
    return ", ".join(name(a) if a == b else f"{name(a)}-{name(b)}" for a, b in spans)


def _close(
    out: Path, preparation: set_folder.Preparation, results: dict, missing: list[int]
) -> None:
    """Write sizes.json and then manifest.json, from what is known: no tar is read again."""
    shards, labels = [], []
    for shard, result in results.items():
        name = set_folder.shard_name(shard)
        labels += [f"{name}/{key}: {why}" for key, why in result["bad"] if LABEL_FAULT in why]
        if result["samples"]:
            path = str(out / set_folder.SHARDS / f"{name}.tar")
            shards.append(ShardInfo(path, result["samples"], result["bytes"], result["sha256"]))
    if not shards:
        raise DataError(f"{out}: no image was kept; data_prep/report.py {out} says why")
    if labels and preparation.kind == "image_label":
        raise DataError(
            f"{out}: {len(labels)} samples without a label of {set_folder.CLASSES}: "
            f"{', '.join(labels[:5])}; all are in {out / BAD_SAMPLES}. Training refuses such a "
            f"set: restore {set_folder.CLASSES}, or make it again (python {preparation.tool} …)"
        )
    extra = {
        "tool": preparation.tool,
        "identity": preparation.identity,
        "bad_samples": sum(len(result["bad"]) for result in results.values()),
        "decoded_samples": sum(result["decoded"] for result in results.values()),
        "empty_shards": [shard for shard, result in results.items() if not result["samples"]],
        "missing_shards": missing,
    }
    sizes = {Path(info.path).name: info.samples for info in shards}
    set_folder.replace_file(
        out / set_folder.SHARDS / set_folder.SIZES, json.dumps(sizes, indent=1) + "\n"
    )
    write_manifest(
        out,
        preparation.name,
        preparation.kind,
        set_folder.load_classes(out),
        preparation.source,
        preparation.license,
        preparation.date,
        preparation.attempted,
        {**preparation.extra, **extra},
        shards,
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
