"""What every source of evaluation images offers, and how its classes become the prompt file's."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from eval.sources.class_texts import normalise
from loaders import views
from loaders.errors import DataError

PROMPTS = Path(__file__).resolve().parents[2] / "prompts"


class Source:
    """Images of one split with what is known of them.

    Attributes:
        what: where it is, for messages.
        labels: (n,) int64, index into `names`, -1 without a label.
        targets: (n, K) bool over `names` for several labels per image, else None.
        names: class names, or synsets, by label; None if there are none.
        states_ids: the names come with ids that must be the prompt file's (a manifest).
        templates: the source's own templates with `{}`, or None.
        content_hash: changes whenever an image or its place may have changed.
    """

    what: str
    labels: np.ndarray
    targets: np.ndarray | None = None
    names: list[str] | None = None
    states_ids: bool = False
    templates: list[str] | None = None
    content_hash: str

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Image.Image:
        """Image `i`, RGB. Raises `views.BadImage`, or `LookupError` where there is none."""
        raise NotImplementedError

    def texts(self, i: int) -> list[str]:
        """Captions of sample `i`. Raises `loaders.texts.BadText`."""
        raise DataError(f"{self.what}: has no captions, and retrieval needs them")

    def where(self, i: int) -> str:
        """Sample `i` in words."""
        return f"{self.what}, sample {i}"


def decode_file(path: Path) -> Image.Image:
    """An image file as RGB; raises `views.BadImage`."""
    try:
        return views.decode(path.read_bytes())
    except OSError as error:
        raise views.BadImage("unreadable", error) from None


def files_hash(folder: Path) -> str:
    """SHA-256 over the relative path, size and modification time of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [
        [path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns]
        for path in files
    ]
    return hashlib.sha256(json.dumps([str(folder.resolve()), facts]).encode()).hexdigest()


@dataclass(frozen=True)
class ClassTable:
    """Classes of a prompt file, ids ascending, and which of them are candidates."""

    file: str
    names: list[str]
    synsets: list[str | None]
    templates: list[str] | None
    candidates: np.ndarray


def read_table(file: str, candidates: Sequence[int] | None = None) -> ClassTable:
    """Class table of `prompts/FILE`; `candidates` are class ids, None = all.

    The text of a class is its first name, as in ELEVATER's toolkit and OpenAI's ImageNet list.
    """
    content = json.loads((PROMPTS / file).read_text(encoding="utf-8"))
    classes = content["classes"]
    chosen = range(len(classes)) if candidates is None else candidates
    return ClassTable(
        file,
        [entry["names"][0] for entry in classes],
        [entry["synset"] for entry in classes],
        content.get("templates"),
        np.array(sorted(chosen), dtype=np.int64),
    )


def class_ids(source: Source, table: ClassTable, integer_labels: bool = False) -> np.ndarray:
    """Class id in `table` of every label of `source`, (number of its names,) int64.

    Classes are matched by synset or by name, one to one: the same name first, then the one class
    that has it but for case, spaces and punctuation.
    `integer_labels`: names that are all numbers are class ids. Raises DataError for a source
    without names, a name that fits no class or two, a candidate class without a name, and ids
    that differ from the prompt file's where the source states ids.
    """
    if source.names is None:
        raise DataError(
            f"{source.what}: integer labels without class names, so their order cannot be compared "
            f"with prompts/{table.file}; use a source with names"
        )
    given = list(source.names)
    found = _ids(given, table, integer_labels)
    unknown = [name for name, i in zip(given, found, strict=True) if i is None]
    twice = [table.names[i] for i in {i for i in found if i is not None and found.count(i) > 1}]
    lacking = [table.names[i] for i in table.candidates if int(i) not in found]
    if unknown or twice or lacking:
        raise DataError(
            f"{source.what}: class names do not fit prompts/{table.file}. Names without a class: "
            f"{unknown[:5]}; classes without a name or folder: {lacking[:5]}; named twice: "
            f"{twice[:5]} ({len(given)} names, {len(table.candidates)} classes expected)"
        )
    wrong = [label for label, i in enumerate(found) if label != i]
    if source.states_ids and len(found) == len(table.names) and wrong:
        label = wrong[0]
        raise DataError(
            f"{source.what}: the class order is not that of prompts/{table.file}: id {label} is "
            f"{given[label]!r} here and {table.names[label]!r} there ({len(wrong)} ids differ); "
            "make the set again"
        )
    return np.array(found, dtype=np.int64)


def _ids(given: list[str], table: ClassTable, integer_labels: bool) -> list[int | None]:
    """Class id of every given name, None where it fits no class or several."""
    plain = [normalise(name) for name in table.names]
    # Two names of ImageNet occur twice; the whole list in the same order leaves no doubt.
    if [normalise(name) for name in given] == plain:
        return list(range(len(plain)))
    synset = {s: i for i, s in enumerate(table.synsets) if s is not None}
    if synset and any(name in synset for name in given):
        return [synset.get(name) for name in given]
    if integer_labels and all(name.isdecimal() for name in given):
        return [int(name) if int(name) < len(plain) else None for name in given]
    return [_only(name, table.names, _only(normalise(name), plain)) for name in given]


def _only(name: str, names: list[str], otherwise: int | None = None) -> int | None:
    """Position of `name` in `names` if it stands there once, else `otherwise`."""
    return names.index(name) if names.count(name) == 1 else otherwise
