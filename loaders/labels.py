"""Labels of a triplet (image, text, label): who is a positive of whom.

Convention: label >= 0 is a class; -1 is an image-text pair that gets a label of its own; a
label <= -2 is a caption group (equal number: equal caption text). The pseudo-code of UniCL
(arXiv 2204.03610, Algorithm 1) marks pairs by 0 and counts classes from 1 instead, which turns
class 0 of an ordinary data set into captions; `from_paper_labels` converts.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

import numpy as np
from torch import Tensor

from loaders.choices import MERGES
from loaders.errors import ConfigError, DataError
from loaders.manifest import ShardSet

PAIR = -1
Labels = TypeVar("Labels", np.ndarray, Tensor)


class LabelSpace:
    """Global class ids of several sources.

    Args:
        sources: all sources in the order of the configuration; those of kind image_text have no
            training classes.
        merge: `disjoint`: every source has a range of its own. `synset`: classes with the same
            WordNet synset share an id, and the names of all sources are joined.

    Raises:
        ConfigError: unknown `merge`.
        DataError: a class without a synset, with merge `synset`.
    """

    def __init__(self, sources: Sequence[ShardSet], merge: str = "disjoint") -> None:
        if merge not in MERGES:
            raise ConfigError(f"data.label_merge={merge!r} is not one of {', '.join(MERGES)}")
        self._ids: list[list[int]] = []
        self._names: list[list[str]] = []
        known: dict[str, int] = {}
        for source in sources:
            classes = source.classes if source.kind == "image_label" else []
            self._ids.append([])
            for entry in classes:
                if merge == "synset" and not entry.synset:
                    raise DataError(
                        f"{source.name}: class {entry.id} ({entry.names[0]}) has no synset, so it "
                        "cannot be merged; add it to the manifest, or use data.label_merge=disjoint"
                    )
                new = len(self._names)
                label = known.setdefault(entry.synset, new) if merge == "synset" else new
                if label == new:
                    self._names.append([])
                self._ids[-1].append(label)
                names = self._names[label]
                names.extend(name for name in entry.names if name not in names)

    @property
    def num_classes(self) -> int:
        """Number of global class ids; they are 0..num_classes-1."""
        return len(self._names)

    def to_global(self, source: int, label: int) -> int:
        """Global id of class `label` of the source with that position in the configuration."""
        return self._ids[source][label]

    def names(self, label: int) -> list[str]:
        """Names of a global class id, those of the first source first."""
        return self._names[label]


def caption_group(text: str) -> int:
    """Label <= -2 that captions share when equal up to case and white space.

    A 62-bit hash (blake2b) of the text, the same in every process and run: among 10^9 different
    captions the chance of any collision is about 10%, of a harmful one in a batch nil.
    """
    normal = " ".join(text.split()).lower()
    digest = blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return -2 - (int.from_bytes(digest, "big") >> 2)


def from_paper_labels(labels: Labels) -> Labels:
    """Convert labels as in the paper (0 caption, classes from 1) to ours (-1, from 0).

    labels: any shape, numpy or torch, integer. Returns a new array. Source: arXiv 2204.03610,
    Algorithm 1. Raises `DataError` for a negative label, which the paper does not have.
    """
    if (labels < 0).any():
        raise DataError("negative labels are not in the paper's convention; were they converted?")
    return labels - 1
