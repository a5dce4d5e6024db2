"""The three lists that go by the name YFCC15M, and how the rows of each are read.

`yfcc.py` says which list is which, where its files are from and what a caption is.
"""

import hashlib
import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_prep.archives import yfcc_metadata
from data_prep.download.list_input import read_lines
from data_prep.download.list_rows import Notes, Rejected, Row
from loaders.errors import ConfigError, DataError

BUCKET = "https://multimedia-commons.s3-us-west-2.amazonaws.com/data/images"
EXTRA_COLUMNS = ("photoid", "licenseurl")
LICENSE = (
    "each photo: the Creative Commons licence that its uploader chose (licenseurl of the sample; "
    "for DeCLIP's list see the metadata of YFCC100M by photoid)"
)
_LINES = 100_000_000  # of the metadata
_CHUNK = 1 << 20
_FLICKR = re.compile(r"https?://[^/]*flickr\.com/(?:[^/]+/)*(\d{1,18})_[^/]*")


@dataclass(frozen=True)
class Published:
    """A list by its name in print: the name of the set, its photos, and where it is from."""

    name: str
    photos: int
    source: str


LISTS = {
    "openai": Published(
        "yfcc14m_openai",
        14_829_396,
        "YFCC100M subset of OpenAI, https://github.com/openai/CLIP/blob/main/data/yfcc100m.md",
    ),
    "slip": Published(
        "yfcc15m_slip",
        14_689_580,
        "YFCC15M of SLIP, https://github.com/facebookresearch/SLIP (make_dataset.py)",
    ),
    "declip": Published(
        "yfcc15m_declip_v2",
        15_388_848,
        "YFCC15M-V2 of DeCLIP, https://github.com/Sense-GVT/DeCLIP (docs/dataset_prepare.md)",
    ),
}


