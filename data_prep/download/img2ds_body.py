"""The body of an answer: decompressed as browsers do, and named where its first bytes tell that it
is no image. Used by img2ds_child.py; standard library only.

Names are reasons of data_prep/download/reasons.py. What is not named here goes to OpenCV.
"""

import json
import re
import zlib

_GZIP = b"\x1f\x8b"
_MAX_ENCODINGS = 5  # of one body; urllib3 has this limit too
_HEAD_BYTES = 4096  # comments and declarations before the first tag of a page
_JSON_BYTES = 1 << 20  # larger ones are not parsed to be named
_TAG = re.compile(rb"<(svg|html|head|body|title|script|!doctype\s+html|!doctype\s+svg)\b", re.I)


class NoImage(Exception):
    """A body that is no image; the message is the reason that is counted."""


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """The body without its Content-Encoding (RFC 9110: gzip, x-gzip, deflate, identity).

    Raises `NoImage` for another encoding, damaged data, and more than `limit` bytes: `too large`.
    A body that claims gzip and is none is taken as it is.
    """
    names = [name.strip().lower() for name in encoding.split(",")]
    names = [name for name in names if name not in ("", "identity")]
    if len(names) > _MAX_ENCODINGS:
        raise NoImage(f"compressed body ({len(names)} encodings)")
    for name in reversed(names):  # in the order of their application
        if name in ("gzip", "x-gzip"):
            body = _inflate(body, (31,), limit, name) if body.startswith(_GZIP) else body
        elif name == "deflate":
            body = _inflate(body, (15, -15), limit, name)  # zlib, or raw as some servers send it
        else:
            raise NoImage(f"compressed body ({name[:40]})")
    return body


def _inflate(body: bytes, window_bits: tuple[int, ...], limit: int, name: str) -> bytes:
    """The first of several forms of zlib data that fits."""
    for bits in window_bits:
        stream = zlib.decompressobj(bits)
        try:
            data = stream.decompress(body, limit + 1)
        except zlib.error:
            continue
        if len(data) > limit:
            raise NoImage("too large")
        if stream.eof:
            return data
    raise NoImage(f"compressed body ({name}, damaged)")


def name_other(body: bytes) -> str | None:
    """What a body is that is surely no image that OpenCV reads; None where that is not known."""
    if not body:
        return "empty body"
    start = body[:_HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    if body.startswith(_GZIP):
        return "compressed body (gzip, not announced)"
    if start.startswith(b"%PDF-"):
        return "pdf"
    if start.startswith(b"<"):
        tag = _TAG.search(start)
        return None if tag is None else "svg" if b"svg" in tag[1].lower() else "html page"
    if start[:1] in (b"{", b"[") and len(body) <= _JSON_BYTES:
        try:
            json.loads(body)
        except (ValueError, RecursionError):
            return None
        return "json"
    return None
