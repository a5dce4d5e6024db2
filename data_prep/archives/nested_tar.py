"""Images of class archives or class folders, indexed once and read where they lie.

ImageNet is published as a tar that holds one tar per class. The inner tars are stored as they are,
so an image starts where its class tar starts plus its place in there, and nothing is unpacked. The
index takes 14 bytes an image (200 MB for 14 million).

Sources: a tar of class tars (`n01440764.tar`), a tar of images, or a folder of class tars, of class
folders, or of images. Groups (classes) are sorted by name and images by name within a group, so
all forms of a set give the same order of images.
"""

import hashlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.archives.image_table import ROW, Images, open_indexed
from loaders.errors import DataError
from loaders.progress import Progress
from loaders.tarreader import iterate_members

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
_BLOCK = 512
_PACKED = {  # first bytes -> what unpacks it
    b"\x1f\x8b": "gunzip -k",
    b"BZh": "bunzip2 -k",
    b"\xfd7zXZ": "unxz -k",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\x03\x04": "unzip",
}
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE)
_SKIPPED = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)
# Pax records that overrule the name or the size in the header that follows them.
_OVERRULES = re.compile(rb"\d+ (path|size|GNU\.sparse[^=]*)=")
_OF_CLASS = re.compile(rb"(n\d{8})_")


def open_images(source: Path, out: Path) -> Images:
    """Index of `source`, kept in the working folder of the set `out` until the source changes.

    Several processes may call this at once: one indexes, the others wait for it. Raises
    `DataError` as `index` does, and if `out` holds files that no preparation made.
    """
    return open_indexed(source, out, index, _state)


def index(source: Path) -> Images:
    """Index a source without reading images.

    Raises `DataError` for a compressed, truncated or damaged archive, a name that occurs twice,
    and a source that is none of the forms that this module lists.
    """
    try:
        return _index_folder(source) if source.is_dir() else _index_tar(source)
    except OSError as error:
        raise DataError(f"{error.filename or source}: {error.strerror}") from None


