"""Random access to the samples of uncompressed tar shards (standard library and numpy only).

A shard is indexed once by walking its 512-byte headers; images are not read. The index is a
structured array, one row per sample, kept as a memory-mapped `.npy` file next to the shard, so
that an open data set costs no memory in proportion to its size and a worker process shares the
pages with all others. Members are then read by offset.

Format: POSIX.1-2017 `pax` interchange format (ustar headers, `x` and `g` records) and GNU tar's
long names. Samples: the members whose path agrees up to the first dot of the base name, as in
the webdataset convention; members of one sample must be adjacent.
"""

import json
import os
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from loaders.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
NO_LABEL = -1
INDEX_FOLDER = ".index"
INDEX_VERSION = 1
INDEX_ENVIRONMENT = "UNICL_INDEX_DIR"
MEND = "download or write the shard again"

_BLOCK = 512
_MAX_EXTENSION_BYTES = 1 << 20  # of a long name or pax record; a real one has some hundred bytes
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, directories, pipes
_SAMPLE_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: its name, and where its `size` bytes start in the tar."""

    name: str
    offset: int
    size: int


def iterate_members(path: str | os.PathLike) -> Iterator[Member]:
    """Walk the headers of a tar and yield its regular files in tar order.

    Directories, links and devices are skipped. Raises `DataError` for an empty, compressed,
    truncated or damaged tar, for sparse members, and for absolute names or names with `..`.
    """
    with open(path, "rb", buffering=0) as file:
        total = os.fstat(file.fileno()).st_size
        if total == 0:
            raise DataError(f"{path}: empty file, not a tar; delete it or {MEND}")
        position, shared, own, last = 0, {}, {}, "the start"
        while True:
            header = os.pread(file.fileno(), _BLOCK, position)
            if len(header) < _BLOCK:
                raise DataError(
                    f"{path}: truncated after {last}: the tar has no end mark, so samples may be "
                    f"missing; {MEND}"
                )
            if not any(header):
                return
            kind = header[156:157]
            name, size = _parse_header(path, position, header)
            if kind not in (b"L", b"K", b"x", b"g"):
                fields = {**shared, **own}
                own = {}
                name = fields.get("path", name)
                size = _pax_size(path, name, fields, size)
            data = position + _BLOCK
            if kind in _WITHOUT_DATA or (kind == b"\0" and name.endswith("/")):
                size = 0
            if data + size > total:
                raise DataError(
                    f"{path}: truncated: member {name!r} (sample {sample_key(name)!r}) ends at "
                    f"byte {data + size} but the file has {total}; {MEND}"
                )
            if kind in (b"L", b"x", b"g"):
                found = _read_extension(path, kind, file.fileno(), data, size)
                (shared if kind == b"g" else own).update(found)
            elif kind in _REGULAR and not name.endswith("/"):
                yield Member(_safe_name(path, name), data, size)
                last = f"member {name!r}"
            elif kind != b"K" and kind not in _WITHOUT_DATA and kind not in _REGULAR:
                raise DataError(
                    f"{path}: member {name!r} has type {kind!r} (sparse or vendor format), which "
                    "is not supported; write the tar again with plain files"
                )
            position = data + -(-size // _BLOCK) * _BLOCK


def sample_key(name: str) -> str:
    """Sample key of a member: its path up to the first dot of the base name."""
    match = _SAMPLE_NAME.fullmatch(name)
    return match.group(1) if match else name


def build_index(path: str | os.PathLike) -> np.ndarray:
    """Index a tar: one row per sample, in tar order, without reading images.

    Returns a structured array with fields `key` (bytes), `image_offset`, `image_size`,
    `text_offset`, `text_size`, `json_offset`, `json_size` (offset -1: no such member) and
    `label` (from `.cls`, else the integer `label` of `.json`, else -1). Raises `DataError` as
    `iterate_members`, and for a key that occurs twice, a malformed `.cls`, or no image at all.
    """
    rows, seen, extensions = [], set(), set()
    with open(path, "rb", buffering=0) as file:
        for key, parts in _iterate_samples(path):
            if key in seen:
                raise DataError(
                    f"{path}: sample key {key!r} occurs twice: the members of a sample must be "
                    f"adjacent and keys unique; {MEND}"
                )
            seen.add(key)
            extensions.update(parts)
            image = next((parts[name] for name in IMAGE_EXTENSIONS if name in parts), None)
            row = [os.fsencode(key)]
            for member in (image, parts.get("txt"), parts.get("json")):
                row += [-1, 0] if member is None else [member.offset, member.size]
            rows.append((*row, _read_label(path, key, file.fileno(), parts)))
    if not extensions.intersection(IMAGE_EXTENSIONS):
        found = ", ".join(sorted(extensions)[:10]) or "none"
        raise DataError(
            f"{path}: empty: no sample with an image ({', '.join(IMAGE_EXTENSIONS)}); extensions "
            f"found: {found}; delete the shard, or check the member names (keys hold no dot)"
        )
    width = max(len(row[0]) for row in rows)
    names = [f"{part}_{what}" for part in ("image", "text", "json") for what in ("offset", "size")]
    return np.array(rows, dtype=[("key", f"S{width}")] + [(n, "<i8") for n in (*names, "label")])


def open_index(path: str | os.PathLike) -> np.ndarray:
    """Memory-mapped index of a tar (see `build_index`), built and stored when there is none.

    Stored as `.index/NAME.SIZE.MTIME.v1.npy` beside the tar, so a changed tar gets a new index;
    when that folder cannot be written, under the folder named by `UNICL_INDEX_DIR`. Written
    under another name and renamed, so ranks may race. Raises `DataError` when neither can be
    written.
    """
    path = Path(path)
    before = path.stat()
    name = f"{path.name}.{before.st_size}.{before.st_mtime_ns}.v{INDEX_VERSION}.npy"
    folders = [path.parent / INDEX_FOLDER]
    if os.environ.get(INDEX_ENVIRONMENT):
        # Tars of different folders have equal names: one sub-folder per folder.
        digest = sha256(os.fsencode(path.parent.resolve())).hexdigest()[:16]
        folders.append(Path(os.environ[INDEX_ENVIRONMENT]) / digest)
    for folder in folders:
        try:
            return np.load(folder / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            continue  # none there, or a damaged one: an index can always be made again
    index = build_index(path)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"{path}: the tar changed while it was indexed; wait for its writer to end")
    reasons = []
    for folder in folders:
        try:
            _store_index(folder, path.name, name, index)
            return np.load(folder / name, mmap_mode="r", allow_pickle=False)
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
        if slot not in self._files:
            self._files[slot] = _Descriptor(path)
            while len(self._files) > self._limit:
                self._files.popitem(last=False)
        self._files.move_to_end(slot)
        data = os.pread(self._files[slot].number, size, offset)
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


def _parse_header(path, position: int, header: bytes) -> tuple[str, int]:
    """Name and size of a ustar or GNU header block, after checking its checksum."""
    expected = _number(header[148:156])
    # The sum counts the checksum field itself as eight spaces.
    if expected != sum(header) - sum(header[148:156]) + 8 * 32:
        packed = position == 0 and header.startswith((b"\x1f\x8b", b"BZh", b"\x28\xb5\x2f\xfd"))
        what = "a compressed tar; unpack it first" if packed else f"header is damaged; {MEND}"
        raise DataError(f"{path}: at byte {position}: {what}")
    name = header[:100].split(b"\0", 1)[0]
    # Only POSIX headers hold the front part of a long name here; GNU's hold times.
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    name = os.fsdecode(prefix + b"/" + name if prefix else name)
    size = _number(header[124:136])
    if size is None or size < 0:
        raise DataError(f"{path}: member {name!r} states an impossible size; {MEND}")
    return name, size


def _number(field: bytes) -> int | None:
    """A tar number: octal text, or GNU's base 256 when the first bit is set; None if neither."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big") if field[0] < 255 else -1
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return None


