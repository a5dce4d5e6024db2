"""Which sets are on disk. Needs no torch, so that commands answer at once."""

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from eval.sources.registry import EvalDataset
from loaders.errors import DataError

IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm",
}  # fmt: skip
# Names, in small letters, that systems and file servers leave in folders, beside hidden ones.
SYSTEM = {
    "__macosx", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin",
    "system volume information", "lost+found", "__pycache__", "thumbs.db", "desktop.ini",
}  # fmt: skip
# Only these read no other split than the test split.
TEST_ONLY = ("zero_shot", "retrieval")


def absent_splits(row: EvalDataset, task: str | None = None) -> list[str]:
    """Names of the splits of `row` (that `task` reads) that are not on disk."""
    needed = ["test"] if task in TEST_ONLY else list(row.splits)
    if row.source == "shards":
        return [s for s in needed if not (row.folder(s) / "manifest.json").exists()]
    if row.source == "auto":
        return [s for s in needed if recognise(row.folder(s)) is None]
    return [s for s in needed if not row.folder(s).is_dir()]


def those_present(
    rows: Sequence[EvalDataset], task: str, named: Collection[str]
) -> list[EvalDataset]:
    """Of `rows` those whose splits that `task` reads are on disk.

    Optional ones that are not there are left out, and one printed line names them all and how to
    obtain them. One that is not optional, or that the caller has `named`, raises DataError.
    """
    found, lacking = [], []
    for row in rows:
        absent = absent_splits(row, task)
        if not absent:
            found.append(row)
            continue
        how = " && ".join(dict.fromkeys(row.command(split) for split in absent))
        if row.name in named or not row.optional:
            where = row.folder(absent[0])
            raise DataError(f"{row.name}: {where} is not there; obtain it with: {how}")
        lacking.append((how, row.name))
    if lacking:
        print(f"{task} without optional sets that are not there; {obtain(lacking)}")
    return found


def obtain(pairs: Iterable[tuple[str, str]]) -> str:
    """'obtain them with: a, b: COMMAND; c: OTHER' of (command, name of a set) pairs."""
    names: dict[str, list[str]] = {}
    for command, name in pairs:
        names.setdefault(command, []).append(name)
    how = "; ".join(f"{', '.join(sets)}: {command}" for command, sets in names.items())
    return f"obtain them with: {how}"


def class_folders(folder: Path) -> list[str]:
    """Names of the subfolders, sorted; hidden ones and those of the system aside."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and meant(path.name))


def image_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Image files below `folder`, sorted, and all other files; what is hidden, or the system's, is
    in neither."""
    images, others = [], []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if meant(name)]
        for path in (Path(place, name) for name in names if meant(name)):
            (images if path.suffix.lower() in IMAGE_SUFFIXES else others).append(path)
    return sorted(images), sorted(others)


def meant(name: str) -> bool:
    """Whether a person gave a file or folder this name; not if it is hidden, or of `SYSTEM`."""
    return not name.startswith(".") and name.lower() not in SYSTEM


def recognise(folder: Path) -> str | None:
    """What `folder` holds: shards, webdataset, huggingface, folder, or None for nothing known."""
    if (folder / "manifest.json").is_file():
        return "shards"
    if not folder.is_dir():
        return None
    if any(folder.glob("*.tar")):
        return "webdataset"
    if (folder / "state.json").is_file() or any(folder.glob("*.parquet")):
        return "huggingface"
    return "folder" if class_folders(folder) else None
