"""A data set for looking at: its pictures, captions and classes, one at a time."""

import threading
from pathlib import Path

import numpy as np
from PIL import Image

from eval.sources.base import Source
from eval.sources.registry import EvalDataset
from eval.sources.splits import open_source
from loaders import texts, views

DEFAULT_TEMPLATES = "clip_80"


class Collection:
    """The samples of one folder. Several threads may ask.

    Attributes:
        name: of the folder.
        source: where they come from.
        row: the folder as an evaluation set; its functions make texts of class names.
        labels: (n,) int64, position in `classes`, -1 without a label.
        classes: names of the classes that occur, in the order of their ids, as in zero-shot
            evaluation; of a set without any label, all names it has.
        captioned: whether samples may have captions.
    """

    def __init__(self, folder: Path) -> None:
        """Raises DataError for a folder that cannot be read as a data set."""
        place = folder.resolve()
        self.name = place.name
        self.row = EvalDataset(
            name=self.name,
            source="auto",
            splits={"test": {"path": str(place), "samples": None}},
            tasks={},
            classes=None,
            templates=None,
            labelled_only=False,
            resize_ratio=1.0,
            optional=False,
            obtain=f"see {place}",
        )
        self.source = open_source(self.row, "test")
        names = self.source.names or []
        labels = np.where(self.source.labels < len(names), self.source.labels, -1)
        ids = np.unique(labels[labels >= 0]) if (labels >= 0).any() else np.arange(len(names))
        self.classes = [names[int(i)] for i in ids]
        self.labels = np.where(labels >= 0, np.searchsorted(ids, labels), -1)
        self.captioned = type(self.source).texts is not Source.texts
        self._lock = threading.Lock()  # the reader of tars is for one thread

    def __len__(self) -> int:
        return len(self.source)

    def image(self, i: int) -> Image.Image | None:
        """Picture `i`, RGB; None where it cannot be read."""
        try:
            with self._lock:
                return self.source.image(i)
        except (LookupError, views.BadImage):
            return None

    def captions(self, i: int) -> list[str]:
        """Captions of sample `i`; none where it has none, or none that can be read."""
        if not self.captioned:
            return []
        try:
            with self._lock:
                return self.source.texts(i)
        except (LookupError, texts.BadText):
            return []

    def label(self, i: int) -> str | None:
        """Name of the class of sample `i`, None without one."""
        return self.classes[self.labels[i]] if self.labels[i] >= 0 else None

    def distinct_captions(self) -> tuple[list[str], np.ndarray]:
        """The m captions, and the sample and number of each, (m, 2) int64.

        Those that differ in case or spacing only are one, and belong to the first sample.
        """
        places: dict[str, tuple[int, int]] = {}
        found = []
        for i in range(len(self)):
            for number, text in enumerate(self.captions(i)):
                if places.setdefault(" ".join(text.split()).casefold(), (i, number)) == (i, number):
                    found.append(text)
        return found, np.array(list(places.values()), dtype=np.int64).reshape(-1, 2)

    def templates(self, given: str | None) -> list[str]:
        """Templates of class names: a preset or file, else the set's own, else the default.

        Raises ConfigError for one that is unknown."""
        if given is None and self.source.templates:
            return self.source.templates
        return texts.load_templates(given or DEFAULT_TEMPLATES)
