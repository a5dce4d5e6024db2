"""Use webdataset tars of others as a set, without copying them: links, an index, statistics.

    python data_prep/import_shards.py '/mnt/cc12m/{00000..01242}.tar' --out data/cc12m \\
        --name cc12m --kind image_text --source 'CC12M, downloaded by ...' --license '...'

SPEC is a folder of tars, a tar, a brace range, a glob, or several joined by `::`. Nothing is
written beside the originals, which may be read-only. A `.parquet` and a `_stats.json` that
img2dataset left beside a tar are linked too. Tars that cannot be read are listed at the end, and
nothing is imported until they are mended or --skip-unreadable is given.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep import folder
from loaders.errors import ConfigError, DataError, run_cli
from loaders.manifest import KINDS
from loaders.specs import as_path, expand
from loaders.tarreader import INDEX_FOLDER, open_index

SCAN = "import"  # folder in work/ with one link a tar, beside which its index is made


@dataclass(frozen=True)
class Original:
    """A readable tar: its absolute path, the link in work/ that was indexed, its statistics."""

    path: Path
    link: Path
    stats: dict


def find_tars(spec: str) -> list[Path]:
    """Absolute paths of the tars that `spec` means, in its order; `DataError` if one is twice."""
    parts = [part for part in spec.split("::") if part]
    # abspath keeps links: a path through them is what stays valid when storage moves.
    found = [Path(os.path.abspath(tar)) for part in parts for tar in expand(part, lambda _: None)]
    repeated = [str(path) for path, times in Counter(found).items() if times > 1]
    if not found or repeated:
        raise DataError(f"{spec}: " + (f"named twice: {repeated[:5]}" if repeated else "no tar"))
    return found


def read_classes(path: Path) -> list[dict]:
    """Class table from a text file (one name a line, in id order) or a JSON with `classes`.

    Raises `DataError` if it is neither, or the ids are not 0 to n-1 in order.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix != ".json":
            return [
                {"id": i, "synset": None, "names": [n]} for i, n in enumerate(text.splitlines())
            ]
        table = [
            {"id": entry["id"], "synset": entry.get("synset"), "names": list(entry["names"])}
            for entry in json.loads(text)["classes"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a class table ({type(error).__name__}: {error}); give one name a line, "
            'or JSON {"classes": [{"id": 0, "synset": null, "names": ["cat"]}, …]}'
        ) from None
    if [entry["id"] for entry in table] != list(range(len(table))):
        raise DataError(f"{path}: class ids must be 0 to {len(table) - 1} in order")
    return table


def scan(out: Path, tars: Sequence[Path], classes: int | None) -> tuple[list[Original], list[str]]:
    """Index every tar. Returns the readable ones, and an error for each of the others.

    `classes`: number of classes that the labels must fit, None if they do not count. Raises
    `DataError` for a label that does not. Indexes stay in work/, so a killed run continues.
    """
    place = out / folder.WORK / SCAN
    place.mkdir(parents=True, exist_ok=True)
    good, errors = [], []
    for number, path in enumerate(tqdm(tars, unit="tar", desc="indexing", mininterval=1)):
        link = place / f"{folder.shard_name(number)}.tar"
        link.unlink(missing_ok=True)
        link.symlink_to(path)
        try:
            index = open_index(link)
            stats = _statistics(path, len(index))
        except (DataError, OSError) as error:
            text = str(error).replace(str(link), str(path))
            errors.append(text if str(path) in text else f"{path}: {text}")
            tqdm.write(f"unreadable: {errors[-1]}", file=sys.stderr)
            continue
        if classes is not None:
            _check_labels(path, index, classes)
        good.append(Original(path, link, stats))
    return good, errors


def _check_labels(path: Path, index: np.ndarray, classes: int) -> None:
    wrong = np.flatnonzero((index["label"] < 0) | (index["label"] >= classes))
    if len(wrong):
        row = index[wrong[0]]
        raise DataError(
            f"{path}: sample {os.fsdecode(bytes(row['key']))!r} has label {row['label']}, not one "
            f"of 0 to {classes - 1} ({len(wrong)} such samples; -1: none); give the right "
            "--classes, or --kind image_text"
        )


def _beside(path: Path, end: str) -> Path:
    """The file that img2dataset leaves beside a tar: 00000.parquet, 00000_stats.json."""
    return path.with_name(path.name.removesuffix(".tar") + end)


def _statistics(path: Path, samples: int) -> dict:
    """Statistics of a tar: those beside it, which must count as many samples, else its own."""
    beside = _beside(path, "_stats.json")
    if not beside.is_file():
        now = time.time()
        counts = {"count": samples, "successes": samples}
        failures = {"failed_to_download": 0, "failed_to_resize": 0}
        times = {"duration": 0.0, "start_time": now, "end_time": now}
        return {**counts, **failures, **times, "status_dict": {"success": samples}}
    try:
        stats = json.loads(beside.read_bytes())
        count, successes = int(stats["count"]), int(stats["successes"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{beside}: not the statistics of img2dataset ({type(error).__name__}: {error}); "
            f"restore or remove it"
        ) from None
    if successes != samples:
        raise DataError(
            f"{path}: holds {samples} samples, but {beside.name} says {successes} of {count}; the "
            "tar is cut short or of another run"
        )
    return stats


def publish(out: Path, originals: Sequence[Original]) -> None:
    """Link each tar as a finished shard, numbered in order; statistics come last.

    Raises `DataError` if a shard of an earlier run leads to another tar.
    """
    shards = out / folder.SHARDS
    names = {f"{folder.shard_name(n)}.tar": o.path for n, o in enumerate(originals)}
    for link in sorted(shards.glob("*.tar")):
        if names.get(link.name) != Path(os.readlink(link)):
            raise DataError(
                f"{link}: leads to {os.readlink(link)}, now {names.get(link.name)} has this "
                f"number: other tars are readable than before. Delete {out} and import again"
            )
    done = folder.finished(out)
    with folder.working_folder(out, 0, 1) as stage:
        for number, original in enumerate(originals):
            if number in done:
                continue
            name = folder.shard_name(number)
            beside = _beside(original.path, "_stats.json")
            files = {".tar": original.path, ".parquet": _beside(original.path, ".parquet")}
            if beside.is_file():
                files["_stats.json"] = beside
            else:
                text = json.dumps(original.stats, indent=4)
                (stage / f"{name}_stats.json").write_text(text, encoding="utf-8")
            for end, target in files.items():
                if target.is_file():
                    (stage / f"{name}{end}").symlink_to(target)
            _move_index(original.link, shards / f"{name}.tar")
            # Not folder.publish, which flushes: read-only file systems may refuse to.
            for end in (".tar", ".parquet", "_stats.json"):
                if (stage / f"{name}{end}").exists():
                    os.replace(stage / f"{name}{end}", shards / f"{name}{end}")


def _move_index(link: Path, shard: Path) -> None:
    """Give the index that was made beside `link` to the shard, so that none is made twice."""
    target = shard.parent / INDEX_FOLDER
    target.mkdir(exist_ok=True)
    for index in (link.parent / INDEX_FOLDER).glob(f"{link.name}.*.npy"):
        os.replace(index, target / (shard.name + index.name.removeprefix(link.name)))


def import_set(arguments: argparse.Namespace) -> None:
    """Link, index and count the tars. Raises `DataError` listing all that cannot be read."""
    out, kind = arguments.out, arguments.kind
    if kind == "image_label" and arguments.classes is None:
        raise ConfigError("--kind image_label needs --classes")
    classes = read_classes(arguments.classes) if arguments.classes else []
    tars = find_tars(arguments.spec)
    paths = [str(path) for path in tars]
    preparation = folder.Preparation(
        tool="data_prep/import_shards.py",
        name=arguments.name,
        kind=kind,
        source=arguments.source,
        license=arguments.license,
        date=date.today().isoformat(),
        shards=len(tars),
        samples_per_shard=1,  # this and `attempted` are known when all are indexed
        attempted=0,
        identity={
            "tars": len(paths),
            "tars_sha256": hashlib.sha256("\n".join(paths).encode()).hexdigest(),
            "classes_sha256": hashlib.sha256(json.dumps(classes).encode()).hexdigest(),
        },
    )
    stored = folder.begin(out, preparation, classes)
    if "originals" not in stored.extra or folder.missing(out):
        good, errors = scan(out, tars, len(classes) if kind == "image_label" else None)
        _refuse(out, good, errors, arguments.skip_unreadable)
        counts = [int(original.stats["count"]) for original in good]
        folder.reopen(out)
        folder.update(
            out,
            shards=len(good),
            samples_per_shard=max(counts),
            attempted=sum(counts),
            extra={"originals": [str(original.path) for original in good], "skipped": errors},
        )
        publish(out, good)
        shutil.rmtree(out / folder.WORK / SCAN)
    stored = folder.load(out)
    kept = sum(stats["successes"] for stats in folder.finished(out).values())
    print(f"{stored.shards} tars, {kept} samples; {len(stored.extra['skipped'])} tars skipped")
    print(f"next: python data_prep/verify.py {out}")


def _refuse(out: Path, good: Sequence[Original], errors: Sequence[str], skip: bool) -> None:
    """`DataError` with every unreadable tar, unless they are to be skipped; or if none is good."""
    if errors and (not skip or not good):
        listed = "".join(f"\n  {error}" for error in errors)
        advice = "mend them and run the same command again, or add --skip-unreadable"
        raise DataError(
            f"{out}: {len(errors)} of {len(good) + len(errors)} tars cannot be used:{listed}\n"
            + (advice if good else "name other tars")
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec", metavar="SPEC", help="tars of others")
    parser.add_argument("--out", type=as_path, required=True, help="folder of the data set")
    parser.add_argument("--name", required=True, help="name of the set")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--source", required=True, help="what it is and whence: recorded")
    parser.add_argument("--license", required=True, help="licence of images and texts: recorded")
    parser.add_argument("--classes", type=as_path, help="classnames.txt, or a JSON with `classes`")
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="import the rest without such tars"
    )
    import_set(parser.parse_args())


if __name__ == "__main__":
    run_cli(main)
