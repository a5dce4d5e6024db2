"""A set of the images that a JSON file lists by name: what coco.py and flickr30k.py share.

An evaluation set with fewer images gives other numbers, so all must be there, and be images.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.archives.image_source import ImagesByName
from data_prep.sets import arguments as set_arguments
from data_prep.sets import set_folder
from data_prep.sets.shard_writer import Unusable, permutation, plan, write_shards
from loaders.errors import DataError
from loaders.specs import as_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all such sets share."""
    parser.add_argument(
        "--images", type=as_path, nargs="+", required=True, help="folders, zips, tars"
    )
    parser.add_argument("--name", help="name of the set (default: from the input)")
    parser.add_argument("--expected-images", type=int, help="for another number than the official")
    set_arguments.add_arguments(parser, samples_per_shard=1000)


def read_json(path: Path) -> tuple[dict, str]:
    """A JSON object and the sha256 of the file; `DataError` if it is none."""
    try:
        data = path.read_bytes()
        content = json.loads(data)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object")
    return content, hashlib.sha256(data).hexdigest()


def check_count(what: str, found: int, expected: int | None) -> None:
    """Raise `DataError` with both numbers when they differ; None: nothing is expected."""
    if expected is not None and found != expected:
        raise DataError(
            f"{what}: {found} found, {expected} expected; get the complete official file "
            "(--expected-images N is for another number of images)"
        )


def write(
    arguments: argparse.Namespace,
    about: Mapping[str, Any],
    paths: Sequence[str],
    members: Callable[[int, bytes], Mapping[str, bytes]],
) -> None:
    """Write the images `paths` (in the archives `arguments.images`) as the set `arguments.out`.

    `about`: tool, name, source, license, identity and extra of the set. `members(i, data)` makes
    the members of sample i, or raises `Unusable`. Raises `DataError`, before the set is begun, if
    images are absent or files are no images.
    """
    out = arguments.out
    images = ImagesByName(arguments.images)
    places = images.locate(paths)
    if not (out / set_folder.RUN).is_file():
        images.check(places)
    preparation = plan(len(paths), arguments.samples_per_shard, kind="image_text", **about)
    set_folder.begin(out, preparation)

    def read(i: int) -> Mapping[str, bytes]:
        try:
            return members(i, images.read(places[i]))
        except Unusable as reason:
            raise DataError(
                f"{images.where(places[i])}: {reason}, but it was one when the set was begun; "
                "restore it and run the same command again"
            ) from None

    write_shards(out, permutation(len(paths), 0), read, arguments.part, arguments.parts)
    print(f"next: python data_prep/verify.py {out}")
