"""Images of one's own that are at hand, as `shard_writer.write_shards` wants them."""

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.archives.image_source import LOSSLESS, stored_image
from data_prep.archives.own_lists import local_path
from data_prep.download.list_rows import LABEL
from data_prep.sets import set_folder
from data_prep.sets.shard_writer import SUCCESS, Unusable, permutation, plan, write_shards
from loaders.errors import DataError
from loaders.manifest import CAPTION_LINES
from loaders.progress import Progress

AS_PNG = (*LOSSLESS, "GIF")
_SHOWN = 10  # files named one by one; all are counted
_SEED = 0  # of the order in the shards


@dataclass(frozen=True)
class Samples:
    """Images with labels, captions or both. Row i is one image."""

    count: int
    read: Callable[[int], bytes]  # encoded image; raises `Unusable`
    origin: Callable[[int], str]  # where it is from, for its json and for messages
    labels: np.ndarray | None = None  # (count,) class of each
    captions: Callable[[int], str] | None = None  # captions of one, a line each; may be empty
    several: bool = False  # whether a line is a caption of its own

    def chosen(self, rows: np.ndarray) -> "Samples":
        """The samples `rows` (m,) of these, in that order."""
        return Samples(
            len(rows),
            lambda i: self.read(int(rows[i])),
            lambda i: self.origin(int(rows[i])),
            None if self.labels is None else self.labels[rows],
            None if self.captions is None else lambda i: self.captions(int(rows[i])),
            self.several,
        )


def write(
    arguments: argparse.Namespace,
    samples: Samples,
    classes: Sequence[dict],
    identity: Mapping[str, Any],
    extra: Mapping[str, Any],
    **about: Any,
) -> None:
    """Begin the set `arguments.out`, write the missing shards of this part, and say what is next.

    `classes`: the class table where there are labels. `identity`: what the folder must agree on.
    `extra`: goes into the manifest. `about`: tool, name, source and license of the set.
    """
    out = arguments.out
    identity = {**identity, "seed": _SEED}
    lines = {CAPTION_LINES: True} if samples.several else {}
    kind = "image_text" if samples.labels is None else "image_label"
    preparation = plan(
        samples.count, arguments.samples_per_shard, identity, kind=kind,
        extra={**extra, **lines}, **about,
    )  # fmt: skip
    set_folder.begin(out, preparation, classes)
    order = permutation(samples.count, _SEED)
    status = write_shards(out, order, _members(samples, classes), arguments.part, arguments.parts)
    for reason, number in status.items():
        if reason != SUCCESS:
            print(f"left out, {reason}: {number}")
    if left := len(set_folder.missing(out)):
        print(f"{left} shards of other parts are not finished yet; when they are,")
    print(f"next: python data_prep/verify.py {out}")


def _members(samples: Samples, classes: Sequence[dict]) -> Callable[[int], dict[str, bytes]]:
    """The members of sample i. A file that is no image is named, then counted by `write_shards`."""
    named = 0

    def members(i: int) -> dict[str, bytes]:
        nonlocal named
        try:
            extension, data = stored_image(samples.read(i), AS_PNG)
        except Unusable as error:
            named += 1
            if named <= _SHOWN:
                Progress.write(f"{samples.origin(i)}: {error}; left out")
            raise
        found = {extension: data}
        about: dict[str, Any] = {}
        if samples.captions is not None and (text := samples.captions(i)):
            found["txt"] = text.encode()
        if samples.labels is not None:
            label = int(samples.labels[i])
            about = {"label": label, "name": classes[label]["names"][0]}
            found["cls"] = b"%d" % label
        return {**found, "json": json.dumps(about | {"source": samples.origin(i)}).encode()}

    return members


def from_list(out: Path, index: Mapping[str, Any], root: Path) -> Samples:
    """The files of the list that `url_list.build` made in `out`. `origin` is relative to `root`
    where a file lies below it."""
    home = out / set_folder.LIST
    table = pa.concat_tables(
        pq.read_table(home / entry["file"]) for entry in index["files"]
    ).combine_chunks()
    addresses, captions = (
        table["url"],
        table["caption"] if "caption" in table.column_names else None,
    )

    def read(i: int) -> bytes:
        path = local_path(addresses[i].as_py())
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: {error.strerror}, but it was there when the list was read; restore it "
                "and run the same command again"
            ) from None

    def origin(i: int) -> str:
        path = Path(local_path(addresses[i].as_py()))
        return str(path.relative_to(root) if path.is_relative_to(root) else path)

    return Samples(
        table.num_rows,
        read,
        origin,
        table[LABEL].to_numpy() if LABEL in table.column_names else None,
        None if captions is None else lambda i: captions[i].as_py(),
        bool(index["facts"]["several"]),
    )


def texts_digest(parts: Sequence[object]) -> str:
    """SHA-256 of labels, captions and other things that name the samples, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, default=str).encode())
    return digest.hexdigest()
