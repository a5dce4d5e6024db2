"""Data sets of tar shards: what they hold, and reading it by sample index.

A data set is a folder with `manifest.json` and tars in `shards/`; foreign webdataset tars work
without one: kind and classes are then found from the index of the tars. Only numpy and the
standard library are imported here, so that data preparation runs without torch.
"""

import bisect
import hashlib
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from loaders.errors import DataError
from loaders.manifest_file import CAPTION_LINES as CAPTION_LINES
from loaders.manifest_file import (
    KINDS,
    MANIFEST,
    ClassEntry,
    is_retrieval_folder,
    load_classes,
    load_manifest,
    parse_classes,
    states_caption_lines,
)
from loaders.plain_text import decode_text
from loaders.specs import expand
from loaders.tarheaders import shown
from loaders.tarreader import NO_LABEL, TOO_LARGE, ShardReader, open_index

_OPEN_INDEXES = 64  # each memory-mapped index holds a file descriptor


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A tar: its path, number of samples, bytes, and sha256 (None without a manifest)."""

    path: str
    samples: int
    bytes: int
    sha256: str | None


class MissingMember(LookupError):
    """A sample lacks what was asked for; `reason` is one short word for the counts."""

    reason = "no_image"


class MissingArray(MissingMember):
    """A sample lacks an array; `reason` names it, as `no_objects`."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.reason = f"no_{name}"


class OversizedMember(MissingMember):
    """An image, text, JSON or array too large to be read (`tarreader.MAX_BYTES`)."""

    reason = "member_too_large"


