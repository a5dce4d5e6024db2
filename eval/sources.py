"""From a row of `datasets.yaml` to images, labels and texts."""

import difflib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.utils.data import Dataset

from loaders import manifest, texts, views
from loaders.errors import ConfigError, DataError

REPOSITORY = Path(__file__).resolve().parents[1]
REGISTRY = Path(__file__).with_name("datasets.yaml")


@dataclass(frozen=True)
class EvalDataset:
    """One row of the registry; the keys are explained at the head of `datasets.yaml`."""

    name: str
    source: str
    splits: dict[str, dict]
    tasks: dict[str, list[str]]
    classes: int | None
    templates: str | None
    labelled_only: bool
    resize_ratio: float
    optional: bool
    obtain: str

    def folder(self, split: str) -> Path:
        """Folder of the shards of `split`; relative paths start at the repository root."""
        return REPOSITORY / self.splits[split]["path"]


class Registry:
    """The rows and collections of a registry file."""

    def __init__(self, path: Path | str = REGISTRY):
        """Read the YAML at `path`; a row with a missing or unknown key raises DataError."""
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        self.collections: dict[str, list[str]] = content["collections"]
        self.datasets: dict[str, EvalDataset] = {}
        for name, row in content["datasets"].items():
            try:
                self.datasets[name] = EvalDataset(name=name, **row)
            except TypeError as error:
                raise DataError(f"{path}: row {name}: {error}") from None
            if row["source"] != "shards":
                raise DataError(f"{path}: row {name}: unknown source {row['source']!r}")

    def select(self, names: list[str], task: str) -> list[EvalDataset]:
        """Rows of the named sets and collections that have `task`, in the registry's order.

        Raises ConfigError for an unknown name, and for a set named directly that lacks the task.
        """
        wanted: set[str] = set()
        for name in names:
            if name in self.collections:
                wanted.update(d for d in self.collections[name] if task in self.datasets[d].tasks)
            elif name not in self.datasets:
                known = [*self.collections, *self.datasets]
                near = difflib.get_close_matches(name, known, n=1) or [", ".join(known)]
                raise ConfigError(f"unknown data set {name!r}; did you mean {near[0]}?")
            elif task not in self.datasets[name].tasks:
                has = ", ".join(self.datasets[name].tasks)
                raise ConfigError(f"data set {name} has no task {task}; it has {has}")
            else:
                wanted.add(name)
        return [row for name, row in self.datasets.items() if name in wanted]


class EvalSplit(Dataset):
    """Images of one split, each uint8 (3, crop, crop), with their labels and texts."""

    def __init__(self, row: EvalDataset, split: str, crop: int):
        """Open the shards of `row` and `split`; `crop` is the model's image size in pixels.

        Raises DataError when the number of samples is not the registry's.
        """
        self.row, self.split, self.crop = row, split, crop
        self.shards = manifest.open_shards(str(row.folder(split)))
        labels = np.asarray(self.shards.labels)
        self.indices = np.flatnonzero(labels >= 0) if row.labelled_only else np.arange(len(labels))
        self.labels = labels[self.indices]
        self.resize = round(crop * row.resize_ratio)
        self._transform = views.build_eval(self.resize, crop)
        expected = row.splits[split]["samples"]
        if expected is not None and len(self) != expected:
            kind = "labelled samples" if row.labelled_only else "samples"
            raise DataError(
                f"{row.name}, split {split}: {row.folder(split)} holds {len(self)} {kind}, "
                f"the registry (eval/datasets.yaml) expects {expected}; make the set again: "
                f"{row.obtain}"
            )

    @property
    def content_hash(self) -> str:
        """SHA-256 over the shards, by content, and the choice of samples."""
        # The fingerprint alone knows names and sizes of the tars only.
        tars = [self.shards.fingerprint, *(str(shard.sha256) for shard in self.shards.shards)]
        return hashlib.sha256(json.dumps([tars, self.indices.tolist()]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self._transform(self.image(i))

    def image(self, i: int):
        """Sample `i` as a PIL image (RGB). An unreadable one raises DataError: n must hold."""
        index = int(self.indices[i])
        try:
            return views.decode(self.shards.read_image(index))
        except (manifest.MissingMember, views.BadImage) as error:
            raise DataError(f"{self._where(index)}: unreadable image ({error})") from error

    def text(self, i: int) -> str:
        """Caption of sample `i`; a missing, empty or undecodable one raises DataError."""
        index = int(self.indices[i])
        try:
            return texts.read_caption(self.shards, index, "txt")
        except texts.BadText as error:
            raise DataError(f"{self._where(index)}: {error.reason}, retrieval needs one") from error

    def _where(self, index: int) -> str:
        return f"{self.row.name}: {self.shards.shard_of(index)}, key {self.shards.key(index)}"

    def class_names(self) -> tuple[np.ndarray, list[str]]:
        """Ids of the classes that occur (K,), ascending, and the first name of each.

        Raises DataError when K is not the registry's or a label has no entry in the manifest.
        """
        ids = np.unique(self.labels)
        if self.row.classes is not None and len(ids) != self.row.classes:
            raise DataError(
                f"{self.row.name}, split {self.split}: {len(ids)} classes occur, the registry "
                f"(eval/datasets.yaml) expects {self.row.classes}"
            )
        table = {entry.id: entry.names[0] for entry in self.shards.classes}
        missing = [int(i) for i in ids if int(i) not in table]
        if missing:
            raise DataError(f"{self.row.name}: no class names for the ids {missing} in manifest")
        return ids, [table[int(i)] for i in ids]

    def distinct_texts(self) -> tuple[list[str], np.ndarray]:
        """Distinct captions in order of appearance and, per image, its caption's index (n,).

        Captions that differ in case or spacing only are one: the tokenizer cannot tell them
        apart, and as two texts they would tie with each other.
        """
        first: dict[str, int] = {}
        distinct: list[str] = []
        owner = np.empty(len(self), dtype=np.int64)
        for i in range(len(self)):
            text = self.text(i)
            folded = " ".join(text.split()).casefold()
            if folded not in first:
                first[folded] = len(distinct)
                distinct.append(text)
            owner[i] = first[folded]
        return distinct, owner


def absent_splits(row: EvalDataset) -> list[str]:
    """Names of the splits of `row` that are not on disk."""
    return [split for split in row.splits if not (row.folder(split) / "manifest.json").exists()]


def present(row: EvalDataset) -> bool:
    """Whether all splits of `row` are on disk.

    Absent and optional: prints how to obtain it and returns False. Absent and not optional:
    raises DataError.
    """
    absent = absent_splits(row)
    if not absent:
        return True
    message = f"{row.name}: {row.folder(absent[0])} is not there; obtain it with: {row.obtain}"
    if not row.optional:
        raise DataError(message)
    print(f"skipped {message}")
    return False
