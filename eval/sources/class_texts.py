"""Class names and templates of a person's own set, from files beside it or named by a flag."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loaders import texts
from loaders.errors import ConfigError, DataError
from loaders.plain_text import read_text, text_lines

# Files beside a set, the first and the last as CLIP_benchmark has them.
CLASS_NAMES = "classnames.txt"
TEMPLATES = ("templates.txt", "zeroshot_classification_templates.txt")
SHOWN = 5  # names in a message


def normalise(name: str) -> str:
    """A class name without case, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", name.casefold())


def digest(lines: Sequence[str]) -> str:
    """SHA-256 over texts in their order."""
    return hashlib.sha256(json.dumps(list(lines)).encode()).hexdigest()


@dataclass(frozen=True)
class GivenNames:
    """Class names of a file.

    Attributes:
        what: the file, for messages.
        names: in the order of the file.
        keys: what each of them renames (a class folder, or the name that the set has), where the
            file has two columns; else None.
    """

    what: str
    names: tuple[str, ...]
    keys: tuple[str, ...] | None = None

    def of_ids(self, own: Sequence[str] | None, where: str) -> list[str]:
        """Names by class id, of a set that numbers its classes and calls them `own`, if anything.

        Raises DataError for another number of names, for the set's own names in another order, and
        where a file of two columns lacks one of them.
        """
        if self.keys is not None:
            if own is None:
                raise DataError(
                    f"{self.what}: the classes of {where} have numbers and no names that a table "
                    "of two columns could rename; write one name a line, in the order of the ids"
                )
            return self._renamed(own, where)
        if own is not None and len(own) != len(self.names):
            raise DataError(
                f"{self.what}: {len(self.names)} class names, but {where} has {len(own)} classes"
            )
        plain = [[normalise(name) for name in names] for names in (own or [], self.names)]
        if own is not None and plain[0] != plain[1] and sorted(plain[0]) == sorted(plain[1]):
            raise DataError(
                f"{self.what}: the class names of {where} in another order than that of its ids "
                f"({', '.join(own[:SHOWN])}); order them alike, or leave the file away"
            )
        return list(self.names)

    def of_folders(self, folders: Sequence[str], where: str, complete: bool = False) -> list[str]:
        """Names of class folders: by the name but for case and punctuation, by the id where the
        folders are numbers, or by the first of two columns; never by order alone.

        Raises DataError for a folder that none of these names, and with `complete` for a name
        without a folder.
        """
        if self.keys is not None:
            return self._renamed(folders, where)
        plain = [normalise(name) for name in self.names]
        place = {name: i for i, name in enumerate(plain) if plain.count(name) == 1}
        found = [place.get(normalise(folder)) for folder in folders]
        if not any(i is not None for i in found) and all(name.isdecimal() for name in folders):
            found = [int(name) if int(name) < len(plain) else None for name in folders]
        unknown = [name for name, i in zip(folders, found, strict=True) if i is None]
        if unknown:
            raise DataError(
                f"{self.what}: no line names the class folders {', '.join(unknown[:SHOWN])} of "
                f"{where} ({len(unknown)} of {len(folders)}), and the order of lines alone proves "
                "nothing; write FOLDER, a tab and the name on each line (`paste <(ls "
                f"{where}) {self.what}`, if the order is that of the folders)"
            )
        without = [self.names[i] for i in range(len(plain)) if i not in found]
        if complete and without:
            raise DataError(
                f"{self.what}: no class folder in {where} for {', '.join(without[:SHOWN])} "
                f"({len(without)} names); take these lines out, or add the images"
            )
        return [self.names[i] for i in found if i is not None]

    def _renamed(self, own: Sequence[str], where: str) -> list[str]:
        table = dict(zip(self.keys or (), self.names, strict=True))
        lacking = [name for name in own if name not in table]
        if lacking:
            raise DataError(
                f"{self.what}: no line for {', '.join(lacking[:SHOWN])} of {where} "
                f"({len(lacking)} of {len(own)} classes)"
            )
        return [table[name] for name in own]


def read_names(path: Path) -> GivenNames:
    """Class names of a text file, one a line; or two columns, with a tab between them.

    Raises ConfigError where there is no such file, DataError for an empty line, a line of another
    number of columns, and what is named twice in the first of two columns.
    """
    lines = _lines(path, "class names")
    columns = [tuple(cell.strip() for cell in line.split("\t")) for line in lines]
    width = len(columns[0])
    for number, cells in enumerate(columns, start=1):
        if not all(cells) or len(cells) != width or width > 2:
            raise DataError(
                f"{path}, line {number}: {lines[number - 1]!r} is not a class name, or a folder "
                "and its name with a tab between them, as all lines must be alike"
            )
    if width == 1:
        return GivenNames(str(path), tuple(name for (name,) in columns))
    keys, names = zip(*columns, strict=True)
    twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
    if twice:
        raise DataError(f"{path}: {', '.join(twice[:SHOWN])} stand there twice")
    return GivenNames(str(path), names, keys)


@dataclass(frozen=True)
class Templates:
    """Templates with `{}`, where they are from, and one word that tells them from others."""

    lines: list[str]
    what: str
    label: str


def read_templates(given: str | Path) -> Templates:
    """Templates of a preset of prompts/templates.json, or of a file.

    A file is JSON (a list of strings), or text with one template a line, in which the class name is
    `{}`, or `{c}` as CLIP_benchmark writes it. Raises ConfigError for neither, and for a line
    without a place for the name, or with two.
    """
    if str(given) in texts.presets():
        return Templates(texts.load_templates(str(given)), str(given), str(given))
    path = Path(given)
    if path.suffix == ".json":
        lines = texts.load_templates(str(path))
    elif path.is_file():
        lines = [line.strip().replace("{c}", "{}") for line in _lines(path, "templates")]
        for number, line in enumerate(lines, start=1):
            if line.count("{}") != 1:
                raise ConfigError(
                    f"{path}, line {number}: {line!r} needs {{}} once, where the class name goes"
                )
    else:
        known = ", ".join(texts.presets())
        raise ConfigError(f"--templates {given}: neither a file nor one of {known}")
    return Templates(lines, str(path), f"templates_{digest(lines)[:8]}")


def _lines(path: Path, what: str) -> list[str]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; {what} are read from it")
    lines = text_lines(read_text(path))
    if not lines:
        raise DataError(f"{path}: an empty file; write the {what}, one a line")
    return lines