class ShardSet:
    """The samples of several tars as one sequence: shard order, then tar order.

    `kind` decides the training label: `image_label` trains on the class id; `image_text` always
    has the label -1, whatever `labels` holds (it then serves evaluation only). `caption_lines`:
    paths of the tars in which each line of a text is a caption.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        classes: Sequence[ClassEntry],
        shards: Sequence[ShardInfo],
        caption_lines: Collection[str] = (),
    ) -> None:
        self.name, self.kind, self.caption_lines = name, kind, frozenset(caption_lines)
        self.classes, self.shards = list(classes), list(shards)
        self.shard_sizes = np.array([shard.samples for shard in shards], dtype=np.int64)
        self._ends = np.cumsum(self.shard_sizes).tolist()  # searched for every read
        self._reader = ShardReader()
        self._index = lru_cache(maxsize=_OPEN_INDEXES)(open_index)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_index"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._index = lru_cache(maxsize=_OPEN_INDEXES)(open_index)

    @property
    def folder(self) -> Path:
        """Folder of the data set, the one of its first tar."""
        return _home(self.shards[0].path)

    @cached_property
    def labels(self) -> np.ndarray:
        """Class ids (n,) int64 from `.cls` or `json.label`, -1 where absent."""
        return np.concatenate([open_index(shard.path)["label"] for shard in self.shards])

    @property
    def fingerprint(self) -> str:
        """sha256 over the names, bytes and sample counts of the shards, in order."""
        content = [[Path(s.path).name, s.bytes, s.samples] for s in self.shards]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def key(self, i: int) -> str:
        """Key of sample i: its member names up to the first dot."""
        return os.fsdecode(bytes(self._row(i)[1]["key"]))

    def shard_of(self, i: int) -> str:
        """Path of the tar that holds sample i."""
        return self._row(i)[0]

    def label(self, i: int) -> int:
        """Class id of sample i, -1 where absent."""
        return int(self._row(i)[1]["label"])

    def read_image(self, i: int) -> bytes:
        """Encoded image of sample i; raises `MissingMember` if it has none.

        As the other readers: `OversizedMember` for one that is too large to be meant, `DataError`
        if the tar has become shorter.
        """
        data = self._read(i, "image")
        if data is None:
            raise MissingMember(f"{self._describe(i)} has no image")
        return data

    def read_text(self, i: int) -> str | None:
        """Content of `.txt`, None if absent; raises `UnicodeDecodeError` if it is not UTF-8.

        Without a byte order mark, and with line feeds as line ends.
        """
        data = self._read(i, "text")
        return None if data is None else decode_text(data)

    def read_json(self, i: int) -> dict | None:
        """Content of `.json`, None if absent; raises `ValueError` if it is not a JSON object."""
        data = self._read(i, "json")
        if data is None:
            return None
        try:
            content = json.loads(data)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content

    def read_array(self, i: int, name: str) -> bytes:
        """Content of `.NAME.npy` of sample i, NAME of `tarreader.ARRAYS`; what is in it is not
        looked at (`loaders.arrays`). Raises `MissingArray` if there is none.
        """
        held = f"{name}_offset" in self._row(i)[1].dtype.names  # by any sample of its tar
        data = self._read(i, name) if held else None
        if data is None:
            raise MissingArray(f"{self._describe(i)} has no .{name}.npy", name)
        return data

    def _describe(self, i: int) -> str:
        return f"{self.shard_of(i)}: sample {shown(self.key(i))}"

    def _row(self, i: int) -> tuple[str, np.void]:
        if not 0 <= i < self._ends[-1]:
            raise IndexError(f"sample {i} of {len(self)} in {self.name}")
        number = bisect.bisect_right(self._ends, i)
        shard = self.shards[number]
        return shard.path, self._index(shard.path)[i - self._ends[number] + shard.samples]

    def _read(self, i: int, part: str) -> bytes | None:
        path, row = self._row(i)
        offset, size = int(row[f"{part}_offset"]), int(row[f"{part}_size"])
        if offset == TOO_LARGE:
            raise OversizedMember(f"{self._describe(i)}: its {part} is too large to be read")
        try:
            return None if offset < 0 else self._reader.read(path, offset, size)
        except DataError as error:
            raise DataError(f"{error}; found at sample {shown(self.key(i))}") from None


def shard_paths(spec: str | os.PathLike | Sequence[str]) -> list[str]:
    """Paths of the tars that `open_shards` would open; looks only whether they are there.

    Raises `DataError` for one that is missing or listed twice, and for none.
    """
    parts = [spec] if isinstance(spec, str | os.PathLike) else list(spec)
    parts = [part for text in parts for part in os.fspath(text).split("::") if part]
    paths = [str(Path(path)) for part in parts for path in expand(part, _listed_tars)]
    repeated = [path for path, times in Counter(paths).items() if times > 1]
    if not paths or repeated:
        raise DataError(f"{spec}: " + (f"listed twice: {repeated[:10]}" if repeated else "no tar"))
    return paths


def open_shards(
    spec: str | os.PathLike | Sequence[str], kind: str | None = None, name: str | None = None
) -> ShardSet:
    """Open a data set.

    `spec`: a folder with `manifest.json`, a folder of tars, a tar, a brace range
    `a/{00000..00331}.tar`, a glob, or several of these as a list or joined by `::`. A
    `manifest.json` in the folder, or in the one above `shards/`, gives kind, classes and the
    expected size of each tar; without one, the set is image_label if every sample has a label,
    and its classes are the lines of a `classnames.txt` beside the tars or one folder above. A
    `kind` given here wins. Raises `DataError` for missing or damaged shards, and for an
    image_label set whose classes or labels are absent or do not fit.
    """
    paths = shard_paths(spec)
    if kind not in (None, *KINDS):
        raise DataError(f"{spec}: kind {kind!r} is not one of {', '.join(KINDS)}")
    folders = list(dict.fromkeys(_home(path) for path in paths))
    manifests = {folder: load_manifest(folder) for folder in folders}
    tables = [load_classes(folder, manifests[folder]) for folder in folders]
    if any(table != tables[0] for table in tables):
        raise DataError(
            f"{spec}: the folders {folders[0]} and others have different class tables, so equal "
            "ids would mean different classes; configure them as separate sources"
        )
    stated = {
        str(folder / shard["file"]): shard
        for folder, manifest in manifests.items()
        for shard in (manifest or {}).get("shards", [])
    }
    found = [_shard_info(path, manifests[_home(path)] and stated.get(path, {})) for path in paths]
    shards, ranges = [info for info, _ in found], [labels for _, labels in found]
    if kind is None:
        kinds = {manifest["kind"] if manifest else None for manifest in manifests.values()}
        if len(kinds) > 1:
            raise DataError(f"{spec}: folders of different kinds; configure them as two sources")
        kind = kinds.pop() or _infer_kind(ranges)
    first = manifests[folders[0]]
    name = name or (first["name"] if first else folders[0].resolve().name)
    shard_set = ShardSet(name, kind, tables[0], shards, _caption_lines(paths, manifests))
    if kind == "image_label":
        _check_labels(shard_set, ranges)
    return shard_set


def write_manifest(
    folder: str | os.PathLike,
    name: str,
    kind: str,
    classes: Sequence[ClassEntry | dict] | None,
    source: str,
    license: str,
    date: str,
    attempted: int,
    extra: dict | None = None,
    shards: Sequence[ShardInfo] | None = None,
) -> dict:
    """Index and hash the tars in `folder/shards`, check them, and write `folder/manifest.json`.

    `classes`: `ClassEntry`s or dicts with id, synset, names, in id order; required for
    image_label. `date`: YYYY-MM-DD. `attempted`: samples that were tried; the kept ones are
    counted. `extra`: further keys. `shards`: the tars of `folder/shards` to list, when their
    facts are known; they are then not read. Equal input gives equal bytes. Returns the manifest;
    raises `DataError` as `open_shards` does.
    """
    folder = Path(folder)
    table = [asdict(c) if isinstance(c, ClassEntry) else dict(c) for c in classes or []]
    if shards is None:
        shards = [_hash_shard(path) for path in sorted((folder / "shards").glob("*.tar"))]
    samples = sum(shard.samples for shard in shards)
    manifest = {
        "name": name,
        "kind": kind,
        "classes": table,
        "num_samples": samples,
        "shards": [
            {"file": f"shards/{Path(shard.path).name}"}
            | {key: value for key, value in asdict(shard).items() if key != "path"}
            for shard in shards
        ],
        "source": source,
        "license": license,
        "date": date,
        "yield": {"attempted": attempted, "kept": samples},
    }
    clash = sorted(set(extra or {}) & set(manifest))
    for wrong, what in (
        (not shards, "no *.tar in shards/"),
        (kind not in KINDS, f"kind {kind!r} is not one of {', '.join(KINDS)}"),
        (not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date), f"date {date!r} is not YYYY-MM-DD"),
        (clash, f"extra keys {clash} belong to the manifest itself"),
    ):
        if wrong:
            raise DataError(f"{folder}: {what}")
    entries = parse_classes(folder / MANIFEST, table)
    if kind == "image_label":
        ranges = [_label_range(open_index(shard.path)) for shard in shards]
        _check_labels(ShardSet(name, kind, entries, shards), ranges)
    manifest.update(extra or {})
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    temporary = folder / f"{MANIFEST}.{secrets.token_hex(8)}.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)
    return json.loads(text)


def _hash_shard(path: Path) -> ShardInfo:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardInfo(str(path), len(open_index(path)), path.stat().st_size, digest)


def _listed_tars(folder: Path) -> list[str] | None:
    """Tars that a folder's manifest lists; None without a manifest."""
    manifest = load_manifest(folder)
    return manifest and [os.path.join(folder, shard["file"]) for shard in manifest["shards"]]


