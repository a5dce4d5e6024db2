"""Reading `manifest.json` and class tables: form and values are checked before anything is used."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from loaders.errors import DataError
from loaders.tarheaders import shown

KINDS = ("image_label", "image_text")
MANIFEST = "manifest.json"
_MAX_BYTES = 1 << 28  # of a manifest or a list of class names
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class ClassEntry:
    """A class: its id (its position in the class table), WordNet synset or None, and names."""

    id: int
    synset: str | None
    names: tuple[str, ...]


def load_manifest(folder: Path) -> dict | None:
    """The manifest of a folder, None without one; `DataError` for what is not one."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(_read_text(path))
    except (ValueError, RecursionError):
        manifest = None
    if not _is_manifest(manifest):
        raise DataError(
            f"{path}: not a data set manifest (name, kind image_label or image_text, and shards "
            "with file, samples, bytes, the files inside of the folder); write it again with "
            "loaders.manifest.write_manifest"
        )
    return manifest


def load_classes(folder: Path, manifest: dict | None) -> list[ClassEntry]:
    """Classes of the manifest, without one those of `classnames.txt`; [] where there are none.

    Raises `DataError` as `parse_classes`.
    """
    if manifest is not None:
        return parse_classes(folder / MANIFEST, manifest.get("classes") or [])
    for place in (folder, folder.parent):
        path = place / "classnames.txt"
        if path.is_file():
            names = _read_text(path).splitlines()
            table = [{"id": i, "synset": None, "names": [n]} for i, n in enumerate(names)]
            return parse_classes(path, table)
    return []


def parse_classes(path: Path, table: list[dict]) -> list[ClassEntry]:
    """Check a class table: ids 0..n-1 in order, and non-empty names; else `DataError`."""
    entries = []
    for position, row in enumerate(table):
        if not isinstance(row, dict) or row.get("id") != position:
            found = row.get("id") if isinstance(row, dict) else row
            raise DataError(
                f"{path}: class {position} has id {shown(found)}; ids are 0..n-1 in order"
            )
        names = row.get("names") or [""]
        if not isinstance(names, list | tuple) or not all(
            is_text(name) and name.strip() for name in names
        ):
            raise DataError(
                f"{path}: class {position} has no name or an empty one; write its names"
            )
        if not isinstance(row.get("synset"), str | None):
            raise DataError(f"{path}: class {position} has a synset that is no text; mend it")
        entries.append(ClassEntry(position, row.get("synset"), tuple(names)))
    return entries


def _read_text(path: Path) -> str:
    """A whole UTF-8 file. `DataError` for one too large to be meant, or not UTF-8."""
    try:
        if path.stat().st_size <= _MAX_BYTES:
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    raise DataError(f"{path}: larger than {_MAX_BYTES} bytes; write it again")


def is_text(value) -> bool:
    """Whether `value` is a string of whole characters; JSON can state halves of a pair.

    Such a string fails where it is encoded: in tokenizers, hashes, file names and on terminals.
    """
    return isinstance(value, str) and not _SURROGATE.search(value)


def _is_manifest(content) -> bool:
    """Whether parsed JSON has the form of a manifest; class tables are checked elsewhere."""
    if not isinstance(content, dict) or not isinstance(content.get("shards"), list):
        return False
    good = content.get("kind") in KINDS and isinstance(content.get("name"), str)
    good = good and isinstance(content.get("classes") or [], list)
    return good and all(_is_shard(shard) for shard in content["shards"])


def _is_shard(shard) -> bool:
    if not isinstance(shard, dict) or not is_text(shard.get("file")):
        return False
    file = shard["file"]
    inside = not file.startswith("/") and ".." not in file.split("/") and "\0" not in file
    return inside and type(shard.get("samples")) is type(shard.get("bytes")) is int
