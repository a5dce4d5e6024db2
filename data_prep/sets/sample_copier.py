"""The members of chosen samples of finished sets, copied byte by byte."""

import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sets.shard_writer import Unusable
from loaders.errors import DataError
from loaders.manifest import ShardSet
from loaders.progress import Progress
from loaders.tarreader import Member, ShardReader, iterate_members, open_index, sample_key


class Copier:
    """Reads the members of chosen samples, for `write_shards`."""

    def __init__(self, shards: ShardSet, chosen: np.ndarray) -> None:
        """`chosen`: sample indices (m,) int64, ascending. Walks the tars that hold them."""
        self._shards, self._chosen = shards, chosen
        self._reader = ShardReader()
        self._extensions: list[str] = []
        self._first, self._codes = array("q", [0]), array("H")
        self._offsets, self._sizes = array("q"), array("q")
        mask = np.zeros(len(shards), dtype=bool)
        mask[chosen] = True
        end = 0
        for shard in Progress(shards.shards, desc="reading headers", unit="tar"):
            wanted, end = mask[end : end + shard.samples], end + shard.samples
            if wanted.any():
                self._add_shard(shard.path, wanted)

    def _add_shard(self, path: str, wanted: np.ndarray) -> None:
        samples = list(_group(path))
        if [os.fsencode(key) for key, _ in samples] != open_index(path)["key"].tolist():
            raise DataError(f"{path}: its members are not those of its index; was it replaced?")
        for row in np.flatnonzero(wanted):
            for extension, member in samples[row][1].items():
                if extension not in self._extensions:
                    self._extensions.append(extension)
                self._codes.append(self._extensions.index(extension))
                self._offsets.append(member.offset)
                self._sizes.append(member.size)
            self._first.append(len(self._codes))

    def __call__(self, i: int) -> dict[str, bytes]:
        """Members of sample i with `origin` in `json`; raises `Unusable` if that is damaged."""
        members = self.members(i)
        origin = f"{Path(self._shards.shard_of(i)).stem}/{self._shards.key(i)}"
        members["json"] = _with_origin(members.get("json", b"{}"), origin)
        return members

    def members(self, i: int) -> dict[str, bytes]:
        """Members of sample i as they are, extension -> bytes."""
        row = int(np.searchsorted(self._chosen, i))
        path = self._shards.shard_of(i)
        return {
            self._extensions[self._codes[m]]: self._reader.read(
                path, self._offsets[m], self._sizes[m]
            )
            for m in range(self._first[row], self._first[row + 1])
        }


def _group(path: str) -> Iterator[tuple[str, dict[str, Member]]]:
    """Samples of a tar in the order of its index, with all their members by extension."""
    current, parts = None, {}
    for member in iterate_members(path):
        key = sample_key(member.name)
        top = member.name.split("/", 1)[0]
        if key == member.name or (len(top) >= 4 and top.startswith("__") and top.endswith("__")):
            continue  # no extension, or webdataset's own meta data: not in the index either
        if key != current:
            if parts:
                yield current, parts
            current, parts = key, {}
        parts[member.name[len(key) + 1 :].lower()] = member
    if parts:
        yield current, parts


def _with_origin(data: bytes, origin: str) -> bytes:
    """The json of a sample with its place in the input; one from an earlier run is kept."""
    content = json_object(data)
    if "origin" in content:
        before = [content["origin"], *content.get("earlier_origins", [])]
        content["earlier_origins"] = before
    return json.dumps({**content, "origin": origin}).encode()


def json_object(data: bytes) -> dict[str, Any]:
    """The object in the `json` of a sample; raises `Unusable` for anything else."""
    try:
        content = json.loads(data)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise Unusable("json is not a JSON object")
    return content
