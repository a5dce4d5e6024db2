"""Reading tars of others for import_shards.py: their indexes, statistics, contents and labels."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.archives.import_about import Contents
from data_prep.sets import set_folder
from loaders.errors import DataError
from loaders.progress import Progress
from loaders.tarreader import ABSENT, NO_LABEL, open_index

SCAN = "import"  # folder in work/ with one link a tar, beside which its index is made


@dataclass(frozen=True)
class Original:
    """A readable tar: its absolute path, the link in work/ that was indexed, its statistics."""

    path: Path
    link: Path
    stats: dict


def scan(out: Path, tars: Sequence[Path]) -> tuple[list[Original], list[str]]:
    """Index every tar. Returns the readable ones, and an error for each of the others.

    The indexes stay in work/, each named for the path of its tar, so that a killed or refused
    import continues and another one does not take them for its own.
    """
    place = out / set_folder.WORK / SCAN
    place.mkdir(parents=True, exist_ok=True)
    good, errors = [], []
    for path in Progress(tars, desc="indexing", unit="tar"):
        link = place / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:24]}.tar"
        link.unlink(missing_ok=True)
        link.symlink_to(path)
        try:
            index = open_index(link)
            stats = _statistics(path, len(index))
        except (DataError, OSError) as error:
            text = str(error).replace(str(link), str(path))
            errors.append(text if str(path) in text else f"{path}: {text}")
            Progress.write(f"unreadable: {errors[-1]}", file=sys.stderr)
            continue
        good.append(Original(path, link, stats))
    return good, errors


def count_contents(originals: Sequence[Original]) -> Contents:
    """Samples of the tars, and how many have a class number and a caption file."""
    samples = labelled = captioned = 0
    for original in originals:
        index = open_index(original.link)
        samples += len(index)
        labelled += int((index["label"] != NO_LABEL).sum())
        captioned += int((index["text_offset"] != ABSENT).sum())
    return Contents(samples, labelled, captioned)


def check_labels(originals: Sequence[Original], classes: int) -> None:
    """Raise `DataError` for a sample whose label is none of the classes."""
    for original in originals:
        index = open_index(original.link)
        wrong = np.flatnonzero((index["label"] < 0) | (index["label"] >= classes))
        if len(wrong):
            row = index[wrong[0]]
            raise DataError(
                f"{original.path}: sample {os.fsdecode(bytes(row['key']))!r} has label "
                f"{row['label']}, not one of 0 to {classes - 1} ({len(wrong)} such samples; -1: "
                "none); give the right --classes, or --kind image_text"
            )


def beside(path: Path, end: str) -> Path:
    """The file that img2dataset leaves beside a tar: 00000.parquet, 00000_stats.json."""
    return path.with_name(path.name.removesuffix(".tar") + end)


def _statistics(path: Path, samples: int) -> dict:
    """Statistics of a tar: those beside it, which must count as many samples, else its own."""
    file = beside(path, "_stats.json")
    if not file.is_file():
        now = time.time()
        counts = {"count": samples, "successes": samples}
        failures = {"failed_to_download": 0, "failed_to_resize": 0}
        times = {"duration": 0.0, "start_time": now, "end_time": now}
        return {**counts, **failures, **times, "status_dict": {"success": samples}}
    try:
        stats = json.loads(file.read_bytes())
        count, successes = int(stats["count"]), int(stats["successes"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: not the statistics of img2dataset ({type(error).__name__}: {error}); "
            f"restore or remove it"
        ) from None
    if successes != samples:
        raise DataError(
            f"{path}: holds {samples} samples, but {file.name} says {successes} of {count}; the "
            "tar is cut short or of another run"
        )
    return stats
