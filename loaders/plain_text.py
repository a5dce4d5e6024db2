"""Text files as people's editors and programs write them (standard library only).

A byte order mark, Windows line ends and empty lines at the end belong to the file and not to the
text: each would otherwise become part of a class name, a prompt or a caption, or a class more.
"""

from pathlib import Path

from loaders.errors import DataError

BYTE_ORDER_MARK = "\ufeff"
_MAX_BYTES = 1 << 28  # of a manifest, a list of names, or any other text file


def plain(text: str) -> str:
    """`text` without a byte order mark in front, with line feeds alone as line ends."""
    text = text.removeprefix(BYTE_ORDER_MARK)
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def decode_text(data: bytes) -> str:
    """The text of a UTF-8 file, `plain`; raises `UnicodeDecodeError`."""
    return plain(data.decode("utf-8"))


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, `plain`.

    Raises `DataError` for one too large to be meant, or not UTF-8; `OSError` if it cannot be read.
    """
    try:
        if path.stat().st_size <= _MAX_BYTES:
            return decode_text(path.read_bytes())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    raise DataError(f"{path}: larger than {_MAX_BYTES} bytes; write it again")


def text_lines(text: str) -> list[str]:
    """Lines of a text. Empty ones at its end are none; others stay, since their place may count."""
    lines = plain(text).splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    return lines