def _home(path: str) -> Path:
    """Folder of the data set that a tar belongs to."""
    folder = Path(path).parent
    above = folder.parent
    return above if folder.name == "shards" and (above / MANIFEST).is_file() else folder


def _caption_lines(paths: Sequence[str], manifests: dict[Path, dict | None]) -> set[str]:
    """Those of the tars in which each line of a text is a caption."""
    found = {path for path in paths if states_caption_lines(manifests[_home(path)])}
    places: dict[Path, set[str]] = {}
    for path in paths:  # linked tars, as of data_prep/import_shards.py, are looked up at both ends
        for place in (os.path.abspath(path), os.path.realpath(path)):
            places.setdefault(Path(place).parent, set()).add(path)
    return found.union(*(tars for place, tars in places.items() if is_retrieval_folder(place)))


def _shard_info(path: str, stated: dict | None) -> tuple[ShardInfo, tuple[int, int, bool]]:
    """Facts about a tar and its range of labels, from one look at its index.

    Raises `DataError` if they are not what its manifest states (None: it has none).
    """
    index = open_index(path)
    size, samples, labels = os.path.getsize(path), len(index), _label_range(index)
    if stated is None:
        return ShardInfo(path, samples, size, None), labels
    if (stated.get("bytes"), stated.get("samples")) != (size, samples):
        raise DataError(
            f"{path}: {size} bytes, {samples} samples, but the manifest says "
            f"{stated or 'nothing of this shard'}; restore it, or write the manifest "
            "again with loaders.manifest.write_manifest"
        )
    return ShardInfo(path, samples, size, stated.get("sha256")), labels


def _label_range(index: np.ndarray) -> tuple[int, int, bool]:
    """Smallest and largest label of a shard, and whether every sample has one."""
    labels = index["label"]
    return int(labels.min(initial=0)), int(labels.max(initial=0)), bool((labels != NO_LABEL).all())


def _infer_kind(ranges: Sequence[tuple[int, int, bool]]) -> str:
    """image_label if every sample has a label; the ranges are those of all shards."""
    return "image_label" if all(complete for *_, complete in ranges) else "image_text"


def _check_labels(shard_set: ShardSet, ranges: Sequence[tuple[int, int, bool]]) -> None:
    """`DataError` unless the class table is present and holds the label of every sample."""
    if not shard_set.classes:
        raise DataError(
            f"{shard_set.folder}: an image_label set needs a class table: 'classes' in {MANIFEST} "
            '([{"id": 0, "synset": null, "names": ["cat"]}, …], which data_prep/verify.py writes '
            "for a set that data_prep made), or classnames.txt beside the tars with one name a "
            "line in id order; or open it as kind image_text"
        )
    for number, (low, high, _) in enumerate(ranges):
        if low >= 0 and high < len(shard_set.classes):
            continue
        shard = shard_set.shards[number]
        labels = open_index(shard.path)["label"]
        wrong = np.flatnonzero((labels < 0) | (labels >= len(shard_set.classes)))
        i = int(wrong[0])
        what = "no label" if labels[i] == NO_LABEL else f"label {labels[i]}"
        i += sum(before.samples for before in shard_set.shards[:number])
        raise DataError(
            f"{shard.path}: sample {shown(shard_set.key(i))} has {what}, but an image_label set "
            f"needs 0..{len(shard_set.classes) - 1} ({len(wrong)} such samples in this tar); mend "
            ".cls or json.label, complete the class table, or open the set as kind image_text"
        )
