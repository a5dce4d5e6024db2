"""Images in class folders of any depth: the class of an image is the path of its folder.

DIR/dog/1.jpg is of class `dog`, and DIR/animals/dog/1.jpg of class `animals/dog`. What operating
systems and programs leave in folders is passed over, and counted.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.archives.image_table import ROW, Images, open_indexed
from loaders.errors import DataError
from loaders.progress import Progress

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm",
)  # fmt: skip
# Names, in small letters, that no person gave: of Windows, macOS, file servers and Linux. Those
# that begin with a dot are hidden everywhere and need not stand here.
SYSTEM = frozenset(
    (
        "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "folder.htt", "autorun.inf",
        "$recycle.bin", "recycler", "system volume information", "found.000",
        "__macosx", "icon\r", "network trash folder", "temporary items",
        "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "@recently-snapshot",
        "lost+found", "__pycache__",
    )
)  # fmt: skip
_STREAMS = (":zone.identifier", "@synoeastream", "@synoresource")  # of a file with this name before
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
OTHER = "files without the name of an image"
LINKS = "links to nothing, and special files"
_GROUPS = 1 << 16  # as many as `image_table.ROW` can number


def open_class_folders(source: Path, out: Path) -> Images:
    """Index of the class folders in `source`, kept with the set `out` until a folder changes.

    Groups are the classes, sorted by their paths as bytes, and images are sorted by name in each.
    Raises `DataError` for a folder without images, images outside of class folders, the folders of
    several splits, and as `image_table.open_indexed`.
    """
    return open_indexed(source, out, index, _state)


def index(source: Path) -> Images:
    """`open_class_folders` without keeping anything."""
    passed: Counter = Counter()
    others: list[str] = []
    walked = _show(source, _walk(source, "", frozenset(), passed, others))
    with_images = (folder for folder in walked if folder[2])
    folders = sorted(with_images, key=lambda folder: os.fsencode(folder[0]))
    _check_groups(source, [(group, len(files)) for group, _, files in folders])
    rows, names, digest = [], [], hashlib.sha256()
    for number, (group, container, files) in enumerate(
        Progress(folders, unit="folder", desc=f"index {source.name}")
    ):
        images = sorted((os.fsencode(name), _size(container, name)) for name in files)
        for name, size in images:
            digest.update(b"%b/%b %d\n" % (group.encode(), name, size))
        rows.append(np.array([(number, -1, size) for _, size in images], ROW))
        names.append(np.array([name for name, _ in images], "S"))
    return Images(
        groups=tuple(group for group, _, _ in folders),
        containers=tuple(str(container) for _, container, _ in folders),
        misplaced=(0,) * len(folders),
        rows=np.concatenate(rows),
        names=np.concatenate(names),
        digest=digest.hexdigest(),
        ignored=tuple(others),
        passed_over=dict(passed.most_common()),
    )


def _show(source: Path, walked: Iterator) -> Iterator:
    """Progress, where the walk takes longer than a second."""
    return Progress(walked, unit="folder", desc=f"looking at {source.name}", after=1)


def _walk(
    folder: Path, group: str, above: frozenset, passed: Counter, others: list[str]
) -> Iterator[tuple[str, Path, list[str]]]:
    """(path below the source, folder, names of its images) of the source and all folders below it.

    Links to folders are followed unless they lead back up. `passed` counts what is left out, and
    `others` gets the first ten files that people may have meant as images.
    """
    here = _stat(folder)
    identity = (here.st_dev, here.st_ino)
    if identity in above:
        passed["links that lead back to a folder above"] += 1
        return
    files = []
    for entry in _scan(folder):
        path = f"{group}/{entry.name}" if group else entry.name
        if what := system_name(entry.name):
            passed[what] += 1
        elif entry.is_dir():
            yield from _walk(Path(entry.path), path, above | {identity}, passed, others)
        elif not entry.is_file():
            passed[LINKS] += 1
        elif entry.name.lower().endswith(SUFFIXES):
            files.append(entry.name)
        else:
            passed[OTHER] += 1
            others += [path] if len(others) < 10 else []
    yield group, folder, files


def system_name(name: str) -> str | None:
    """What a hidden or system file or folder is counted as, None for any other."""
    small = name.lower()
    if small.startswith("._"):
        return "._*"
    if small.startswith(".") and small.removeprefix(".") not in ("", "ds_store"):
        return name if small.startswith((".ipynb_", ".trash", ".thumb", ".apple")) else ".*"
    if small == ".ds_store" or small in SYSTEM:
        return name.strip()
    return next((f"*{end}" for end in _STREAMS if small.endswith(end)), None)


def _scan(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; make the folder readable") from None


def _stat(path: str | Path) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; is something writing to the folder?") from None


def _size(container: Path, name: str) -> int:
    path = os.path.join(container, name)
    size = _stat(path).st_size
    if size >= 1 << 32:
        raise DataError(f"{path}: over 4 GiB: not an image; move it elsewhere")
    return size


def _check_groups(source: Path, groups: list[tuple[str, int]]) -> None:
    """Raise `DataError` unless there are images, all of them in folders that can be classes.

    `groups`: path and number of images of each folder that holds some, in their order.
    """
    if not groups:
        raise DataError(
            f"{source}: no image in it or below it (names that end in {', '.join(SUFFIXES)}); "
            "name the folder that holds the class folders"
        )
    if len(groups) > _GROUPS:
        raise DataError(f"{source}: {len(groups)} folders with images; at most {_GROUPS} can be")
    if groups[0][0] == "":
        raise DataError(
            f"{source}: {groups[0][1]} images lie in it without a class folder; move them into "
            "the folders of their classes, or list them in a table: data_prep/own.py list"
        )
    tops = sorted({group.split("/")[0] for group, _ in groups})
    if all(top.lower() in SPLITS for top in tops):
        raise DataError(
            f"{source}: holds {', '.join(tops)}: these are splits, not classes; name the folder of "
            f"one, such as {source / tops[0]}, and make a set of each"
        )
    for group, _ in groups:
        try:
            group.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{source}: the folder {group!r} is not named in UTF-8; rename it"
            ) from None


def _state(source: Path) -> str:
    """What changes when a file is added, removed or renamed: the times of all folders."""
    walked = _show(source, _walk(source, "", frozenset(), Counter(), []))
    folders = {str(folder) for _, folder, _ in walked}
    facts = [(os.fsencode(path), _stat(path).st_mtime_ns) for path in sorted(folders)]
    return hashlib.sha256(repr((str(source.resolve()), facts)).encode()).hexdigest()
