"""Reading `manifest.json` and class tables: form and values are checked before anything is used."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from loaders.errors import DataError
from loaders.plain_text import read_text, text_lines
from loaders.tarheaders import shown

KINDS = ("image_label", "image_text")
MANIFEST = "manifest.json"
CAPTION_LINES = "caption_lines"  # key of a manifest: each line of a text is a caption
_DATASET_TYPE = "dataset_type.txt"
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
        manifest = json.loads(read_text(path))
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
            names = text_lines(read_text(path))
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


def states_caption_lines(manifest: dict | None) -> bool:
    """Whether a manifest says that each line of a sample's text is a caption of its own."""
    manifest = manifest or {}
    if manifest.get(CAPTION_LINES) is True:
        return True
    # Sets that data_prep/yfcc.py made of DeCLIP's list before it wrote the key.
    identity = manifest.get("identity")
    declip = isinstance(identity, dict) and identity.get("list") == "declip"
    return declip and manifest.get("tool") == "data_prep/yfcc.py"


def is_retrieval_folder(folder: Path) -> bool:
    """Whether CLIP_benchmark reads the tars of a folder line by line as captions.

    It does where `dataset_type.txt`, in the folder above, holds `retrieval` (CLIP_benchmark 1.6.2,
    datasets/builder.py, build_wds_dataset); in the folder itself it counts as well.
    """
    files = [place / _DATASET_TYPE for place in (folder, folder.parent)]
    return any(file.is_file() and read_text(file).strip().lower() == "retrieval" for file in files)


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
