"""Class folders as a source."""

from pathlib import Path

import numpy as np

from eval.sources.base import Source, decode_file, files_hash
from eval.sources.presence import class_folders, image_files
from loaders.errors import DataError


class FolderSource(Source):
    """FOLDER/CLASS/**/*.jpg: a folder per class, named by its name, synset or number."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError for a folder without class folders, and for an empty one."""
        self.what, self._folder = str(folder), folder
        self.names = class_folders(folder)
        self._files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(self.names):
            found, _ = image_files(folder / name)
            if not found:
                raise DataError(f"{folder / name}: the class folder holds no image")
            self._files += found
            labels += [label] * len(found)
        if not labels:
            raise DataError(f"{folder}: no class folders with images")
        self.labels = np.array(labels, dtype=np.int64)

    @property
    def content_hash(self) -> str:
        return files_hash(self._folder)

    def image(self, i: int):
        return decode_file(self._files[i])

    def where(self, i: int) -> str:
        return str(self._files[i])
