"""Pictures that a person names, one after the other: files, folders, globs, and tars of samples.

Nothing is held but names: a folder is listed a directory at a time, of tars there is their index.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.sources.presence import IMAGE_SUFFIXES
from loaders import specs
from loaders.errors import DataError
from loaders.manifest import ShardSet, open_shards
from loaders.manifest_file import MANIFEST
from loaders.printable import printable

Item = str | tuple[int, int]  # a path; or number of a set of tars and of its sample


@dataclass(frozen=True)
class Pictures:
    """What the arguments of a command mean, in their order.

    Attributes:
        sources: folders of images, lists of files, and opened sets of tars.
    """

    sources: tuple[Path | list[str] | ShardSet, ...]

    def __iter__(self) -> Iterator[Item]:
        for number, source in enumerate(self.sources):
            if isinstance(source, ShardSet):
                yield from ((number, i) for i in range(len(source)))
            else:
                yield from source if isinstance(source, list) else _below(source)

    def count(self) -> int:
        """How many there are. Folders are listed for it, as they are now."""
        sizes = (sum(1 for _ in _below(s)) if isinstance(s, Path) else len(s) for s in self.sources)
        return sum(sizes)

    def key(self, item: Item) -> str:
        """The name of a picture: its path, of a sample TAR:KEY; unusual characters as escapes."""
        if isinstance(item, str):
            return printable(item)
        number, i = item
        return printable(f"{self.sources[number].shard_of(i)}:{self.sources[number].key(i)}")

    def read(self, item: Item) -> bytes:
        """Bytes of the image file. Raises OSError, or `loaders.manifest.MissingMember`."""
        if isinstance(item, str):
            if not os.path.isfile(item):  # a pipe that is named x.jpg would be read for ever
                raise OSError("not a file")
            return Path(item).read_bytes()
        return self.sources[item[0]].read_image(item[1])


def find(arguments: Sequence[str]) -> Pictures:
    """The pictures that arguments name, each a file, a folder of images, a glob, or tars (a set's
    folder, a tar, a brace range, a glob).

    Hidden files and folders below a folder are passed over, and what has no suffix of an image.
    Raises DataError for what is not there or holds none, and as `open_shards`.
    """
    return Pictures(tuple(source for argument in arguments for source in _sources(argument)))


def _sources(argument: str) -> list[Path | list[str] | ShardSet]:
    path = specs.local(argument)
    if os.path.isdir(path):
        return [_folder(Path(path))]
    if os.path.isfile(path) and not path.endswith(".tar"):
        return [[path]]
    if path.endswith(".tar"):
        return [open_shards(path, kind="image_text")]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise DataError(f"{argument}: no such file or folder, and no file matches it as a glob")
    files = [name for name in found if os.path.isfile(name)]
    if len(files) == len(found) and not any(name.endswith(".tar") for name in files):
        return [files]
    return [source for name in found for source in _sources(glob.escape(name))]


def _folder(folder: Path) -> Path | ShardSet:
    if (
        (folder / MANIFEST).is_file()
        or any(folder.glob("*.tar"))
        or any(folder.glob("shards/*.tar"))
    ):
        return open_shards(str(folder), kind="image_text")
    if next(_below(folder), None) is None:
        raise DataError(
            f"{folder}: neither an image ({', '.join(sorted(IMAGE_SUFFIXES))}) in it or below, nor "
            f"tars or {MANIFEST}"
        )
    return folder


def _below(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield os.path.join(place, name)
