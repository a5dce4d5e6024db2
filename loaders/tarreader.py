"""Random access to the samples of uncompressed tar shards (standard library and numpy only).

A shard is indexed once by walking its 512-byte headers; images are not read. The index is a
structured array, one row per sample, kept as a memory-mapped `.npy` file next to the shard, so
that an open data set costs no memory in proportion to its size and a worker process shares the
pages with all others. Members are then read by offset.

The headers are read by loaders/tarheaders.py. Samples: the members whose path agrees up to the
first dot of the base name, as in the webdataset convention; members of one sample must be
adjacent.
"""

import codecs
import json
import os
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np

from loaders.errors import DataError
from loaders.tarheaders import MEND, SAMPLE_NAME, Member, iterate_members, require_file, shown
from loaders.tarheaders import sample_key as sample_key

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
READ_EXTENSIONS = (
    f"images as {' '.join('.' + end for end in IMAGE_EXTENSIONS)}, captions as .txt or in .json, "
    "class numbers as .cls or in .json"
)
NO_LABEL = -1
INDEX_FOLDER = ".index"
INDEX_VERSION = 2
INDEX_ENVIRONMENT = "UNICL_INDEX_DIR"
# What a tar claims is never taken into memory unseen: a file with holes may claim any size.
PARTS = {"image": 1 << 29, "text": 1 << 24, "json": 1 << 24}  # bytes of a member that is read
# NAME of members `.NAME.npy`, read by loaders/arrays.py. Only a tar with one has columns for them.
ARRAYS = {"objects": 1 << 24}
MAX_BYTES = PARTS | ARRAYS
ABSENT, TOO_LARGE = -1, -2  # as offsets in the index

_MAX_CLASS_BYTES = 64  # of a `.cls`


def build_index(path: str | os.PathLike) -> np.ndarray:
    """Index a tar: one row per sample, in tar order, without reading images.

    Returns a structured array with fields `key` (bytes), `image_offset`, `image_size`,
    `text_offset`, `text_size`, `json_offset`, `json_size`, two more for each of ARRAYS that any
    sample has (offset ABSENT: no such member, TOO_LARGE: more than MAX_BYTES), and `label` (from
    `.cls`, else the integer `label` of `.json`, else -1). Raises `DataError` as `iterate_members`,
    and for a key that occurs twice, a malformed `.cls`, or no image at all.
    """
    require_file(path)
    rows, seen, extensions = [], set(), set()
    with open(path, "rb", buffering=0) as file:
        for key, parts in _iterate_samples(path):
            if key in seen:
                raise DataError(
                    f"{path}: sample key {shown(key)} occurs twice: its members do not follow one "
                    "another, or two samples have the same key. Give each sample a key of its own "
                    "and write its members side by side, as tar does that sorts by name: "
                    "tar --sort=name -cf NEW.tar -C FOLDER ."
                )
            seen.add(key)
            extensions.update(parts)
            image = next((parts[name] for name in IMAGE_EXTENSIONS if name in parts), None)
            members = {"image": image, "text": parts.get("txt"), "json": parts.get("json")}
            members |= {name: parts.get(f"{name}.npy") for name in ARRAYS}
            rows.append((os.fsencode(key), members, _read_label(path, key, file.fileno(), parts)))
    if not extensions.intersection(IMAGE_EXTENSIONS):
        if not extensions:
            raise DataError(f"{path}: empty: no sample in it; delete the shard")
        raise DataError(
            f"{path}: no sample with an image: its members end in {listed(extensions)}. Read are "
            f"{READ_EXTENSIONS}. Write the shard again with such names (keys hold no dot), or "
            "leave it out"
        )
    held = [part for part in MAX_BYTES if part in PARTS or f"{part}.npy" in extensions]
    places = (
        (key, *(number for part in held for number in _place(part, members[part])), label)
        for key, members, label in rows
    )
    return np.array(list(places), dtype=_row_type(max(len(row[0]) for row in rows), held))


def member_extensions(path: str | os.PathLike, key: str) -> set[str]:
    """What the members of a sample end in, those that are not read included; walks the tar."""
    members = (SAMPLE_NAME.fullmatch(member.name) for member in iterate_members(path))
    return {match.group(2).lower() for match in members if match and match.group(1) == key}


def listed(extensions: Iterable[str]) -> str:
    """Extensions for a message, with their dots, at most ten."""
    names = sorted(extensions)
    return ", ".join(shown(f".{name}") for name in names[:10]) + ", …" * (len(names) > 10)


def open_index(path: str | os.PathLike) -> np.ndarray:
    """Memory-mapped index of a tar (see `build_index`), built and stored when there is none.

    Stored as `.index/NAME.SIZE.MTIME.v2.npy` beside the tar, so a changed tar gets a new index;
    when that folder cannot be written, under the folder named by `UNICL_INDEX_DIR`. Written
    under another name and renamed, so ranks may race. Raises `DataError` when neither can be
    written.
    """
    path = Path(path)
    require_file(path)
    before = path.stat()
    name = f"{path.name}.{before.st_size}.{before.st_mtime_ns}.v{INDEX_VERSION}.npy"
    folders = [path.parent / INDEX_FOLDER]
    if os.environ.get(INDEX_ENVIRONMENT):
        # Tars of different folders have equal names: one sub-folder per folder.
        digest = sha256(os.fsencode(path.parent.resolve())).hexdigest()[:16]
        folders.append(Path(os.environ[INDEX_ENVIRONMENT]).expanduser() / digest)
    for folder in folders:
        index = _load_index(folder / name, before.st_size)
        if index is not None:
            return index
    index = build_index(path)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"{path}: the tar changed while it was indexed; wait for its writer to end")
    reasons = []
    for folder in folders:
        try:
            _store_index(folder, path.name, name, index)
            return _mapped(folder / name)
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or error}")
    raise DataError(
        f"{path}: cannot store its index ({'; '.join(reasons)}); set the environment variable "
        f"{INDEX_ENVIRONMENT} to a folder that can be written"
    )