@dataclass(frozen=True)
class Job:
    """What to make a list of, as the command line says it."""

    list_name: str
    ids: Path
    unique_ids: Path | None
    metadata: Path | None
    captions: str | None
    images: str  # bucket, urls, or a folder
    expected: int

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a combination that makes no sense."""
        wanted = {
            "--unique-ids": (self.unique_ids, self.list_name == "slip"),
            "--metadata": (self.metadata, self.list_name != "declip"),
            "--captions": (self.captions, self.list_name != "declip"),
        }
        for flag, (value, needed) in wanted.items():
            if (value is not None) != needed:
                raise ConfigError(
                    f"--list {self.list_name} {'needs' if needed else 'does not take'} {flag}"
                )
        if self.local_root is not None and not self.local_root.is_dir():
            raise ConfigError(f"--images {self.images}: not bucket, urls or a folder that is there")

    @cached_property
    def local_root(self) -> Path | None:
        """Folder of a local copy of the images, if they come from there."""
        return None if self.images in ("bucket", "urls") else Path(self.images).resolve()

    @cached_property
    def _home(self) -> str:
        return BUCKET if self.local_root is None else self.local_root.as_uri()

    @property
    def inputs(self) -> list[Path]:
        return [path for path in (self.ids, self.unique_ids, self.metadata) if path is not None]

    @property
    def place(self) -> str:
        """Where the images come from, a folder with its whole path."""
        return self.images if self.local_root is None else str(self.local_root)

    def read_rows(self, notes: Notes) -> Iterator[Row | Rejected]:
        """The rows of the list, for `url_list.build`."""
        read = read_declip_rows if self.list_name == "declip" else read_metadata_rows
        return read(self, notes)

    def image_url(self, photo_hash: str, download_url: str) -> str:
        """Where the image of a photo is."""
        if self.images == "urls":
            return download_url
        return f"{self._home}/{photo_hash[:3]}/{photo_hash[3:6]}/{photo_hash}.jpg"


def read_metadata_rows(job: Job, notes: Notes) -> Iterator[Row | Rejected]:
    """Rows of the list of OpenAI or SLIP, with captions from the metadata of YFCC100M."""
    rejected: list[Rejected] = []
    chosen = None if job.unique_ids is None else _read_unique_ids(job.unique_ids)
    photos = yfcc_metadata.read_photos(job.ids, chosen, rejected)
    note_ids(notes, photos.ids, len(photos))
    check_count(job, notes.facts)  # before the hours of the join
    yield from rejected
    for item in yfcc_metadata.join(job.metadata, photos, notes):
        if isinstance(item, Rejected):
            yield item
            continue
        number = int(photos.ids[item.position])
        title, description = (yfcc_metadata.clean(text) for text in (item.title, item.description))
        caption = yfcc_metadata.join_caption(title, description, job.captions, number)
        url = job.image_url(photos.hash(item.position), item.download_url)
        raw = "\t".join((str(number), item.title, item.description)).encode()
        extra = (str(number), item.license_url or None)
        yield Row(photos.row(item.position), url, caption, raw, extra)


def read_declip_rows(job: Job, notes: Notes) -> Iterator[Row | Rejected]:
    """Rows of DeCLIP's file: one JSON object a line with caption, filename, url.

    Its loader reads a caption that is a text or a list of texts; those of a list are written one
    a line. The photo id and the name in the bucket come from the Flickr url.
    """
    ids, count = array("q"), 0
    for row, line in read_lines([job.ids]):
        try:
            entry = json.loads(line)
            url, texts = entry["url"], entry["caption"]
            texts = [texts] if isinstance(texts, str) else texts
            caption = "\n".join(" ".join(text.split()) for text in texts if text.strip())
            match, name = _FLICKR.fullmatch(url), yfcc_metadata.photo_hash(url)
        except (ValueError, KeyError, TypeError, AttributeError):
            yield Rejected(row, "not a line with url and caption", line)
            continue
        count += 1
        if match:
            ids.append(int(match[1]))
        else:
            notes.counts["urls that are not of Flickr, no photo id"] += 1
            if job.images != "urls":
                yield Rejected(row, "no Flickr url, so no name in the bucket", line)
                continue
        extra = (match[1] if match else None, None)
        yield Row(row, job.image_url(name, url), caption, line, extra)
    note_ids(notes, np.unique(np.frombuffer(ids, dtype=np.int64)), count)
    check_count(job, notes.facts)


def note_ids(notes: Notes, ids: np.ndarray, photos: int) -> None:
    """Keep what names the list: its photos, and the sha256 of the ascending ids, one a line."""
    total = hashlib.sha256()
    for start in range(0, len(ids), _CHUNK):
        total.update("".join(f"{i}\n" for i in ids[start : start + _CHUNK].tolist()).encode())
    notes.facts |= {"photos": photos, "ids": len(ids), "ids_sha256": total.hexdigest()}


def check_count(job: Job, facts: dict) -> None:
    """Raise `DataError` unless the list has as many photos as it should."""
    if facts["photos"] != job.expected:
        raise DataError(
            f"{job.ids}: {facts['photos']} photos, but {job.list_name} has {job.expected}: another "
            f"list, or not whole. If it is meant to be a part of it, say so: --expected-rows "
            f"{facts['photos']}"
        )


def _read_unique_ids(path: Path) -> np.ndarray:
    """Line numbers in a .npy as a mask (largest + 1,) bool. Never unpickles."""
    try:
        numbers = np.load(path, mmap_mode="r", allow_pickle=False)
        good = numbers.ndim == 1 and numbers.size > 0 and np.issubdtype(numbers.dtype, np.integer)
        good = good and numbers.min() >= 0 and numbers.max() < _LINES
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a readable .npy of numbers ({error})") from None
    if not good:
        raise DataError(f"{path}: not line numbers of YFCC100M (one dimension, 0 to {_LINES - 1})")
    mask = np.zeros(int(numbers.max()) + 1, dtype=bool)
    for start in range(0, len(numbers), _CHUNK):  # 96 million numbers stay on disk
        mask[numbers[start : start + _CHUNK]] = True
    return mask
