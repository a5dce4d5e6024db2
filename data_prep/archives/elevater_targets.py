"""What the labels of ELEVATER's sources mean: class ids by name, and two targets that are derived.

Class names are compared without case and separators; other words need an alias in
`elevater_sets.yaml`. Nothing is guessed: a name that fits no class, or a class that two names fit,
is an error.
"""

import difflib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loaders.errors import DataError
from loaders.plain_text import read_text, text_lines

ALIASES = "data_prep/elevater_sets.yaml, key aliases"
_VEHICLES = ("Car", "Van", "Truck")
_METRES = (8.0, 20.0, 999.0)  # VTAB's bounds: near, middle, far, no vehicle
_NO_VEHICLE = 1000.0
_HELD_OUT_PERCENT = 10  # of the videos, for val and for test


class ClassTable:
    """The classes of a set: class texts, and what sources call them."""

    def __init__(self, texts: Sequence[str], aliases: dict[str, str], integers) -> None:
        """`aliases`: source name -> class text. `integers`: None, "same", or class texts in the
        order of the integers. Raises `DataError` if two classes cannot be told apart by name."""
        self.texts = list(texts)
        self._ids: dict[str, int] = {}
        pairs = [*zip(texts, texts, strict=True), *aliases.items()]
        for name, text in pairs:
            class_id = self.texts.index(text)
            if self._ids.setdefault(normalise(name), class_id) != class_id:
                raise DataError(f"{ALIASES}: {name!r} fits {self.texts[class_id]!r} and another")
        self._integers = list(range(len(texts))) if integers == "same" else None
        if isinstance(integers, list):
            self._integers = [self.texts.index(text) for text in integers]

    def by_name(self, names: Sequence[str], where: str, by_number: bool = False) -> list[int]:
        """Class id of each name, one to one.

        Names that are all numbers are integer labels. `by_number`: if not a single name fits,
        name i is class i, because ELEVATER pairs its archives' labels with its class texts by
        number. Raises `DataError` that lists the names and classes left over.
        """
        if len(names) != len(self.texts):
            raise DataError(f"{where}: {len(self.texts)} classes expected, {len(names)} there")
        found = [self._ids.get(normalise(name)) for name in names]
        if all(class_id is None for class_id in found):
            if all(name.isdecimal() for name in names) and self._integers is not None:
                found = self.by_integer([int(name) for name in names], where)
            elif by_number:
                return list(range(len(names)))
        unknown = [name for name, class_id in zip(names, found, strict=True) if class_id is None]
        twice = [
            f"{self.texts[i]!r} by {[n for n, j in zip(names, found, strict=True) if j == i]}"
            for i in sorted({j for j in found if j is not None and found.count(j) > 1})
        ]
        if unknown or twice:
            left = [text for i, text in enumerate(self.texts) if i not in found]
            near = difflib.get_close_matches(unknown[0], left, n=1, cutoff=0) if unknown else []
            hint = f" (nearest to {unknown[0]!r}: {near[0]!r})" if near else ""
            raise DataError(
                f"{where}: class names do not fit. Without a class: {unknown[:10]}; classes "
                f"without a name: {left[:10]}{hint}; named twice: {twice[:5]}. Mend the source, or "
                f"add the names to {ALIASES}"
            )
        return found

    def by_integer(self, labels: Sequence[int], where: str) -> list[int]:
        """Class id of each integer label; `DataError` if the set has no rule for integers."""
        if self._integers is None:
            raise DataError(
                f"{where}: integer labels without class names, and their order is not known; use "
                "a source with names (elevater_sets.yaml, key integers, is null for this set)"
            )
        wrong = sorted({label for label in labels if not 0 <= label < len(self._integers)})
        if wrong:
            raise DataError(
                f"{where}: labels {wrong[:5]}, but 0 to {len(self._integers) - 1} are expected"
            )
        return [self._integers[label] for label in labels]


def normalise(name: str) -> str:
    """A class name without case, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", name.casefold())


def voc_names(annotation: bytes) -> list[str]:
    """Names of the objects in a PASCAL VOC annotation, sorted, each once, difficult ones too."""
    return sorted(
        {name.text for name in ElementTree.fromstring(annotation).iterfind("object/name")}
    )


def closest_vehicle_class(annotation: str) -> int:
    """Class of VTAB's task closest_vehicle_distance, from the text of a KITTI label file.

    0: the closest car, van or truck is at most 8 m away along the camera axis, 1: at most 20 m,
    2: further, 3: there is none. Rule: google-research/task_adaptation, data/kitti.py.
    """
    rows = (line.split() for line in annotation.splitlines() if line.strip())
    distances = [float(row[13]) for row in rows if row[0] in _VEHICLES]
    closest = min([*distances, _NO_VEHICLE])
    return sum(bound < closest for bound in _METRES)


def kitti_splits(mapping: Path) -> dict[str, list[int]]:
    """Image numbers of train, val and test: whole videos, drawn as tensorflow-datasets does.

    `mapping`: the folder of KITTI's devkit with `train_rand.txt` (line numbers, from 1, of the
    images 0, 1, …) and `train_mapping.txt` (a line each: date, video, frame). Rule:
    tensorflow-datasets, kitti 3.3.0, which VTAB reads. Raises `DataError` for missing files.
    """
    try:
        lines = text_lines(read_text(mapping / "train_mapping.txt"))
        numbers = [int(text) - 1 for text in read_text(mapping / "train_rand.txt").split(",")]
        videos: dict[str, list[int]] = {}
        for image, number in enumerate(numbers):
            videos.setdefault(lines[number].split(" ")[1], []).append(image)
    except (OSError, ValueError, IndexError) as error:
        raise DataError(
            f"{mapping}: {error}; put the folder mapping of KITTI's devkit_object.zip there "
            "(train_mapping.txt, train_rand.txt)"
        ) from None
    random = np.random.RandomState(123)  # the splits are defined by this old generator
    count = max(1, _HELD_OUT_PERCENT * len(videos) // 100)
    test = set(random.choice(sorted(videos), count, replace=False))
    val = set(random.choice(sorted(set(videos) - test), count, replace=False))
    splits: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for video, images in videos.items():
        splits["test" if video in test else "val" if video in val else "train"] += images
    return splits
