"""The folder of a data set while it is prepared: what it is, and which shards are finished.

    D/run.yaml           what is being prepared, and the input it comes from (`Preparation`)
    D/classes.json       class table of an image_label set
    D/list/              rows to download, as parquet
    D/shards/            finished shards only: NNNNN.tar, NNNNN_stats.json, downloads also .parquet;
                         no tar for a shard of which every download failed
    D/work/              unfinished shards; may be deleted while nothing runs
    D/verify/            what verify.py found, a file per shard
    D/bad_samples.tsv    single samples that cannot be used, listed by verify.py
    D/quarantine/        unreadable shards that verify.py took away
    D/manifest.json      written by verify.py, which closes the set

A shard is finished when its `_stats.json` is there. It is written last, after the tar has been
flushed and renamed, so a kill at any moment leaves finished shards and scraps in `work/`.
Statistics have img2dataset's keys (count, successes, failed_to_download, failed_to_resize,
duration, start_time, end_time, status_dict).
"""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from data_prep.sets import differences
from data_prep.sets.atomic_files import FULL as FULL
from data_prep.sets.atomic_files import flush, replace_file, write_once
from loaders.errors import ConfigError, DataError

RUN = "run.yaml"
CLASSES = "classes.json"
SHARDS = "shards"
WORK = "work"
LIST = "list"
QUARANTINE = "quarantine"
SIZES = "sizes.json"
MANIFEST = "manifest.json"
_STATS = re.compile(r"(\d{5,})_stats\.json")


@dataclass(frozen=True)
class Preparation:
    """What `run.yaml` says. `identity` must not change while the set is unfinished: the hash of
    the input and every parameter that decides which sample lands in which shard."""

    tool: str  # command that made it, e.g. data_prep/gcc.py
    name: str
    kind: str  # image_label or image_text
    source: str
    license: str
    date: str  # of the start, YYYY-MM-DD
    shards: int  # planned number; a retry of failed rows adds to it
    samples_per_shard: int
    attempted: int  # rows or images that are tried
    identity: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # goes into the manifest


def begin(out: Path, preparation: Preparation, classes: Sequence[dict] = ()) -> Preparation:
    """Start or continue the set in `out`; returns what its `run.yaml` holds.

    `classes`: dicts with id, synset, names, in id order. Raises `DataError` if the folder holds
    another set (what differs is said in words) or files that no preparation made.
    """
    path, table = out / RUN, [dict(entry) for entry in classes]
    if not path.is_file():
        check_folder(out)
        (out / SHARDS).mkdir(parents=True, exist_ok=True)
        if table:
            replace_file(out / CLASSES, json.dumps(table, ensure_ascii=False, indent=0))
        write_once(path, _dump(preparation))  # last: from here on the set is begun
    stored, held, wanted = load(out), load_classes(out), json.loads(json.dumps(table))
    old, new = ({"name": p.name, "kind": p.kind, **p.identity} for p in (stored, preparation))
    if old != new:
        what = "; ".join(differences.describe(old, new, held, wanted))
        raise DataError(
            f"{out}: holds another set ({what}); its shards would be mixed with other rows. Use "
            "the same input and options, or another folder"
        )
    if held != wanted:
        raise DataError(
            f"{out / CLASSES}: not the class table of this set; its labels would change their "
            "meaning. Restore the file, or begin anew in another folder"
        )
    return stored


def check_folder(out: Path) -> None:
    """Raise `DataError` if `out` holds files that no preparation made.

    What is left of a start that was killed, or written by one that runs now, is none of those.
    """
    if not out.exists() or (out / RUN).is_file():
        return
    if not out.is_dir():
        raise DataError(f"{out}: is a file; name a folder")
    strange = [p.name for p in out.iterdir() if p.name not in (LIST, WORK, CLASSES, SHARDS)]
    strange += [f"{SHARDS}/{p.name}" for p in (out / SHARDS).glob("*")]
    strange = [name for name in strange if not name.startswith(".")]  # temporary files
    # Looked at again, because another process may have begun the set in between.
    if strange and not (out / RUN).is_file():
        raise DataError(
            f"{out}: not empty ({', '.join(sorted(strange)[:5])}) and no {RUN}: not the folder of "
            "a data set that this tool began; name an empty folder"
        )


def load(out: Path) -> Preparation:
    """Read `run.yaml`; `DataError` if there is none or it is not one."""
    path = out / RUN
    try:
        return Preparation(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file, so this is not a folder of data_prep; for tars of others use "
            "data_prep/import_shards.py"
        ) from None
    except (yaml.YAMLError, TypeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not what data_prep wrote ({error}); restore it") from None


def update(out: Path, **changes: Any) -> Preparation:
    """Change fields of `run.yaml` (atomically); returns the new state."""
    preparation = replace(load(out), **changes)
    replace_file(out / RUN, _dump(preparation))
    return preparation


def load_classes(out: Path) -> list[dict]:
    """Class table of the set, empty if it has none."""
    path = out / CLASSES
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); restore it") from None


