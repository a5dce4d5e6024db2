"""Raw tar headers, which the standard library would not write, and limits of a process."""

import io
import resource
import struct
import tarfile
import zlib

from tests.loaders.conftest import encoded


def header(name: bytes = b"k.jpg", size: bytes | int = 0, kind: bytes = b"0", **fields: bytes):
    """A ustar header block with a good checksum; `size` may be raw bytes of the field.

    `fields`: raw bytes by offset, as `at345=b"…"`.
    """
    block = bytearray(tarfile.BLOCKSIZE)
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    parts = {0: name, 100: b"0000644\0", 124: field, 156: kind, 257: b"ustar\x0000"}
    parts |= {int(offset.removeprefix("at")): value for offset, value in fields.items()}
    for offset, value in parts.items():
        block[offset : offset + len(value)] = value
    return sign(block)


def sign(block: bytearray) -> bytes:
    """The block with its checksum made right."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    """Data filled up to whole blocks."""
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


def member(name: bytes, data: bytes, **fields) -> bytes:
    """Header and data of a regular file."""
    return header(name, len(data), **fields) + padded(data)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    """A pax header with these records."""
    body = b""
    for key, value in records:
        length = len(key) + len(value) + 3
        total = length + len(str(length + len(str(length))))
        body += b"%d %s=%s\n" % (total, key, value)
    return raw_pax(body, kind)


def raw_pax(body: bytes, kind: bytes = b"x") -> bytes:
    """A pax header with this content, right or wrong."""
    return header(b"PaxHeaders/0", len(body), kind) + padded(body)


def good_sample(key: bytes = b"good", **extra: bytes) -> bytes:
    """Members of a sample with a picture and a caption."""
    parts = {"jpg": encoded(1), "txt": b"a caption"} | extra
    return b"".join(member(key + b"." + end.encode(), data) for end, data in parts.items())


END = bytes(2 * tarfile.BLOCKSIZE)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bytes_per_pixel: int = 3, bits: int = 8) -> bytes:
    """A complete all-zero PNG; grey, grey with alpha, RGB, RGBA by bytes per pixel at 8 bits."""
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[bytes_per_pixel] if bits == 8 else 0
    packer, row = zlib.compressobj(1), bytes(1 + width * bytes_per_pixel)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    start = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", start), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, data) for kind, data in chunks)


def png_header(width: int, height: int) -> bytes:
    """A PNG that states these sides and holds less than a row."""
    start = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", start) + body + png_chunk(b"IEND", b"")


def limit_memory(more: int) -> None:
    """Let this process (a child of a test) reserve only `more` bytes from here on."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def tar_bytes(members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of the standard library."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()
