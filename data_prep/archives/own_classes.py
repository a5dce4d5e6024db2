"""The class table of a set of one's own: from the keys that its images have, and a table of names.

A key is the path of a class folder, or what stands in the label column of a list.
"""

import csv
import re
import unicodedata
from collections.abc import Collection, Mapping
from pathlib import Path

from loaders.errors import DataError
from loaders.plain_text import read_text, text_lines

_SHOWN = 5  # keys in a message
_NUMBER = re.compile(r"\d{1,9}")
_WNID = re.compile(r"n\d{8}")


def read_names(path: Path | None) -> dict[str, list[str]] | None:
    """Names of each class by its key, in the order of the file; None for None.

    A line is `KEY<tab>NAME`, with further names after further tabs; in a file `.csv` it is
    `KEY,NAME`. Where no line has a second cell, the lines are the names of the classes 0, 1, ….
    Raises `DataError` for a file that is not so, a key that stands twice, and an empty name.
    """
    if path is None:
        return None
    try:
        lines = text_lines(read_text(path))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name a table of class names") from None
    rows = (
        list(csv.reader(lines)) if path.suffix == ".csv" else [line.split("\t") for line in lines]
    )
    if all(len(row) == 1 for row in rows):
        rows = [[str(number), *row] for number, row in enumerate(rows)]
    names: dict[str, list[str]] = {}
    for number, (key, *texts) in enumerate((row or [""] for row in rows), start=1):
        key, texts = key.strip().rstrip("/"), [" ".join(text.split()) for text in texts]
        if not key or not texts or not all(texts):
            raise DataError(f"{path}, line {number}: not a key and its name, with a tab between")
        if key in names:
            raise DataError(f"{path}, line {number}: {key!r} stands twice; keep one line of it")
        names[key] = texts
    if not names:
        raise DataError(f"{path}: no lines; write a key, a tab and a name on each")
    return names


def class_table(
    keys: Collection[str],
    names: Mapping[str, list[str]] | None,
    what: str,
    ordered: bool = False,
) -> tuple[list[dict], dict[str, int]]:
    """Class table (dicts with id, synset, names), and the number of each key.

    With `names` the classes are its lines, in their order, so that two sets can share one table;
    without, the keys, sorted by code point unless they are `ordered`, and a name is the last part
    of its key with blanks for underscores, or all parts where two classes would have one name.
    `what`: for messages, where the keys are from. Raises `DataError` for keys that `names` lacks,
    and for numbers and WNIDs without names, of which a text encoder knows nothing.
    """
    if names is not None:
        if lacking := sorted(set(keys) - set(names)):
            raise DataError(
                f"{what}: --names has no line for {len(lacking)} of {len(set(keys))} classes: "
                f"{_some(lacking)}; its keys are {_some(list(names))}"
            )
        order, texts = list(names), list(names.values())
    else:
        order = list(keys) if ordered else sorted(set(keys))
        for kind, described in ((_NUMBER, "numbers"), (_WNID, "WordNet ids")):
            if order and all(kind.fullmatch(key) for key in order):
                raise DataError(
                    f"{what}: the {len(order)} classes are {described} ({_some(order)}); what they "
                    "mean is not stated: --names FILE with a line KEY<tab>NAME for each"
                )
        texts = [[text] for text in _readable(order)]
    table = [
        {"id": number, "synset": key if _WNID.fullmatch(key) else None, "names": list(text)}
        for number, (key, text) in enumerate(zip(order, texts, strict=True))
    ]
    return table, {key: number for number, key in enumerate(order)}


def _readable(keys: list[str]) -> list[str]:
    """A name for each key."""
    last = [_words(key.rpartition("/")[2]) for key in keys]
    return [
        name if last.count(name) == 1 else _words(key.replace("/", " "))
        for key, name in zip(keys, last, strict=True)
    ]


def _words(text: str) -> str:
    # File systems of macOS hand out letters and accents apart, which tokenizers read as two.
    return " ".join(unicodedata.normalize("NFC", text).replace("_", " ").split()) or text


def _some(keys: list[str]) -> str:
    return ", ".join(map(repr, keys[:_SHOWN])) + (", …" if len(keys) > _SHOWN else "")