def shard_name(shard: int) -> str:
    """Base name of a shard: five digits, as img2dataset writes."""
    return f"{shard:05d}"


def sample_key(shard: int, row: int, samples_per_shard: int) -> str:
    """Key of row `row` of a shard, as img2dataset forms it (nine digits at 10,000 a shard)."""
    digits = len(str(samples_per_shard - 1)) if samples_per_shard > 1 else 0
    return f"{shard * 10**digits + row:0{5 + digits}d}"


def finished(out: Path) -> dict[int, dict]:
    """Statistics of the finished shards, by shard number."""
    found = {}
    for path in (out / SHARDS).glob("*_stats.json"):
        match = _STATS.fullmatch(path.name)
        stats = _statistics(path, path.with_name(f"{match[1]}.tar")) if match else None
        if stats is not None:
            found[int(match[1])] = stats
    return dict(sorted(found.items()))


def _statistics(path: Path, tar: Path) -> dict | None:
    """Statistics of a shard, None if it is not finished."""
    try:
        stats = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None  # cut short: the shard is made again
    if not (isinstance(stats, dict) and "successes" in stats):
        return None
    return stats if stats["successes"] == 0 or tar.exists() else None


def missing(out: Path, part: int = 0, parts: int = 1) -> list[int]:
    """Planned shards of a part that are not finished. Part p of n has the shards s = p mod n."""
    done = finished(out)
    return [s for s in range(load(out).shards) if s % parts == part and s not in done]


def say_next(out: Path) -> None:
    """Print what the person does next: wait for shards of other parts, and close the set."""
    if left := len(missing(out)):
        print(f"{left} shards of other parts are not finished yet; when they are,")
    print(f"next: python data_prep/verify.py {out}")


def publish(out: Path, shard: int, stage: Path) -> None:
    """Move a complete shard from the folder `stage` to `shards/`, its statistics last.

    A tar without a sample is dropped: our index refuses it, and so does Hugging Face's `datasets`
    where it is the first. Every file is flushed to disk before it gets its name. A
    shard that is already finished is kept, and the new copy dropped.
    """
    names = [f"{shard_name(shard)}{end}" for end in (".parquet", ".tar", "_stats.json")]
    _drop_empty_tar(stage / names[1], stage / names[2])
    present = [name for name in names if (stage / name).exists()]
    _, tar, stats = (out / SHARDS / name for name in names)
    if _statistics(stats, tar) is not None:
        for name in present:
            (stage / name).unlink()
        return
    for name in present:
        flush(stage / name)
    for name in present:
        os.replace(stage / name, out / SHARDS / name)
    flush(out / SHARDS)


def _drop_empty_tar(tar: Path, stats: Path) -> None:
    """Remove a tar that holds nothing, if its statistics say so too."""
    with suppress(FileNotFoundError), open(tar, "rb") as file:
        if not any(file.read(512)) and (_statistics(stats, tar) or {}).get("successes") == 0:
            tar.unlink()


def reopen(out: Path) -> None:
    """Remove what closed the set (manifest and sizes), because shards are going to be added."""
    for path in (out / MANIFEST, out / SHARDS / SIZES):
        path.unlink(missing_ok=True)


@contextmanager
def working_folder(out: Path, part: int, parts: int) -> Iterator[Path]:
    """An empty folder for the unfinished shards of one part, held by this process alone.

    Raises `DataError` if another process prepares the same part.
    """
    folder = out / WORK / f"{part:05d}-of-{parts:05d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise DataError(
                f"{out}: another process is preparing part {part} of {parts}; wait for it, or "
                "stop it (the same command then continues)"
            ) from None
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def disk_full(out: Path, part: int = 0, parts: int = 1, staged: int = 0) -> DataError:
    """What to say when the disk is full: finished shards are valid, and how much is needed.

    `staged`: bytes that a shard is expected to take, the estimate while none is finished.
    """
    done = finished(out)
    tars = [out / SHARDS / f"{shard_name(shard)}.tar" for shard in done]
    sizes = [tar.stat().st_size for tar in tars if tar.exists()]
    mean = sum(sizes) / len(sizes) if sizes else staged
    left = len(missing(out, part, parts))
    free = shutil.disk_usage(out).free
    return DataError(
        f"{out}: the disk is full. {len(done)} shards are finished and valid; {left} are missing "
        f"and need about {left * mean / 1e9:.3f} GB{'' if sizes else ' or more'}, {free / 1e9:.3f} "
        "GB are free. Make room and run the same command again"
    )


def check_part(part: int, parts: int) -> None:
    """Raise `ConfigError` unless 0 <= part < parts."""
    if not 0 <= part < parts:
        raise ConfigError(f"--part {part} --parts {parts}: parts are numbered 0 to {parts - 1}")


def check_shard_size(samples_per_shard: int) -> None:
    """Raise `ConfigError` for shards of no sample."""
    if samples_per_shard < 1:
        raise ConfigError(f"--samples-per-shard {samples_per_shard}: must be at least 1")


def _dump(preparation: Preparation) -> str:
    return yaml.safe_dump(asdict(preparation), sort_keys=False, allow_unicode=True)
