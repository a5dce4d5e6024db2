"""Which sets are on disk. Needs no torch, so that commands answer at once."""

from pathlib import Path

from eval.sources.registry import EvalDataset
from loaders.errors import DataError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}
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


def present(row: EvalDataset, task: str | None = None, required: bool = False) -> bool:
    """Whether the splits of `row` that `task` reads are on disk.

    Absent and optional: prints how to obtain it and returns False. Absent and `required` or not
    optional: raises DataError.
    """
    absent = absent_splits(row, task)
    if not absent:
        return True
    message = f"{row.name}: {row.folder(absent[0])} is not there; obtain it with: "
    message += " && ".join(dict.fromkeys(row.command(split) for split in absent))
    if required or not row.optional:
        raise DataError(message)
    print(f"skipped {message}")
    return False


def class_folders(folder: Path) -> list[str]:
    """Names of the subfolders, sorted; hidden ones aside."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


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