def is_image(name: str) -> bool:
    """Whether a file is an image, by its base name."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def refuse_compressed(path: Path) -> None:
    """Raise `DataError` with the command that unpacks it if `path` is a compressed archive."""
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, command in _PACKED.items():
        if start.startswith(magic):
            raise DataError(
                f"{path}: compressed, but images are read by their place in the plain archive; "
                f"unpack it once: {command} {path}"
            )


class _Index:
    """Grows by one group after another, in sorted order."""

    def __init__(self, source: Path, keep_names: bool) -> None:
        self._source, self._keep_names = source, keep_names
        self._groups: list[tuple[str, str, int]] = []
        self._rows, self._names = [], []
        self._ignored: list[str] = []
        self._digest = hashlib.sha256()

    def add(self, group: str, container: Path, files: list[tuple[str, int, int]]) -> None:
        """Add the images among `files`: (path in the container, offset or -1, size)."""
        if self._groups and group == self._groups[-1][0]:
            raise DataError(f"{self._source}: class {group!r} occurs twice; remove one")
        images = []
        for path, offset, size in files:
            name = path.rpartition("/")[2]
            if is_image(name):
                images.append((os.fsencode(name), offset, size))
            else:
                self.ignore(f"{group}/{path}" if group else path)
        images.sort()
        names = [name for name, _, _ in images]
        for name, following in itertools.pairwise(names):
            if name == following:
                raise DataError(f"{self._source}: {group}/{os.fsdecode(name)} occurs twice")
        code = os.fsencode(group)
        for name, _, size in images:
            self._digest.update(b"%b/%b %d\n" % (code, name, size))
        if images and max(size for _, _, size in images) >= 1 << 32:
            raise DataError(f"{self._source}: {group!r} has a file over 4 GiB: not an image")
        rows = [(len(self._groups), offset, size) for _, offset, size in images]
        self._rows.append(np.array(rows, ROW))
        if self._keep_names:
            self._names.append(np.array(names, "S"))
        other = [m for name in names if (m := _OF_CLASS.match(name)) and m[1] != code]
        self._groups.append((group, str(container), len(other) if group else 0))

    def ignore(self, name: str) -> None:
        if len(self._ignored) < 10 and not name.rpartition("/")[2].startswith("."):
            self._ignored.append(name)

    def images(self) -> Images:
        groups, containers, misplaced = zip(*self._groups, strict=True)
        names = np.concatenate(self._names) if self._keep_names else None
        rows = np.concatenate(self._rows)
        ignored, digest = tuple(self._ignored), self._digest.hexdigest()
        return Images(groups, containers, misplaced, rows, names, digest, ignored)


def _index_tar(path: Path) -> Images:
    refuse_compressed(path)
    members = []
    total = path.stat().st_size
    with Progress(total=total, unit="B", scaled=True, desc=f"index {path.name}") as bar:
        for member in iterate_members(path):
            members.append(member)
            bar.update(member.offset + member.size - bar.n)
    tars = sorted((m for m in members if m.name.endswith(".tar")), key=lambda m: Path(m.name).stem)
    found = _Index(path, keep_names=not tars)
    if not tars:
        found.add("", path, [(m.name, m.offset, m.size) for m in members])
        return found.images()
    for member in members:
        if not member.name.endswith(".tar"):
            found.ignore(member.name)
    with (
        open(path, "rb", buffering=0) as file,
        Progress(total=total, unit="B", scaled=True, desc="index class archives") as bar,
    ):
        for tar in tars:
            what = f"{path}: class archive {tar.name!r}"
            files = list(_walk(what, file.fileno(), tar.offset, tar.offset + tar.size))
            found.add(Path(tar.name).stem, path, files)
            bar.update(tar.size)
    return found.images()


def _index_folder(source: Path) -> Images:
    entries = sorted(
        (e for e in os.scandir(source) if not e.name.startswith(".")), key=lambda e: e.name
    )
    tars = [e for e in entries if e.name.endswith(".tar") and e.is_file()]
    folders = [e for e in entries if e.is_dir()]
    images = [e for e in entries if is_image(e.name) and e.is_file()]
    kinds = {"class archives": tars, "class folders": folders, "images": images}
    present = [f"{len(items)} {kind}" for kind, items in kinds.items() if items]
    if len(present) != 1:
        raise DataError(
            f"{source}: holds {' and '.join(present) or 'nothing of use'}; name a folder with "
            "class archives (n01440764.tar), class folders (n01440764/) or images, one of these"
        )
    found = _Index(source, keep_names=not tars)
    if images:
        found.add("", source, _files(source))
        return found.images()
    for entry in Progress(tars or folders, desc=f"index {source.name}", unit="class"):
        path = Path(entry.path)
        if tars:
            with open(path, "rb", buffering=0) as file:
                files = list(_walk(str(path), file.fileno(), 0, path.stat().st_size))
            found.add(path.stem, path, files)
        else:
            found.add(path.name, path, _files(path))
    return found.images()


def _files(folder: Path) -> list[tuple[str, int, int]]:
    return [(e.name, -1, e.stat().st_size) for e in os.scandir(folder) if e.is_file()]


def _walk(what: str, number: int, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """Regular files of the tar that is bytes start..end of a file: (name, offset, size)."""
    position, last = start, "its start"
    while position < end:
        header = os.pread(number, min(_BLOCK, end - position), position)
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:
            return
        except tarfile.HeaderError as error:
            packed = position == start and any(header.startswith(magic) for magic in _PACKED)
            reason = "compressed; unpack it" if packed else f"damaged after {last} ({error})"
            raise DataError(f"{what}: at byte {position} of the file: {reason}") from None
        data = position + _BLOCK
        size = 0 if member.type in _SKIPPED else member.size
        if data + size > end:
            raise DataError(
                f"{what}: cut short: member {member.name!r} ends at byte {data + size} of the "
                f"file, but the class archive at byte {end}; get it again"
            )
        if member.type in _REGULAR:
            yield member.name, data, size
        elif member.type in _PAX and not _OVERRULES.search(os.pread(number, size, data)):
            pass  # times and owners
        elif member.type not in _SKIPPED:
            raise DataError(
                f"{what}: at byte {position} of the file: a long name or a special file, which "
                "the official archives do not have; write it again with `tar --format=ustar`"
            )
        last = f"member {member.name!r}"
        position = data + -(-size // _BLOCK) * _BLOCK


def _state(source: Path) -> str:
    """What changes when the source does: sizes and times of its files or class folders."""
    try:
        paths = [source, *sorted(source.iterdir())] if source.is_dir() else [source]
        facts = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    except OSError as error:
        raise DataError(f"{error.filename or source}: {error.strerror}") from None
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
