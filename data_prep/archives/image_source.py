"""Images read by name from where they lie: a folder, a zip or a plain tar, without unpacking.

An archive is read in place, so a set of 100,000 images costs no second copy and no inodes. A
source can be pickled; each process then opens the archive for itself.
"""

import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from data_prep.sets.shard_writer import Unusable
from loaders.errors import DataError
from loaders.progress import Progress
from loaders.tarreader import ShardReader, iterate_members

_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")  # a first file, or the end record of an empty zip
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError)


class ImageSource:
    """Files of one folder or archive by name: relative, with `/` between folders."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """Names of all regular files, sorted."""
        raise NotImplementedError

    def read(self, name: str, size: int = -1) -> bytes:
        """Content of a file, or its first `size` bytes.

        Raises `DataError` if there is none of this name or it is damaged.
        """
        raise NotImplementedError

    def _missing(self, name: str) -> DataError:
        return DataError(
            f"{self.path}: no file {name!r} in it; is this the right folder or archive, complete?"
        )


def open_images(path: Path) -> ImageSource:
    """Open a folder, zip or plain tar; an archive is told by its content, not by its name.

    Raises `DataError` if there is nothing, or the archive is damaged or compressed as a whole.
    """
    path = Path(path)
    if path.is_dir():
        return _Folder(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; name a folder, zip or plain tar of images"
        ) from None
    return _Zip(path) if start in _ZIP_STARTS else _Tar(path)


LOSSLESS = ("PPM", "BMP", "TIFF")  # formats that are written as PNG
NOT_AN_IMAGE = "not a jpeg, png or webp image"
IMAGE_START = 12  # bytes that say which kind of image a file is


def image_extension(data: bytes) -> str:
    """Member extension of an encoded image by its first `IMAGE_START` bytes: jpg, png or webp.

    Raises `Unusable` for anything else.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise Unusable(NOT_AN_IMAGE)


def stored_image(data: bytes, as_png: Sequence[str] = LOSSLESS) -> tuple[str, bytes]:
    """Member extension and bytes: jpg, png and webp as they are; formats `as_png`, as Pillow calls
    them, are written as PNG, of several frames the first.

    Raises `Unusable` for anything else.
    """
    try:
        return image_extension(data), data
    except Unusable:
        try:
            with Image.open(io.BytesIO(data), formats=as_png) as image:
                return "png", png(image)
        except Exception:  # plug-ins raise anything on damaged data
            raise Unusable(NOT_AN_IMAGE) from None


def png(image: Image.Image) -> bytes:
    """The pixels of an image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class ImagesByName:
    """Images of several sources, found by file name wherever an archive keeps them.

    COCO's zips have a folder `val2014/` inside, an unpacked copy may lack it, and Flickr30k's
    archives differ; the file names are the same in all.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._sources = [open_images(path) for path in paths]
        self._places: dict[str, list[tuple[int, str]]] = {}
        for number, source in enumerate(self._sources):
            for name in source.names():
                self._places.setdefault(name.rpartition("/")[2], []).append((number, name))

    def locate(self, wanted: Sequence[str]) -> list[tuple[int, str]]:
        """Place of each file as (source number, name in it), for `read`.

        `wanted`: paths like `val2014/a.jpg`; the folders only decide between files of the same
        name. Raises `DataError` that names files which are absent or there several times.
        """
        places, absent, several = [], [], []
        for path in wanted:
            found = self._places.get(path.rpartition("/")[2], [])
            if len(found) > 1:
                found = [p for p in found if f"/{p[1]}".endswith(f"/{path}")] or found
            if len(found) != 1:
                (several if found else absent).append(path)
            places += found[:1]
        where = ", ".join(str(source.path) for source in self._sources)
        if absent:
            raise DataError(
                f"{where}: {len(absent)} of {len(wanted)} images are not in there, first "
                f"{', '.join(absent[:5])}; complete the images, or name the other archives too"
            )
        if several:
            raise DataError(
                f"{where}: {len(several)} images are there more than once, first "
                f"{', '.join(several[:5])}; name each folder or archive once"
            )
        return places

    def check(self, places: Sequence[tuple[int, str]]) -> None:
        """Raise `DataError` that names files which are no images by their first bytes."""
        wrong = []
        in_order = sorted(places)  # as they lie in an archive, more or less
        for place in Progress(in_order, desc="looking at the images", unit="img"):
            try:
                image_extension(self._sources[place[0]].read(place[1], IMAGE_START))
            except Unusable as error:
                reason = str(error)
                wrong.append(self.where(place))
        if wrong:
            raise DataError(
                f"{len(wrong)} of {len(places)} images are unusable ({reason}), first "
                f"{', '.join(wrong[:5])}; restore them, or download the archive again"
            )

    def read(self, place: tuple[int, str]) -> bytes:
        """Content of the file at a place that `locate` gave."""
        return self._sources[place[0]].read(place[1])

    def where(self, place: tuple[int, str]) -> str:
        """Archive and name of the file at a place, for a message."""
        return f"{self._sources[place[0]].path}: {place[1]}"


