"""The headers of a tar: which regular files it holds, and where (standard library only).

Format: POSIX.1-2017 `pax` interchange format (ustar headers, `x` and `g` records) and GNU tar's
long names. A tar is taken for hostile: no claim of a header is believed before it is compared
with the size of the file, and nothing is ever unpacked.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from loaders.errors import DataError

MEND = "download or write the shard again"
MAX_NAME_BYTES = 4096  # Linux's PATH_MAX; one long key would widen every row of an index

_BLOCK = 512
_MAX_EXTENSION_BYTES = 1 << 20  # of a long name or pax record; a real one has some hundred bytes
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, directories, pipes
_PAX_RECORD = re.compile(rb"(\d{1,8}) ([^=]+)=")
SAMPLE_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar: its name, and where its `size` bytes start in the tar."""

    name: str
    offset: int
    size: int


def iterate_members(path: str | os.PathLike) -> Iterator[Member]:
    """Walk the headers of a tar and yield its regular files in tar order.

    Directories, links and devices are skipped. Raises `DataError` for what is no regular file, an
    empty, compressed, truncated or damaged tar, for sparse members, and for names that are
    absolute, longer than MAX_NAME_BYTES, or hold `..` or a zero byte.
    """
    require_file(path)
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
                    f"{path}: truncated: member {shown(name)} (sample {shown(sample_key(name))}) "
                    f"ends at byte {data + size} but the file has {total}; {MEND}"
                )
            if kind in (b"L", b"x", b"g"):
                found = _read_extension(path, kind, file.fileno(), data, size)
                (shared if kind == b"g" else own).update(found)
            elif kind in _REGULAR and not name.endswith("/"):
                yield Member(_safe_name(path, name), data, size)
                last = f"member {shown(name)}"
            elif kind != b"K" and kind not in _WITHOUT_DATA and kind not in _REGULAR:
                raise DataError(
                    f"{path}: member {shown(name)} has type {kind!r} (sparse or vendor "
                    "format), which is not supported; write the tar again with plain files"
                )
            position = data + -(-size // _BLOCK) * _BLOCK


def shown(value: object) -> str:
    """A name, sample key or value for a message: quoted, without control characters, not long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]}… ({len(text)} characters)"


def sample_key(name: str) -> str:
    """Sample key of a member: its path up to the first dot of the base name."""
    match = SAMPLE_NAME.fullmatch(name)
    return match.group(1) if match else name


def require_file(path) -> None:
    """`DataError` for a pipe, device or folder: opening a pipe would wait for its writer."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"{path}: not a regular file; name a tar")


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
        raise DataError(f"{path}: member {shown(name)} states an impossible size; {MEND}")
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
    if "sparse" in fields:
        raise DataError(
            f"{path}: member {shown(name)} is sparse; write the tar again with plain files"
        )
    text = fields.get("size", str(size))
    if not re.fullmatch(r"[0-9]{1,30}", text):
        raise DataError(
            f"{path}: member {shown(name)} states an impossible size {shown(text)}; {MEND}"
        )
    return int(text)


def _read_extension(path, kind: bytes, number: int, offset: int, size: int) -> dict[str, str]:
    """`path`, `size` and `sparse` of the members after a GNU long name or pax header, if set."""
    if size > _MAX_EXTENSION_BYTES:
        raise DataError(f"{path}: a long-name record of {size} bytes at byte {offset}; {MEND}")
    data = os.pread(number, size, offset)
    if kind == b"L":
        return {"path": os.fsdecode(data.split(b"\0", 1)[0])}
    fields, position = {}, 0
    data = data.rstrip(b"\0")
    while position < len(data):
        match = _PAX_RECORD.match(data, position)
        end = position + int(match.group(1)) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise DataError(f"{path}: damaged pax record at byte {offset + position}; {MEND}")
        field = match.group(2)
        if field in (b"path", b"size"):
            fields[field.decode()] = os.fsdecode(data[match.end() : end - 1])
        elif field.startswith(b"GNU.sparse."):
            fields["sparse"] = "yes"
        position = end
    return fields


def _safe_name(path, name: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(
            f"{path}: member name {shown(name)} leaves the archive; do not use this tar"
        )
    if "\0" in name or len(os.fsencode(name)) > MAX_NAME_BYTES:
        raise DataError(
            f"{path}: member name {shown(name)} holds a zero byte or more than {MAX_NAME_BYTES} "
            f"bytes; {MEND}"
        )
    return name
