"""The images of a source, as rows of (class, place, size) that are read one by one."""

import fcntl
import json
import os
import zipfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data_prep.archives.image_source import image_extension
from data_prep.sets import set_folder
from loaders.errors import DataError
from loaders.tarreader import ShardReader

ROW = np.dtype([("group", "<u2"), ("offset", "<i8"), ("size", "<u4")])
INDEX = "images.npz"
_BLOCK = 512


@dataclass(frozen=True)
class Images:
    """The images of a source. `rows` (n,) of `ROW`; an `offset` of -1 means a file of its own."""

    groups: tuple[str, ...]  # ("",) for a source without classes
    containers: tuple[str, ...]  # the tar or folder of each group
    misplaced: tuple[int, ...]  # files of each group that are named for another WNID
    rows: np.ndarray
    names: np.ndarray | None  # (n,) bytes; None: read from the tar header before each image
    digest: str  # SHA-256 over group, name and size of all images
    ignored: tuple[str, ...]  # up to ten of the files that are not images by their names
    passed_over: dict[str, int] = field(default_factory=dict)  # class folders: what -> how many
    _reader: ShardReader = field(default_factory=ShardReader, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def counts(self) -> np.ndarray:
        """Images of each group, (number of groups,)."""
        return np.bincount(self.rows["group"], minlength=len(self.groups))

    def only(self, groups: Collection[str]) -> "Images":
        """The same without the other groups; the digest stays that of the whole source."""
        kept = [i for i, group in enumerate(self.groups) if group in groups]
        number = np.full(len(self.groups), -1, np.int32)
        number[kept] = np.arange(len(kept))
        chosen = number[self.rows["group"]] >= 0
        rows = self.rows[chosen]
        rows["group"] = number[rows["group"]]
        return replace(
            self,
            groups=tuple(self.groups[i] for i in kept),
            containers=tuple(self.containers[i] for i in kept),
            misplaced=tuple(self.misplaced[i] for i in kept),
            rows=rows,
            names=None if self.names is None else self.names[chosen],
        )

    def read(self, i: int) -> tuple[str, bytes]:
        """Name and bytes of image `i`. `DataError` if the source is not as it was indexed."""
        group, offset, size = self.rows[i].item()
        place = self.containers[group]
        name = None if self.names is None else os.fsdecode(self.names[i])
        try:
            if offset < 0:
                place = os.path.join(place, name)
                return name, _read_file(place, size)
            if name is None:
                header = self._reader.read(place, offset - _BLOCK, 100)
                name = os.fsdecode(header.split(b"\0", 1)[0]).rpartition("/")[2]
            return name, self._reader.read(place, offset, size)
        except OSError as error:
            where = "" if offset < 0 else f"{name or 'image'} at byte {offset}: "
            raise DataError(f"{place}: {where}{error.strerror}; mend or restore it") from None


def _read_file(path: str, size: int) -> bytes:
    with open(path, "rb") as file:
        data = file.read()
    if len(data) != size:
        raise DataError(
            f"{path}: {len(data)} bytes, but {size} when it was indexed; begin anew in another "
            "folder"
        )
    return data


def open_indexed(
    source: Path, out: Path, index: Callable[[Path], Images], state_of: Callable[[Path], str]
) -> Images:
    """What `index(source)` gives, kept in the working folder of the set `out` while `state_of`
    the source stays the same.

    Several processes may call this at once: one indexes, the others wait for it. Raises
    `DataError` as `index` does, and if `out` holds files that no preparation made.
    """
    set_folder.check_folder(out)
    work = out / set_folder.WORK
    work.mkdir(parents=True, exist_ok=True)
    with open(work / f"{INDEX}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = state_of(source)
        images = load(work / INDEX, state)
        if images is None:
            images = index(source)
            if state != state_of(source):
                raise DataError(f"{source}: changed while it was indexed; wait for its writer")
            store(work / INDEX, state, images)
    return images


def load(path: Path, state: str) -> Images | None:
    """What `store` wrote for this `state` of the source; None if there is none."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            facts = json.loads(stored["facts"].item())
            if facts.pop("state") != state:
                return None
            names = stored.get("names")
            lists = {key: tuple(v) if isinstance(v, list) else v for key, v in facts.items()}
            return Images(rows=stored["rows"], names=names, **lists)
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None  # damaged: it can always be made again


def store(path: Path, state: str, images: Images) -> None:
    """Write `images` so that a reader sees the old or the new file, never a part."""
    keys = ("groups", "containers", "misplaced", "digest", "ignored", "passed_over")
    facts = json.dumps({"state": state, **{key: getattr(images, key) for key in keys}})
    arrays = {"rows": images.rows, "facts": np.array(facts)}
    if images.names is not None:
        arrays["names"] = images.names
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: cannot store the index: {error.strerror}; make room") from None


def sample_reader(
    images: Images, labels: np.ndarray, synsets: Sequence[str], origin: str
) -> Callable[[int], dict[str, bytes]]:
    """A function for `shard_writer.write_shards` that gives the members of sample i.

    `labels` (n,): class of each image; `synsets`: WNID of each class. The image keeps its bytes;
    `origin` is a format of `synset` and `name` that says in the json where it comes from.
    """

    def read(i: int) -> dict[str, bytes]:
        name, data = images.read(i)
        label = int(labels[i])
        synset = synsets[label]
        about = {
            "label": label,
            "synset": synset,
            "source": origin.format(synset=synset, name=name),
        }
        return {
            image_extension(data): data,
            "cls": b"%d" % label,
            "json": json.dumps(about).encode(),
        }

    return read