class _Folder(ImageSource):
    def names(self) -> list[str]:
        return sorted(self._walk(self.path, "", frozenset()))

    def _walk(self, folder: Path, prefix: str, above: frozenset) -> Iterator[str]:
        """Files below `folder`. Links to folders are followed unless they lead back up."""
        try:
            here = os.stat(folder)
            identity = (here.st_dev, here.st_ino)
            entries = [] if identity in above else list(os.scandir(folder))
        except OSError as error:
            raise DataError(f"{folder}: {error.strerror}; make the folder readable") from None
        for entry in entries:
            if entry.is_dir():
                yield from self._walk(
                    Path(entry.path), f"{prefix}{entry.name}/", above | {identity}
                )
            elif entry.is_file():
                yield prefix + entry.name

    def read(self, name: str, size: int = -1) -> bytes:
        try:
            with open(self.path / name, "rb") as file:
                return file.read(size)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise self._missing(name) from None
        except OSError as error:
            raise DataError(f"{self.path / name}: {error.strerror}; mend the file") from None


class _Zip(ImageSource):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._owner, self._file, self._entries = -1, None, {}
        self._open()

    def _open(self) -> dict[str, zipfile.ZipInfo]:
        """Entries by name. Opened once a process: a fork would share the file position."""
        if self._owner != os.getpid():
            try:
                self._file = zipfile.ZipFile(self.path)
            except _ZIP_ERRORS as error:
                raise DataError(
                    f"{self.path}: damaged or incomplete zip ({error}); download it again"
                ) from None
            files = [entry for entry in self._file.infolist() if not entry.is_dir()]
            self._entries = {entry.filename.removeprefix("./"): entry for entry in files}
            self._owner = os.getpid()
        return self._entries

    def __getstate__(self) -> dict:
        return {"path": self.path, "_owner": -1, "_file": None, "_entries": {}}

    def names(self) -> list[str]:
        return sorted(self._open())

    def read(self, name: str, size: int = -1) -> bytes:
        entry = self._open().get(name)
        if entry is None:
            raise self._missing(name)
        try:
            with self._file.open(entry) as file:
                return file.read(size)  # of a whole file, it checks the CRC-32
        except _ZIP_ERRORS as error:
            raise DataError(
                f"{self.path}: cannot read {name!r} from the zip ({error}); download it again"
            ) from None


class _Tar(ImageSource):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        # Of members of equal name the last counts, as when a tar is unpacked.
        self._members = {
            member.name.removeprefix("./"): (member.offset, member.size)
            for member in iterate_members(path)
        }
        self._reader = ShardReader()

    def names(self) -> list[str]:
        return sorted(self._members)

    def read(self, name: str, size: int = -1) -> bytes:
        if name not in self._members:
            raise self._missing(name)
        offset, whole = self._members[name]
        return self._reader.read(str(self.path), offset, whole if size < 0 else min(size, whole))
