"""From a row of `datasets.yaml` to images, labels and texts."""

import hashlib
import json
import pkgutil
from collections import Counter

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

from eval.sources import base
from eval.sources.base import Source
from eval.sources.folder import FolderSource
from eval.sources.libraries import HuggingFaceSource, TorchvisionSource
from eval.sources.presence import recognise
from eval.sources.registry import EvalDataset
from eval.sources.shards import ShardSource, WebdatasetSource
from loaders import manifest, texts, views
from loaders.errors import DataError


def open_source(row: EvalDataset, split: str) -> Source:
    """The source of a split. Raises DataError for what is not there or not readable."""
    folder, kind = row.folder(split), row.source
    if kind.startswith("torchvision:"):
        arguments = row.splits[split].get("arguments", {})
        return TorchvisionSource(kind.partition(":")[2], folder, arguments)
    if kind == "auto":
        kind = recognise(folder)
    # Names given by a person need none in the tars, which a set of labels alone must have.
    forced = "image_text" if row.class_names else None
    if kind == "shards":
        return ShardSource(folder, row.multilabel, forced)
    if kind == "webdataset":
        return WebdatasetSource(folder, row.multilabel, forced)
    if row.multilabel and kind is not None:
        raise DataError(f"{folder}: several labels per image are read from shards only")
    if kind == "huggingface":
        return HuggingFaceSource(folder)
    if kind == "folder":
        return FolderSource(folder)
    raise DataError(
        f"{row.name}: {folder} holds no manifest.json, tars, parquet files or class folders; "
        f"obtain it with: {row.command(split)}"
    )


def subset_ids(name: str) -> list[int]:
    """ImageNet-1K class ids of `imagenet_r` or `imagenet_a`, from timm's lists."""
    data = pkgutil.get_data("timm.data", f"_info/{name}_indices.txt")
    return [int(line) for line in data.decode().split()]


