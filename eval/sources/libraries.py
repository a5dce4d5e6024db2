"""Data sets of torchvision and of Hugging Face `datasets` on local disk; nothing is downloaded."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from PIL import Image

from eval.sources.base import Source, decode_file, files_hash
from loaders import texts, views
from loaders.errors import ConfigError, DataError

_LABELS = ("targets", "_labels", "labels")  # torchvision's names for the list of labels
_CAPTIONS = ("captions", "caption", "sentences", "text")


class TorchvisionSource(Source):
    """A classification class of torchvision.datasets with `classes` and a list of labels."""

    def __init__(self, name: str, root: Path, arguments: dict[str, Any]) -> None:
        """`arguments` go to the class, such as {"train": False}. Raises DataError if the files
        are not complete under `root`, ConfigError for a class that cannot serve."""
        self.what, self._root = f"torchvision.datasets.{name} in {root}", root
        self._chosen = [name, arguments]
        make = getattr(torchvision.datasets, name, None)
        if make is None:
            raise ConfigError(f"torchvision has no data set {name}")
        try:
            self._data = make(root=str(root), **arguments)
        except (RuntimeError, OSError, ModuleNotFoundError) as error:
            raise DataError(f"{self.what}: {error}") from error
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.what}: {error}; see `arguments` of the split") from error
        labels = next((getattr(self._data, n) for n in _LABELS if hasattr(self._data, n)), None)
        if labels is None or not hasattr(self._data, "classes"):
            raise ConfigError(
                f"{self.what}: has no list of labels and class names; convert it with data_prep"
            )
        self.labels = np.asarray(labels, dtype=np.int64)
        self.names = [str(name) for name in self._data.classes]

    @property
    def content_hash(self) -> str:
        # Both splits lie in one root: the arguments tell which images these are.
        facts = [files_hash(self._root), *self._chosen]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def image(self, i: int) -> Image.Image:
        try:
            return _rgb(self._data[i][0])
        except OSError as error:
            raise views.BadImage("undecodable", error) from error


class HuggingFaceSource(Source):
    """A folder of `save_to_disk`, or of parquet files, with one Image column.

    Labels are the one ClassLabel column, captions a string or list column with a usual name.
    """

    def __init__(self, folder: Path) -> None:
        """Raises DataError for a folder that `datasets` cannot read or columns that do not fit."""
        # Imported late: it takes a second, and no other source needs it.
        import datasets

        self.what, self._folder = str(folder), folder
        try:
            if (folder / "state.json").is_file():
                data = datasets.load_from_disk(str(folder))
            else:
                files = sorted(str(path) for path in folder.glob("*.parquet"))
                data = datasets.Dataset.from_parquet(files)
        except Exception as error:  # its readers raise many kinds
            raise DataError(f"{folder}: datasets cannot read it ({error})") from error
        columns = data.features
        images = [n for n, f in columns.items() if isinstance(f, datasets.Image)]
        labels = [n for n, f in columns.items() if isinstance(f, datasets.ClassLabel)]
        if len(images) != 1 or len(labels) > 1:
            raise DataError(
                f"{folder}: one Image column and at most one ClassLabel column are needed; it has "
                f"{images} and {labels}. Remove the others (Dataset.select_columns)"
            )
        self._data = data.cast_column(images[0], datasets.Image(decode=False))
        self._image = images[0]
        self._caption = next((n for n in _CAPTIONS if n in columns), None)
        self.labels = np.full(len(data), -1, dtype=np.int64)
        if labels:
            self.labels = np.array(data[labels[0]], dtype=np.int64)
            self.names = list(columns[labels[0]].names)

    @property
    def content_hash(self) -> str:
        return files_hash(self._folder)

    def image(self, i: int) -> Image.Image:
        value = self._data[i][self._image]
        if value.get("bytes") is None:
            return decode_file(Path(value["path"]))
        return views.decode(value["bytes"])

    def texts(self, i: int) -> list[str]:
        value = None if self._caption is None else self._data[i][self._caption]
        lines = value if isinstance(value, list) else [value]
        return [texts.caption_text(line, "txt") for line in lines]


def _rgb(image: Any) -> Image.Image:
    """What a torchvision data set returns as an RGB image."""
    if not isinstance(image, Image.Image):
        raise views.BadImage("undecodable", f"{type(image).__name__} instead of an image")
    return image.convert("RGB")
