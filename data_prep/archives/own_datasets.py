"""Images, labels and captions of a set of Hugging Face `datasets`, its columns found by type."""

import argparse
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.archives import hugging_face
from data_prep.archives.own_classes import class_table, read_names
from data_prep.archives.own_lists import Columns, group_of, label_key, texts_of
from data_prep.archives.own_samples import Samples, texts_digest
from data_prep.sets import split
from loaders.errors import ConfigError, DataError
from loaders.progress import Progress

_TEXTS = ("string", "large_string")
_BATCH = 1000  # rows read at a time


@dataclass(frozen=True)
class Found:
    """What was found in a split: samples, classes, the hash of the group of each, and counts."""

    samples: Samples
    classes: list[dict]
    hashes: np.ndarray
    digest: str
    left_out: dict[str, int]
    columns: Columns
    split: str


def read(arguments: argparse.Namespace) -> Found:
    """The split of a set that the command line names; images are not looked at.

    Raises `ConfigError` for a split or column that is not there or has to be named, `DataError` as
    `hugging_face.load`, and where no row can be used.
    """
    root = arguments.place
    name, data = _split(hugging_face.load(root, arguments.config), arguments.split, root)
    columns = find_columns(data, root, arguments)
    what = f"{root}, split {name}" if name else root
    rows, keys, hashes, left_out, several, digest = _read_rows(data, columns, arguments.seed, what)
    classes: list[dict] = []
    labels = None
    if columns.label is not None:
        named = getattr(data.features[columns.label], "names", None)
        classes, number_of = class_table(
            named or keys, read_names(arguments.names), what, bool(named)
        )
        labels = np.array([number_of[key] for key in keys], np.int64)
    image = hugging_face.image_reader(data, columns.image, root)
    texts = data.select_columns(list(columns.captions)) if columns.captions else None
    samples = Samples(
        len(rows),
        lambda i: image(int(rows[i])),
        lambda i: f"{name or 'row'}/{rows[i]}",
        labels,
        None if texts is None else lambda i: "\n".join(_captions(texts[int(rows[i])], columns)),
        several,
    )
    return Found(samples, classes, hashes, digest, left_out, columns, name)


def _split(splits: Mapping[str, Any], wanted: str | None, root: str) -> tuple[str, Any]:
    """Name and rows of a split: the one that is named, or the only one."""
    if wanted is None and len(splits) > 1:
        raise ConfigError(f"{root}: it has the splits {', '.join(splits)}; name one: --split")
    if wanted is not None and wanted not in splits:
        raise ConfigError(f"--split {wanted}: {root} has {', '.join(splits) or 'none'}")
    name = wanted or next(iter(splits))
    return name, splits[name]


def find_columns(data: Any, root: str, given: argparse.Namespace) -> Columns:
    """The columns to read. Those that are not `given` are found by their type: the only Image, the
    only ClassLabel, and, where nothing is a label, the only column of texts or lists of texts.
    """
    from datasets import ClassLabel

    features = data.features
    stated = (given.image_column, *given.caption_columns, given.label_column, given.group_column)
    for name in filter(None, stated):
        if name not in features:
            raise ConfigError(f"{root}: no column {name}; it has {', '.join(features)}")
    label, captions = given.label_column, tuple(given.caption_columns)
    if label is None and not captions:
        named = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        texts = [name for name, feature in features.items() if _is_text(feature)]
        if len(named) > 1 or (not named and len(texts) != 1):
            raise ConfigError(
                f"{root}: which column says what an image is? Class labels are in "
                f"{', '.join(named) or 'none'}, texts in {', '.join(texts) or 'none'}; name one by "
                "--label-column or --caption-column"
            )
        label, captions = (named[0], ()) if named else (None, (texts[0],))
    image = given.image_column or hugging_face.image_column(data, root)
    return Columns(image, captions, label, given.group_column)


def _is_text(feature: Any) -> bool:
    return getattr(getattr(feature, "feature", feature), "dtype", None) in _TEXTS


def _read_rows(data: Any, columns: Columns, seed: int, what: str):
    """Of the rows that can be used: numbers (n,), class keys, hashes of the groups (n,); then what
    was left out, whether one has several captions, and a digest of all that was read."""
    named = getattr(data.features[columns.label], "names", None) if columns.label else None
    rows, keys, hashes, left_out = array("q"), [], array("Q"), Counter()
    several, digests, number = False, [], 0
    wanted = [name for name in columns.all if name != columns.image]
    with Progress(total=len(data), unit="row", desc="reading rows") as bar:
        for batch in data.select_columns(wanted).iter(batch_size=_BATCH):
            digests.append(texts_digest([batch[name] for name in wanted]))
            for cells in zip(*(batch[name] for name in wanted), strict=True):
                row = dict(zip(wanted, cells, strict=True)) | {columns.image: str(number)}
                try:
                    captions = _captions(row, columns)
                    if columns.label is None and not captions:
                        raise ValueError("empty caption")
                    if columns.label is not None:
                        keys.append(_key(row[columns.label], named))
                    hashes.append(split.group_hash(seed, group_of(row, columns)))
                    rows.append(number)
                    several |= len(captions) > 1
                except ValueError as error:
                    del keys[len(rows) :]
                    left_out[str(error)] += 1
                number += 1
                bar.update()
    if not rows:
        raise DataError(f"{what}: no row can be used: {dict(left_out)}")
    found = np.frombuffer(rows, np.int64), keys, np.frombuffer(hashes, np.uint64)
    return *found, dict(left_out), several, texts_digest([columns.all, digests])


def _key(cell: Any, named: list[str] | None) -> str:
    """The class of a row; numbers are places in `named`, -1 where there is no label."""
    if named is None:
        return label_key(cell)
    if cell is None or not 0 <= cell < len(named):
        raise ValueError("no label")
    return named[cell]


def _captions(row: Mapping[str, Any], columns: Columns) -> list[str]:
    found = [text for name in columns.captions for text in texts_of(row[name])]
    return [" ".join(text.splitlines()) for text in found]
