"""Class names of ImageNet synsets: the words of WordNet 3.0.

A WNID (n02084071) is the offset of a noun synset in WordNet 3.0's `data.noun`, so the words of
every ImageNet release come from that file. `prompts/wordnet_lemmas.tsv` is its extract: the 21,844
synsets of timm 1.0.31's lists of ImageNet releases, from Debian's wordnet-base 1:3.0-37. The hash
is pinned, because a changed name changes what a model is trained on.
"""

import functools
import hashlib
from pathlib import Path

from loaders.errors import DataError

TABLE = Path(__file__).resolve().parents[2] / "prompts" / "wordnet_lemmas.tsv"
SHA256 = "f4431496bf00291d622e56492f8accb53c329f3ded2d6e8a2727bfe1420fef3b"


def names(synset: str) -> tuple[str, ...]:
    """Words of a synset, the first one the most usual; `DataError` for a synset not in the table.

    >>> names("n02084071")
    ('dog', 'domestic dog', 'Canis familiaris')
    """
    words = read_table(TABLE).get(synset)
    if words is None:
        raise DataError(
            f"{TABLE}: no synset {synset!r}; the table holds the {len(read_table(TABLE))} noun "
            "synsets of the ImageNet releases, so is this a WNID, such as n02084071?"
        )
    return tuple(words.split(", "))  # no word of WordNet holds a comma


@functools.cache
def read_table(path: Path) -> dict[str, str]:
    """Synset -> words joined by ", ". Raises `DataError` unless the file is the pinned one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; restore it from the repository") from None
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise DataError(
            f"{path}: sha256 {found}, expected {SHA256}: the class names were changed; restore "
            "the file from the repository"
        )
    lines = data.decode("utf-8").splitlines()
    return dict(line.split("\t") for line in lines if not line.startswith("#"))
