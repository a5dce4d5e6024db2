"""Checking one shard, read once from front to back: what `verify.py` does in its workers."""

import io
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.sets import set_folder
from data_prep.sets.shard_writer import permutation
from loaders.arrays import BadArray, parse
from loaders.errors import DataError
from loaders.tarreader import (
    ARRAYS,
    IMAGE_EXTENSIONS,
    INDEX_FOLDER,
    NO_LABEL,
    TOO_LARGE,
    build_index,
    indexed_parts,
    iterate_members,
    open_index,
)

RESULTS = "verify"
# As the training loader refuses them (loaders/views.py): Pillow's limit against decompression
# bombs, and no format for which Pillow would start another program.
MAX_PIXELS = 89_478_485
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
LABEL_FAULT = "label: "
_VERSION = 3
_CHUNK = 1 << 20


class Unreadable(Exception):
    """The shard as a whole cannot be used; its message is the reason."""


@dataclass(frozen=True)
class Task:
    """One shard to check."""

    out: Path
    shard: int
    successes: int  # samples by its statistics
    kind: str
    classes: int
    decode: int | None  # images to decode, None: all

    @property
    def tar(self) -> Path:
        return self.out / set_folder.SHARDS / f"{set_folder.shard_name(self.shard)}.tar"

    @property
    def result(self) -> Path:
        """Where the result is kept."""
        return self.out / RESULTS / f"{set_folder.shard_name(self.shard)}.json"

    def state(self) -> dict:
        """What a kept result must agree with, besides the number of decoded images."""
        table = self.tar.with_suffix(".parquet")
        stat = self.tar.stat() if self.successes or self.tar.exists() else None
        return {
            "version": _VERSION,
            "bytes": stat.st_size if stat else 0,
            "mtime_ns": stat.st_mtime_ns if stat else None,
            "table_mtime_ns": table.stat().st_mtime_ns if table.exists() else None,
            "successes": self.successes,
            "kind": self.kind,
            "classes": self.classes,
        }


def kept_result(task: Task) -> dict | None:
    """The result of an earlier run, if the tar is the same and as much was decoded."""
    try:
        result = json.loads(task.result.read_bytes())
        same = all(result[key] == value for key, value in task.state().items())
        enough = result["decode"] is None or result["decode"] == task.decode
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return result if same and enough else None


def check_shard(task: Task, read: Callable[[int], None] = lambda size: None) -> dict:
    """Check one tar; keep the result in D/verify/ if the tar is readable. `read` hears of bytes.

    Returns the state of the tar with `samples`, `sha256`, `decoded` (number of whole images),
    `seconds` (processor time), `widths` (of each kind of array, all that there are), `bad` (list of
    key and reason), and `fault`: why it cannot be used,
    or None. Raises `DataError` when that cannot be said: the disk fails, or the tar changes.
    """
    start = time.process_time()
    try:
        result = {**task.state(), "decode": task.decode, "fault": None}
        if task.successes:
            result |= _check_samples(task, result["bytes"], read)
        else:
            result |= _check_empty(task)
        if task.state()["mtime_ns"] != result["mtime_ns"]:
            raise DataError(f"{task.tar}: changed while it was read; wait for its writer to end")
    except Unreadable as error:
        return {"fault": str(error)}
    except OSError as error:
        raise DataError(
            f"{task.tar}: cannot be read ({error.strerror or error}); nothing was moved. Mend the "
            "disk or the rights, and run verify.py again: shards that were checked are kept"
        ) from None
    result["seconds"] = round(time.process_time() - start, 3)
    set_folder.replace_file(task.result, json.dumps(result))
    return result


def _check_empty(task: Task) -> dict:
    """A shard of which every download failed: a tar, if there is one, must not hold an image."""
    nothing = {"samples": 0, "sha256": None, "decoded": 0, "widths": {}, "bad": []}
    if not task.tar.exists():
        return nothing
    endings = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
    try:
        names = [m.name for m in iterate_members(task.tar) if m.name.lower().endswith(endings)]
    except DataError as error:
        raise Unreadable(str(error)) from None
    if names:
        raise Unreadable(f"{task.tar}: holds {names[0]!r}, but its statistics say 0 samples")
    return nothing


def _check_samples(task: Task, size: int, read: Callable[[int], None]) -> dict:
    index = _index(task)
    count = len(index) if task.decode is None else min(task.decode, len(index))
    chosen = np.zeros(len(index), dtype=bool)
    chosen[permutation(len(index), seed=task.shard)[:count]] = True
    bad, decoded, widths = [], 0, {}
    with open(task.tar, "rb", buffering=_CHUNK) as file:
        tape, parts = _Tape(task.tar, file, read), indexed_parts(index)
        for row, decode in zip(index, chosen, strict=True):
            members = _members(tape, row, parts)
            image_faults = list(_image_faults(members.get("image"), decode))
            decoded += bool(decode and not image_faults)
            faults = [
                *_label_faults(task, int(row["label"])),
                *image_faults,
                *_text_faults(members, task.kind == "image_text"),
                *_array_faults(row, members, widths),
            ]
            if faults:
                bad.append([os.fsdecode(bytes(row["key"])), "; ".join(faults)])
        tape.skip_to(size)
    widths = {name: sorted(found) for name, found in widths.items()}
    facts = {"samples": len(index), "sha256": tape.hexdigest(), "decoded": decoded}
    return {**facts, "widths": widths, "bad": bad}