class EvalSplit(Dataset):
    """Images of one split, each uint8 (3, crop, crop), with their labels and texts.

    Attributes:
        labels: (n,) class ids, those of the prompt file where the row has one; -1 = none. Without
            a prompt file they are positions in the list of this very source: labels of two splits
            are compared through `common_classes.meet`.
        targets: (n, K) bool over the same ids, for several labels per image; or None.
    """

    def __init__(self, row: EvalDataset, split: str, crop: int):
        """Open the source of `row` and `split`; `crop` is the model's image size in pixels.

        Raises DataError when the number of samples is not the registry's, or the classes are not
        those of the prompt file.
        """
        self.row, self.split, self.crop = row, split, crop
        self.source = open_source(row, split)
        if row.class_names:
            folders = isinstance(self.source, FolderSource)
            rename = row.class_names.of_folders if folders else row.class_names.of_ids
            self.source.names = rename(self.source.names, self.source.what)
        self._table = None
        labels, self.targets = self.source.labels, self.source.targets
        if row.prompts:
            subset = subset_ids(row.subset) if row.subset else None
            self._table = base.read_table(row.prompts, subset)
            labels = self._to_prompt_ids(labels)
        labelled = labels >= 0 if self.targets is None else self.targets.any(axis=1)
        self.indices = np.flatnonzero(labelled) if row.labelled_only else np.arange(len(labels))
        self.labels = labels[self.indices]
        if self.targets is not None:
            self.targets = self.targets[self.indices]
        self.resize = crop if row.squash else round(crop * row.resize_ratio)
        # What decides the pixels beside crop and statistics, for the feature cache.
        self.mode = "bicubic squashed" if row.squash else "bicubic"
        self._transform = _Squash(crop) if row.squash else views.build_eval(self.resize, crop)
        expected = row.splits[split]["samples"]
        if expected is not None and len(self) != expected:
            kind = "labelled samples" if row.labelled_only else "samples"
            raise DataError(
                f"{row.name}, split {split}: {row.folder(split)} holds {len(self)} {kind}, "
                f"the registry (eval/datasets.yaml) expects {expected}; make the set again: "
                f"{row.command(split)}"
            )

    def _to_prompt_ids(self, labels: np.ndarray) -> np.ndarray:
        ids = base.class_ids(self.source, self._table, self.row.integer_labels)
        too_large = labels[labels >= len(ids)]
        if len(too_large):
            raise DataError(
                f"{self.row.name}: label {too_large[0]} in {self.source.what}, which has "
                f"{len(ids)} classes"
            )
        if self.targets is not None:
            ordered = np.zeros_like(self.targets)
            ordered[:, ids] = self.targets
            self.targets = ordered
        mapped = np.where(labels >= 0, ids[np.maximum(labels, 0)], -1)
        outside = np.setdiff1d(mapped[mapped >= 0], self._table.candidates)
        if len(outside):
            raise DataError(
                f"{self.row.name}: {self.source.what} has images of the class "
                f"{self._table.names[outside[0]]!r}, which is none of its "
                f"{len(self._table.candidates)} classes"
            )
        return mapped

    @property
    def content_hash(self) -> str:
        """SHA-256 over the source, by content, and the choice of samples."""
        facts = [self.source.content_hash, self.indices.tolist()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> torch.Tensor:
        try:
            return self._transform(self.image(i))
        except views.BadImage as error:
            raise DataError(f"{self._where(i)}: unusable image ({error})") from error

    def image(self, i: int) -> Image.Image:
        """Sample `i` as a PIL image (RGB). An unreadable one raises DataError: n must hold."""
        try:
            return self.source.image(int(self.indices[i]))
        except (manifest.MissingMember, views.BadImage) as error:
            raise DataError(f"{self._where(i)}: unreadable image ({error})") from error

    def texts(self, i: int) -> list[str]:
        """Captions of sample `i`; a missing, empty or undecodable one raises DataError."""
        try:
            return self.source.texts(int(self.indices[i]))
        except texts.BadText as error:
            raise DataError(f"{self._where(i)}: {error.reason}, retrieval needs one") from error

    def _where(self, i: int) -> str:
        return f"{self.row.name}: {self.source.where(int(self.indices[i]))}"

    def class_names(self) -> tuple[np.ndarray, list[str]]:
        """Candidates of zero-shot: `occurring_classes`, or all of the source under `all_classes`.

        Raises DataError also when K is not the registry's.
        """
        ids, names = self._named(all_of_them=self.row.all_classes)
        if self.row.classes is not None and len(ids) != self.row.classes:
            raise DataError(
                f"{self.row.name}, split {self.split}: {len(ids)} classes occur, the registry "
                f"(eval/datasets.yaml) expects {self.row.classes}"
            )
        return ids, names

    def occurring_classes(self) -> tuple[np.ndarray, list[str]]:
        """Ids (K,), ascending, and names of the classes: those of the prompt file, or without one
        those that occur in this split.

        Raises DataError where a class of the source has no name, or shares it with another one.
        """
        return self._named(all_of_them=False)

    def _named(self, all_of_them: bool) -> tuple[np.ndarray, list[str]]:
        table = self._table
        if table is not None:  # its ids tell apart the two names that ImageNet has twice
            return table.candidates, [table.names[int(i)] for i in table.candidates]
        several = self.targets is not None
        ids = np.flatnonzero(self.targets.any(axis=0)) if several else np.unique(self.labels)
        names = self.source.names or []
        if all_of_them:
            ids = np.union1d(ids, np.arange(len(names))).astype(np.int64)
        missing = [int(i) for i in ids if not 0 <= i < len(names)]
        if missing:
            raise DataError(
                f"{self.row.name}: no class names for the ids {missing} in the source "
                f"{self.source.what}, and numbers alone name no class"
            )
        found, times = [names[int(i)] for i in ids], Counter(names)
        twice = [name for name in dict.fromkeys(found) if times[name] > 1]
        if twice:
            raise DataError(
                f"{self.row.name}: {self.source.what} has several classes named {twice[:5]}; "
                "name them apart, or give the row a prompt file"
            )
        return ids, found

    def templates(self) -> list[str]:
        """Templates of the row: a preset, a list, `prompts` (the prompt file's) or `source` (the
        source's own). Raises DataError if the source has none."""
        named = self.row.templates
        if isinstance(named, list):
            return named
        if named == "prompts":
            return self._table.templates
        if named != "source":
            return texts.load_templates(named)
        if not self.source.templates:
            raise DataError(
                f"{self.row.name}: the templates are to come from the source, but "
                f"{self.source.what} has none (zeroshot_classification_templates.txt)"
            )
        return self.source.templates

    def distinct_texts(self) -> tuple[list[str], np.ndarray]:
        """Distinct captions in order of appearance and, per image, its caption's index (n,).

        Captions that differ in case or spacing only are one: the tokenizer cannot tell them
        apart, and as two texts they would tie with each other.
        """
        first: dict[str, int] = {}
        distinct: list[str] = []
        owner = np.empty(len(self), dtype=np.int64)
        for i in range(len(self)):
            text = "\n".join(self.texts(i))
            folded = " ".join(text.split()).casefold()
            if folded not in first:
                first[folded] = len(distinct)
                distinct.append(text)
            owner[i] = first[folded]
        return distinct, owner

    def captions(self) -> tuple[list[str], np.ndarray]:
        """Captions, each a text of its own, and the index of the image of each (m,): the first
        `captions_per_image` of every image, or all.

        Raises DataError for an image with fewer, or another total than the registry's `texts`.
        """
        limit = self.row.captions_per_image
        found: list[str] = []
        owner: list[int] = []
        for i in range(len(self)):
            lines = self.texts(i)
            if limit != "all" and len(lines) < limit:
                raise DataError(f"{self._where(i)}: {len(lines)} captions, {limit} are needed")
            lines = lines if limit == "all" else lines[:limit]
            found += lines
            owner += [i] * len(lines)
        expected = self.row.splits[self.split].get("texts")
        if expected is not None and len(found) != expected:
            raise DataError(
                f"{self.row.name}, split {self.split}: {len(found)} captions, the registry "
                f"(eval/datasets.yaml) expects {expected}; make the set again: {self.row.obtain}"
            )
        return found, np.array(owner, dtype=np.int64)


class _Squash:
    """Both sides to the crop, without keeping the shape: ELEVATER's way with KITTI."""

    def __init__(self, crop: int) -> None:
        resize = v2.Resize((crop, crop), v2.InterpolationMode.BICUBIC)
        self._transform = v2.Compose([resize, v2.PILToTensor()])

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self._transform(image)
