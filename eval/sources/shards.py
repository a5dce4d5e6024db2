"""Tar shards as a source: this repository's sets, and webdatasets as CLIP_benchmark reads them."""

import hashlib
import json
from pathlib import Path

import numpy as np

from eval.sources.base import Source, files_hash
from loaders import manifest, texts, views
from loaders.errors import DataError
from loaders.plain_text import read_text


class ShardSource(Source):
    """A folder with `manifest.json`.

    Several labels per image are read from the key `labels` of the samples' `.json`, several
    captions from its key `captions`, else from the lines of `.txt`.
    """

    states_ids = True

    def __init__(self, folder: Path, multilabel: bool = False, kind: str | None = None) -> None:
        """`kind` is that of `manifest.open_shards`: `image_text` takes labels without names too.

        Raises DataError as `manifest.open_shards` does, and for samples without labels.
        """
        self.what = str(folder)
        self.shards = manifest.open_shards(str(folder), kind=kind)
        self.labels = np.asarray(self.shards.labels)
        if self.shards.classes:
            self.names = [entry.names[0].strip() for entry in self.shards.classes]
        if multilabel:
            self.targets = self._targets()

    @property
    def content_hash(self) -> str:
        # The fingerprint alone knows names and sizes of the tars only.
        tars = [self.shards.fingerprint, *(str(shard.sha256) for shard in self.shards.shards)]
        return hashlib.sha256(json.dumps(tars).encode()).hexdigest()

    def image(self, i: int):
        return views.decode(self.shards.read_image(i))

    def texts(self, i: int) -> list[str]:
        try:
            content = self.shards.read_json(i)
        except ValueError:
            raise texts.BadText("bad_json") from None
        if content and isinstance(content.get("captions"), list):
            lines = [texts.caption_text(line, "txt") for line in content["captions"]]
        else:
            lines = texts.read_caption(self.shards, i, "txt").splitlines()
        if not lines:
            raise texts.BadText("no_caption")
        return [line.strip() for line in lines if line.strip()]

    def where(self, i: int) -> str:
        return f"{self.shards.shard_of(i)}, key {self.shards.key(i)}"

    def _targets(self) -> np.ndarray:
        targets = np.zeros((len(self.labels), len(self.names or [])), dtype=bool)
        for i in range(len(self.labels)):
            try:
                content = self.shards.read_json(i) or {}
            except ValueError as error:
                raise DataError(f"{self.where(i)}: .json cannot be read ({error})") from None
            labels = content.get("labels")
            if not isinstance(labels, list) or not all(
                isinstance(c, int) and 0 <= c < targets.shape[1] for c in labels
            ):
                raise DataError(
                    f"{self.where(i)}: .json needs a list `labels` with class ids from 0 to "
                    f"{targets.shape[1] - 1}, it has {labels!r}"
                )
            targets[i, labels] = True
        return targets


class WebdatasetSource(ShardSource):
    """Tars `ROOT/SPLIT/*.tar` with `ROOT/classnames.txt`, `zeroshot_classification_templates.txt`
    and `dataset_type.txt`: the layout of CLIP_benchmark 1.6.2, datasets/builder.py. A
    `classnames.txt` beside the tars is that of the split, as `manifest.open_shards` has it."""

    states_ids = False

    def __init__(self, folder: Path, multilabel: bool = False, kind: str | None = None) -> None:
        """`folder` is ROOT/SPLIT. Raises DataError for several labels per image (`.npy`)."""
        stated = _lines(folder.parent / "dataset_type.txt")
        if multilabel or stated == ["multilabel"]:
            raise DataError(
                f"{folder}: labels in .npy files are not read; convert the set with data_prep"
            )
        super().__init__(folder, kind=kind)
        self._root = folder
        templates = _lines(folder.parent / "zeroshot_classification_templates.txt")
        if templates:
            self.templates = [template.replace("{c}", "{}") for template in templates]

    @property
    def content_hash(self) -> str:
        return files_hash(self._root)  # such tars come without checksums


def _lines(path: Path) -> list[str] | None:
    """Lines of a text file without surrounding space; None if there is no such file."""
    if not path.is_file():
        return None
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]