class ShardReader:
    """Reads bytes of shards by offset, with at most `limit` files open.

    Descriptors are kept per process: after a fork they would share the kernel's read-ahead
    state, which interleaved readers spoil. For one thread; pickles without its descriptors.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._files: OrderedDict[tuple[int, str], _Descriptor] = OrderedDict()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """The `size` bytes of the file `path` that start at `offset`; `DataError` if cut short."""
        slot = (os.getpid(), path)
        file = self._files.get(slot)
        if file is None:
            file = self._files[slot] = _Descriptor(path)
            while len(self._files) > self._limit:
                self._files.popitem(last=False)
        else:
            self._files.move_to_end(slot)
        data = os.pread(file.number, size, offset)
        if len(data) < size:
            raise DataError(f"{path}: shorter than when it was indexed (changed since?); {MEND}")
        return data

    def __getstate__(self) -> dict:
        return {"_limit": self._limit, "_files": OrderedDict()}


class _Descriptor:
    """An open file descriptor that is closed with its last reference."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def indexed_parts(index: np.ndarray) -> list[str]:
    """Those of MAX_BYTES that an index has columns for."""
    return [part for part in MAX_BYTES if f"{part}_offset" in (index.dtype.names or ())]


def _row_type(key_bytes: int, parts: Iterable[str]) -> np.dtype:
    names = [f"{part}_{what}" for part in parts for what in ("offset", "size")]
    return np.dtype([("key", f"S{key_bytes}")] + [(n, "<i8") for n in (*names, "label")])


def _place(part: str, member: Member | None) -> tuple[int, int]:
    """Offset and size of a member in an index row."""
    if member is None:
        return ABSENT, 0
    fits = member.size <= MAX_BYTES[part]
    return (member.offset, member.size) if fits else (TOO_LARGE, 0)


def _mapped(file: Path) -> np.ndarray:
    """The array in a file, mapped; as a plain array, whose rows cost a third of a memmap's."""
    return np.load(file, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _load_index(file: Path, tar_bytes: int) -> np.ndarray | None:
    """A stored index, None if there is none or it is damaged: it can always be made again.

    It may have come with the tars from anywhere, so no member may lie outside of the tar.
    """
    try:
        index = _mapped(file)
        parts = list(dict.fromkeys([*PARTS, *indexed_parts(index)]))
        if index.ndim != 1 or index.dtype != _row_type(index.dtype["key"].itemsize, parts):
            return None
    except Exception:  # numpy and the compiler that reads its header raise anything on such files
        return None
    for part in parts:
        offset, size = index[f"{part}_offset"], index[f"{part}_size"]
        fits = (size <= MAX_BYTES[part]) & (size <= tar_bytes - offset)
        inside = (offset >= 0) & (size >= 0) & fits
        if not (inside | (((offset == ABSENT) | (offset == TOO_LARGE)) & (size == 0))).all():
            return None
    return index


def _iterate_samples(path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Adjacent members grouped by sample key: (key, lower-case extension -> member)."""
    current, parts = None, {}
    for member in iterate_members(path):
        match = SAMPLE_NAME.fullmatch(member.name)
        if match is None or re.match(r"__[^/]*__($|/)", member.name):
            continue  # no extension, a hidden file, or webdataset's own meta data
        key, extension = match.group(1), match.group(2).lower()
        if key != current:
            if current is not None:
                yield current, parts
            current, parts = key, {}
        if extension in parts:
            raise DataError(
                f"{path}: sample {shown(key)} has two members {shown('.' + extension)}; keys must "
                f"be unique and hold no dot; {MEND}"
            )
        parts[extension] = member
    if current is not None:
        yield current, parts


def _read_label(path, key: str, number: int, parts: dict[str, Member]) -> int:
    """Class id of a sample: `.cls`, else an integer `label` in `.json`, else `NO_LABEL`."""
    if "cls" in parts:
        member = parts["cls"]
        text = os.pread(number, min(member.size, _MAX_CLASS_BYTES + 1), member.offset)
        try:
            if len(text) > _MAX_CLASS_BYTES:
                raise ValueError
            return int(np.int64(int(text.removeprefix(codecs.BOM_UTF8))))
        except (ValueError, OverflowError):
            raise DataError(
                f"{path}: sample {shown(key)}: .cls must hold one class number, found "
                f"{text[:40]!r}; {MEND}"
            ) from None
    if "json" in parts and parts["json"].size <= MAX_BYTES["json"]:
        text = os.pread(number, parts["json"].size, parts["json"].offset)
        if b'"label"' in text:  # parsing every json of a caption set would take minutes
            try:
                label = json.loads(text)["label"]
            except (ValueError, KeyError, TypeError, RecursionError):
                return NO_LABEL  # a damaged .json is counted when the sample is used
            if type(label) is int and abs(label) < 2**63:
                return label
    return NO_LABEL


def _store_index(folder: Path, tar_name: str, name: str, index: np.ndarray) -> None:
    """Write the index atomically, then remove those of earlier states of the tar."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{name}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "wb") as file:
            np.save(file, index)
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    old = re.compile(re.escape(tar_name) + r"\.\d+\.\d+\.v\d+\.npy")
    for other in folder.iterdir():
        if other.name != name and old.fullmatch(other.name):
            other.unlink(missing_ok=True)