def _index(task: Task) -> np.ndarray:
    """Walk all headers, check the counts, and see that the stored index is the same."""
    try:
        index = build_index(task.tar)
    except DataError as error:
        raise Unreadable(str(error)) from None
    if len(index) != task.successes:
        raise Unreadable(
            f"{task.tar}: holds {len(index)} samples, but its statistics say {task.successes}"
        )
    _check_parquet(task)
    if not np.array_equal(open_index(task.tar), index):
        for stored in (task.tar.parent / INDEX_FOLDER).glob(f"{task.tar.name}.*"):
            stored.unlink(missing_ok=True)
        open_index(task.tar)
    return index


def _check_parquet(task: Task) -> None:
    """The table beside a downloaded shard must be complete and hold a row for every sample."""
    path = task.tar.with_suffix(".parquet")
    if not path.exists():
        return
    from pyarrow import ArrowInvalid  # here: only downloads have one, and it loads slowly
    from pyarrow.parquet import read_metadata

    try:
        rows = read_metadata(path).num_rows
    except ArrowInvalid as error:
        raise Unreadable(f"{path}: not a complete parquet file ({error})") from None
    if rows < task.successes:
        raise Unreadable(f"{path}: {rows} rows for {task.successes} samples in the tar")


class _Tape:
    """A file that is read once from front to back, all of it into the hash."""

    def __init__(self, path: Path, file, read: Callable[[int], None]) -> None:
        self._path, self._file, self._read = path, file, read
        self._digest, self._position = sha256(), 0
        self.hexdigest = self._digest.hexdigest

    def read_to(self, end: int) -> bytes:
        """The bytes from the present position to `end`."""
        data = self._file.read(end - self._position)
        self._digest.update(data)
        self._position += len(data)
        if self._position < end:
            raise DataError(f"{self._path}: changed: ends at {self._position}, not {end}")
        self._read(len(data))
        return data

    def skip_to(self, end: int) -> None:
        """Go on to `end` without keeping the bytes."""
        while self._position < end:
            self.read_to(min(end, self._position + _CHUNK))


def _members(tape: _Tape, row: np.void, parts: Sequence[str]) -> dict[str, memoryview]:
    """Image, text, json and arrays of a sample, as far as it has them."""
    spans = {part: (int(row[f"{part}_offset"]), int(row[f"{part}_size"])) for part in parts}
    spans = {part: span for part, span in spans.items() if span[0] >= 0}
    if not spans:
        return {}
    first = min(offset for offset, _ in spans.values())
    tape.skip_to(first)
    block = memoryview(tape.read_to(max(offset + size for offset, size in spans.values())))
    return {
        part: block[offset - first : offset - first + size]
        for part, (offset, size) in spans.items()
    }


def _label_faults(task: Task, label: int) -> Iterator[str]:
    if label == NO_LABEL:
        if task.kind == "image_label":
            yield f"{LABEL_FAULT}none"
    elif task.classes and not 0 <= label < task.classes:
        yield f"{LABEL_FAULT}{label}, outside 0..{task.classes - 1}"


def _image_faults(data: memoryview | None, decode: bool) -> Iterator[str]:
    """Decode completely, but refuse too many pixels by the header."""
    if data is None or not len(data):
        yield "image: none" if data is None else "image: zero bytes"
        return
    if not decode:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and damaged meta data
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                yield f"image: {image.width} x {image.height} pixels, more than {MAX_PIXELS}"
                return
            image.load()
    except Exception as error:  # plug-ins raise anything on damaged data
        # Without the address of the object in Pillow's message, which differs between runs.
        yield "image: " + re.sub(r" <_io\.BytesIO.*?>", "", " ".join(str(error).split()))
        return
    if image.mode == "F":
        yield "image: floating-point pixels, which have no known range"


def _text_faults(members: dict[str, memoryview], needs_caption: bool) -> Iterator[str]:
    if "text" in members:
        try:
            empty = not str(members["text"], "utf-8-sig").strip()
        except UnicodeDecodeError as error:
            yield f"caption: not UTF-8 at byte {error.start}"
        else:
            if empty and needs_caption:
                yield "caption: empty"
    elif needs_caption and "json" not in members:
        yield "caption: none"
    if "json" in members:
        try:
            content = json.loads(bytes(members["json"]))
        except (ValueError, RecursionError) as error:
            yield f"json: {error}"
        else:
            if not isinstance(content, dict):
                yield f"json: {type(content).__name__} instead of an object"


def _array_faults(
    row: np.void, members: dict[str, memoryview], widths: dict[str, set[int]]
) -> Iterator[str]:
    """Arrays that training could not read; adds the width of the others to `widths`."""
    for name in ARRAYS:
        if f"{name}_offset" in row.dtype.names and row[f"{name}_offset"] == TOO_LARGE:
            yield f"{name}: more than {ARRAYS[name]} bytes"
        if name not in members:
            continue
        try:
            widths.setdefault(name, set()).add(parse(bytes(members[name])).shape[1])
        except BadArray as error:
            yield f"{name}: {error}"