def _pax_size(path, name: str, fields: dict[str, str], size: int) -> int:
    """Size of a member when pax records may overrule the header."""
    if any(field.startswith("GNU.sparse.") for field in fields):
        raise DataError(f"{path}: member {name!r} is sparse; write the tar again with plain files")
    text = fields.get("size", str(size))
    if not text.isdecimal():
        raise DataError(f"{path}: member {name!r} states an impossible size {text!r}; {MEND}")
    return int(text)


def _read_extension(path, kind: bytes, number: int, offset: int, size: int) -> dict[str, str]:
    """Fields that a GNU long name (`L`) or pax header (`x`, `g`) sets for members after it."""
    if size > _MAX_EXTENSION_BYTES:
        raise DataError(f"{path}: a long-name record of {size} bytes at byte {offset}; {MEND}")
    data = os.pread(number, size, offset)
    if kind == b"L":
        return {"path": os.fsdecode(data.split(b"\0", 1)[0])}
    fields = {}
    while data.strip(b"\0"):
        length, space, _ = data.partition(b" ")
        end = int(length) if space and length.isdigit() else 0
        field, equals, value = data[len(length) + 1 : max(end - 1, 0)].partition(b"=")
        if not equals or end > len(data):
            raise DataError(f"{path}: damaged pax record at byte {offset}; {MEND}")
        fields[os.fsdecode(field)] = os.fsdecode(value)
        data = data[end:]
    return fields


def _safe_name(path, name: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(f"{path}: member name {name!r} leaves the archive; do not use this tar")
    return name


def _iterate_samples(path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Adjacent members grouped by sample key: (key, lower-case extension -> member)."""
    current, parts = None, {}
    for member in iterate_members(path):
        match = _SAMPLE_NAME.fullmatch(member.name)
        if match is None or re.match(r"__[^/]*__($|/)", member.name):
            continue  # no extension, a hidden file, or webdataset's own meta data
        key, extension = match.group(1), match.group(2).lower()
        if key != current:
            if current is not None:
                yield current, parts
            current, parts = key, {}
        if extension in parts:
            raise DataError(
                f"{path}: sample {key!r} has two members .{extension}; keys must be unique and "
                f"hold no dot; {MEND}"
            )
        parts[extension] = member
    if current is not None:
        yield current, parts


def _read_label(path, key: str, number: int, parts: dict[str, Member]) -> int:
    """Class id of a sample: `.cls`, else an integer `label` in `.json`, else `NO_LABEL`."""
    if "cls" in parts:
        text = os.pread(number, parts["cls"].size, parts["cls"].offset)
        try:
            return int(np.int64(int(text)))
        except (ValueError, OverflowError):
            raise DataError(
                f"{path}: sample {key!r}: .cls must hold one class number, found {text[:40]!r}"
            ) from None
    if "json" in parts:
        text = os.pread(number, parts["json"].size, parts["json"].offset)
        if b'"label"' in text:  # parsing every json of a caption set would take minutes
            try:
                label = json.loads(text)["label"]
            except (ValueError, KeyError, TypeError):
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
