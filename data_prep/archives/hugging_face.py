"""Image sets of Hugging Face `datasets`: saved to disk, folders of parquet files, repositories.

Columns are found by their type. `datasets` is imported late: it loads slowly, and a command that
reads something else does without.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.sets.shard_writer import Unusable
from loaders.errors import DataError

_SAVED = ("dataset_dict.json", "state.json")
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_YES = ("1", "on", "yes", "true")


def load(root: str, config: str | None = None) -> Mapping[str, Any]:
    """The splits of a set by name; a single one that was saved without a name is called ``.

    `root`: a folder of `save_to_disk`, a folder of parquet files (SPLIT-*.parquet, or
    SPLIT/0000.parquet), or the id of a repository. `config`: configuration of a repository.
    Raises `DataError`: nothing that can be read, or a hub that cannot be reached.
    """
    import datasets

    path = Path(root)
    try:
        if path.is_dir() and any((path / name).is_file() for name in _SAVED):
            data = datasets.load_from_disk(root)
        elif path.is_dir():
            data = datasets.load_dataset("parquet", data_files=_parquet_files(path))
        else:
            data = datasets.load_dataset(root, config)
    except Exception as error:  # `datasets` raises errors of every library below it
        raise DataError(_what_failed(root, error)) from None
    return {str(data.split or ""): data} if isinstance(data, datasets.Dataset) else data


def _parquet_files(folder: Path) -> dict[str, list[str]]:
    """Parquet files of a folder by the name of their split."""
    files: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        name = file.stem.split("-")[0]  # SPLIT-00000-of-00001.parquet or SPLIT/0000.parquet
        name = file.parent.name if name.isdecimal() else name
        files.setdefault(name, []).append(str(file))
    if not files:
        raise FileNotFoundError("neither dataset_dict.json, state.json nor *.parquet")
    return files


def _what_failed(root: str, error: Exception) -> str:
    """What to say of a set that could not be loaded."""
    found = f"{root}: Hugging Face datasets cannot load it: {type(error).__name__}: {error}. "
    offline = [name for name in _OFFLINE if os.environ.get(name, "").lower() in _YES]
    if not Path(root).exists() and (offline or isinstance(error, ConnectionError)):
        why = f"is not asked ({' and '.join(offline)} set)" if offline else "cannot be reached"
        return (
            f"{found}There is no such folder, it is not in the cache, and the hub {why}. On a "
            f"machine that reaches the hub run datasets.load_dataset({root!r}).save_to_disk(DIR), "
            "copy DIR here and name it"
        )
    return (
        f"{found}Name a folder of save_to_disk, one with parquet files (SPLIT-*.parquet), or the "
        "id of a repository that is cached or can be reached"
    )


def choose(splits: Mapping[str, Any], names: Sequence[str], root: str) -> Any:
    """The first split of `names` that is there, or the one without a name; else `DataError`."""
    for name in names:
        if name in splits:
            return splits[name]
    if list(splits) == [""]:
        return splits[""]
    raise DataError(f"{root}: no split {' or '.join(names)}; there: {', '.join(splits)}")


def image_column(data: Any, root: str) -> str:
    """Name of the only column of type Image; `DataError` if there is none, or several."""
    from datasets import Image

    images = [name for name, feature in data.features.items() if isinstance(feature, Image)]
    if len(images) != 1:
        raise DataError(
            f"{root}: one column of type Image is needed, there: {images} of {data.column_names}"
        )
    return images[0]


def image_reader(data: Any, column: str, root: str) -> Callable[[int], bytes]:
    """A function that gives the encoded image of row i.

    It raises `Unusable` for a row without an image, `DataError` for a file that cannot be read.
    """
    from datasets import Image

    cells = data.select_columns([column]).cast_column(column, Image(decode=False))

    def read(i: int) -> bytes:
        cell = cells[i][column]
        if not cell or (cell["bytes"] is None and not cell["path"]):
            raise Unusable("no image")
        try:
            return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        except OSError as error:
            raise DataError(f"{root}, row {i}: {cell['path']}: {error.strerror}") from None

    return read
