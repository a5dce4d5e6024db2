"""Use webdataset tars of others as a set, without copying them: links, an index, statistics.

    python data_prep/import_shards.py '/mnt/cc12m/{00000..01242}.tar' --out data/cc12m \\
        --license '...'

SPEC is a folder of tars, a tar, a brace range, a glob, or several joined by `::`. Nothing is
written beside the originals, which may be read-only. A `.parquet` and a `_stats.json` that
img2dataset left beside a tar are linked too. Tars that cannot be read are listed at the end, and
nothing is imported until they are mended or --skip-unreadable is given.

What is not stated is found, and said: the classes (`classnames.txt` beside the tars or one folder
above, or the manifest of a set), the kind (image_label if every sample has a class number and the
classes have names), the name (of the folder --out), the source (the folders of the tars).
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.archives.import_about import Stated, find_kind, find_stated
from data_prep.archives.import_scan import (
    SCAN,
    Original,
    beside,
    check_labels,
    count_contents,
    scan,
)
from data_prep.sets import set_folder
from loaders.errors import ConfigError, DataError, run_cli
from loaders.manifest import KINDS
from loaders.specs import as_path, expand
from loaders.tarreader import INDEX_FOLDER

DERIVED = ("name", "source", "license")


def find_tars(spec: str) -> list[Path]:
    """Absolute paths of the tars that `spec` means, in its order; `DataError` if one is twice."""
    parts = [part for part in spec.split("::") if part]
    # abspath keeps links: a path through them is what stays valid when storage moves.
    found = [Path(os.path.abspath(tar)) for part in parts for tar in expand(part, lambda _: None)]
    repeated = [str(path) for path, times in Counter(found).items() if times > 1]
    if not found or repeated:
        raise DataError(f"{spec}: " + (f"named twice: {repeated[:5]}" if repeated else "no tar"))
    return found


def publish(out: Path, originals: Sequence[Original]) -> None:
    """Link each tar as a finished shard, numbered in order; statistics come last.

    Raises `DataError` if a shard of an earlier run leads to another tar.
    """
    shards = out / set_folder.SHARDS
    names = {f"{set_folder.shard_name(n)}.tar": o.path for n, o in enumerate(originals)}
    for link in sorted(shards.glob("*.tar")):
        if names.get(link.name) != Path(os.readlink(link)):
            raise DataError(
                f"{link}: leads to {os.readlink(link)}, now {names.get(link.name)} has this "
                f"number: other tars are readable than before. Delete {out} and import again"
            )
    done = set_folder.finished(out)
    with set_folder.working_folder(out, 0, 1) as stage:
        for number, original in enumerate(originals):
            if number in done:
                continue
            name = set_folder.shard_name(number)
            stated = beside(original.path, "_stats.json")
            files = {".tar": original.path, ".parquet": beside(original.path, ".parquet")}
            if stated.is_file():
                files["_stats.json"] = stated
            else:
                text = json.dumps(original.stats, indent=4)
                (stage / f"{name}_stats.json").write_text(text, encoding="utf-8")
            for end, target in files.items():
                if target.is_file():
                    (stage / f"{name}{end}").symlink_to(target)
            _move_index(original.link, shards / f"{name}.tar")
            # Not set_folder.publish, which flushes: read-only file systems may refuse to.
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
    """Link, index and count the tars. Raises `DataError` listing all that cannot be read.

    Whatever reading tells is known before the set is begun: a refused import leaves nothing but
    indexes in work/, and another one may take the folder.
    """
    out = arguments.out
    set_folder.check_folder(out)
    tars = find_tars(arguments.spec)
    stated = find_stated(arguments, tars)
    begun = set_folder.load(out) if (out / set_folder.RUN).is_file() else None
    if begun:
        stated = replace(stated, name=arguments.name or begun.name)
        _refuse_other_tars(out, begun, [str(path) for path in tars])
    good, errors = [], []
    wanted = begun is None or "originals" not in begun.extra or bool(set_folder.missing(out))
    if wanted:
        good, errors = scan(out, tars)
        if not good and begun is None:
            _remove_scan(out)
        _refuse(out, good, errors, arguments.skip_unreadable)
    kind, why = (begun.kind, "as begun") if begun else find_kind(stated, count_contents(good))
    kind = arguments.kind or kind
    if kind == "image_label" and not stated.classes:
        raise ConfigError("--kind image_label needs --classes, or a classnames.txt beside the tars")
    if kind == "image_label":
        check_labels(good, len(stated.classes))
    if begun is None:
        _say_what_was_found(arguments, stated, kind, why)
    classes = stated.classes if kind == "image_label" or arguments.classes else []
    preparation = _plan(stated, kind, tars, classes)
    set_folder.begin(out, preparation, classes)
    if wanted:
        counts = [int(original.stats["count"]) for original in good]
        set_folder.reopen(out)
        set_folder.update(
            out,
            shards=len(good),
            samples_per_shard=max(counts),
            attempted=sum(counts),
            extra={"originals": [str(original.path) for original in good], "skipped": errors},
        )
        publish(out, good)
        _remove_scan(out)
    stored = set_folder.load(out)
    kept = sum(stats["successes"] for stats in set_folder.finished(out).values())
    print(f"{stored.shards} tars, {kept} samples; {len(stored.extra['skipped'])} tars skipped")
    print(f"next: python data_prep/verify.py {out}")


def _remove_scan(out: Path) -> None:
    """Remove the links and indexes of the scan, and folders that hold nothing else."""
    shutil.rmtree(out / set_folder.WORK / SCAN)
    for place in (out / set_folder.WORK, out):
        with suppress(OSError):  # not empty
            place.rmdir()


def _plan(stated: Stated, kind: str, tars: Sequence[Path], classes: list[dict]):
    """The `Preparation`, but for what is known of the readable tars alone."""
    paths = "\n".join(map(str, tars))
    return set_folder.Preparation(
        tool="data_prep/import_shards.py",
        name=stated.name,
        kind=kind,
        source=stated.source,
        license=stated.license,
        date=date.today().isoformat(),
        shards=len(tars),
        samples_per_shard=1,
        attempted=0,
        identity={
            "tars": len(tars),
            "tars_sha256": hashlib.sha256(paths.encode()).hexdigest(),
            "classes_sha256": hashlib.sha256(json.dumps(classes).encode()).hexdigest(),
        },
    )


def _say_what_was_found(arguments: argparse.Namespace, stated: Stated, kind: str, why: str) -> None:
    """Print what was not stated, and what it was taken from."""
    for flag, value in (("kind", kind), *((k, getattr(stated, k)) for k in DERIVED)):
        if getattr(arguments, flag) is None:
            print(f"--{flag} not given: {value}" + (f" ({why})" if flag == "kind" else ""))
    if kind == "image_label" and arguments.classes is None:
        print(f"--classes not given: {len(stated.classes)} classes of {stated.classes_from}")


def _refuse_other_tars(out: Path, begun: set_folder.Preparation, tars: Sequence[str]) -> None:
    """`DataError`, naming tars, if the set was begun from others."""
    digest = hashlib.sha256("\n".join(tars).encode()).hexdigest()
    before = begun.identity.get("tars_sha256")
    if before == digest:
        return
    there = begun.extra.get("originals", [])
    only = [("there", set(there) - set(tars)), ("now", set(tars) - set(there))]
    said = [f"only {when}: {', '.join(sorted(p)[:3])}" for when, p in only if p]
    raise DataError(
        f"{out}: holds another set (tars: {begun.identity.get('tars')} there, {len(tars)} now; "
        f"{'; '.join(said) or 'the same in another order'}). Name the same tars, or another folder"
    )


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
    parser.add_argument("--name", help="name of the set (default: that of the folder --out)")
    parser.add_argument("--kind", choices=KINDS, help="default: by the class numbers of the tars")
    parser.add_argument("--source", help="what it is and whence: recorded (default: the folders)")
    parser.add_argument("--license", help="licence of images and texts: recorded")
    parser.add_argument(
        "--classes",
        type=as_path,
        help="one name a line, or a JSON with `classes` (default: classnames.txt beside the tars)",
    )
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="import the rest without such tars"
    )
    import_set(parser.parse_args())


if __name__ == "__main__":
    run_cli(main)
