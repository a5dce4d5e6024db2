"""Captions with the splits of Karpathy and Li (CVPR 2015), written as shards of image and text.

The file of a set is {"images": [{"filepath", "filename", "split", "sentids", "sentences":
[{"raw"}], "cocoid" or "imgid"}]}. In the shards `txt` holds the captions one a line, as
CLIP_benchmark's webdatasets do, and `json` holds them as a list.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from data_prep.archives.image_source import ImagesByName, image_extension
from data_prep.sets import set_folder
from data_prep.sets.shard_writer import permutation, write_shards
from loaders.errors import ConfigError, DataError
from loaders.manifest import CAPTION_LINES
from loaders.specs import as_path

CAPTIONS_PER_IMAGE = 5


@dataclass(frozen=True)
class Captioned:
    """An image and its captions: `path` in the archive, `id` under the name `id_name`."""

    path: str
    id_name: str
    id: int
    split: str
    captions: tuple[str, ...]
    sentids: tuple[int, ...]


@dataclass(frozen=True)
class SplitFile:
    """The images of the wanted splits, and what was read from the file."""

    images: list[Captioned]
    captions: int  # sentences in the file for these images
    empty: int  # sentences without text, left out
    sha256: str


def one_line(text: str) -> str:
    """The caption with its line breaks turned into single spaces."""
    return " ".join(part.strip() for part in text.splitlines() if part.strip())


def read_split(path: Path, dataset: str, splits: Sequence[str]) -> SplitFile:
    """Images of `splits` in file order. `dataset`: coco or flickr30k, checked where stated.

    Raises `DataError` for a file of another form or data set, naming the image at fault, and for
    a split without images.
    """
    content, digest = read_json(path)
    stated = content.get("dataset", dataset)
    if stated != dataset:
        raise DataError(f"{path}: says it is of {stated!r}, not {dataset!r}; name the right file")
    if not isinstance(content.get("images"), list):
        raise DataError(f"{path}: no list 'images', so not a file of the Karpathy splits")
    images, captions, empty, seen = [], 0, 0, set()
    for number, entry in enumerate(content["images"]):
        try:
            if entry["split"] not in splits:
                continue
            image, without = _parse_image(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: image {number} is not as in the Karpathy splits "
                f"({type(error).__name__}: {error}); download the file again"
            ) from None
        if image.path in seen:
            raise DataError(f"{path}: image {image.path} is listed twice; download the file again")
        seen.add(image.path)
        images.append(image)
        captions += len(entry["sentences"])
        empty += without
    if not images:
        raise DataError(f"{path}: no image of split {' or '.join(splits)}")
    return SplitFile(images, captions, empty, digest)


def _parse_image(entry: Mapping[str, Any]) -> tuple[Captioned, int]:
    """An image, and how many of its sentences have no text (a line of `txt` cannot be empty)."""
    id_name = "cocoid" if "cocoid" in entry else "imgid"
    texts = [one_line(sentence["raw"]) for sentence in entry["sentences"]]
    "".join(texts).encode("utf-8")  # half a surrogate pair is a ValueError here, not later
    kept = [(t, s) for t, s in zip(texts, entry["sentids"], strict=True) if t]
    image = Captioned(
        path="/".join(part for part in (entry.get("filepath"), entry["filename"]) if part),
        id_name=id_name,
        id=int(entry[id_name]),
        split=entry["split"],
        captions=tuple(t for t, _ in kept),
        sentids=tuple(int(s) for _, s in kept),
    )
    return image, len(texts) - len(kept)


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


def keep_captions(images: Sequence[Captioned], count: int | None) -> list[Captioned]:
    """The images with their first `count` captions each; None keeps all.

    Raises `DataError` for an image with fewer, since retrieval tables of one width need as many.
    """
    short = [image.path for image in images if len(image.captions) < (count or 1)]
    if short:
        raise DataError(
            f"{len(short)} images have fewer than {count or 1} captions, first "
            f"{', '.join(short[:5])}; " + ("--captions-per-image all" if count else "mend the file")
        )
    return [
        Captioned(i.path, i.id_name, i.id, i.split, i.captions[:count], i.sentids[:count])
        for i in images
    ]


def check_count(what: str, found: int, expected: int | None) -> None:
    """Raise `DataError` with both numbers when they differ; None: nothing is expected."""
    if expected is not None and found != expected:
        raise DataError(
            f"{what}: {found} found, {expected} expected; get the complete official file "
            "(--expected-images N is for another number of images)"
        )


def caption_facts(kept: int, empty: int) -> dict[str, Any]:
    """What the manifest says of the captions: how many, and that each line of `txt` is one."""
    return {"captions": kept, "captions_without_text": empty, CAPTION_LINES: True}


def caption_members(image: Captioned, data: bytes) -> dict[str, bytes]:
    """Members of a sample; raises `Unusable` if `data` is no image."""
    about = {
        "captions": image.captions,
        image.id_name: image.id,
        "sentids": image.sentids,
        "filename": image.path.rpartition("/")[2],
        "split": image.split,
    }
    return {
        image_extension(data): data,
        "txt": "\n".join(image.captions).encode("utf-8"),
        "json": json.dumps(about).encode(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all sets of captioned images share."""
    parser.add_argument(
        "--images", type=as_path, nargs="+", required=True, help="folders, zips, tars"
    )
    parser.add_argument("--out", type=as_path, required=True, help="folder of the data set")
    parser.add_argument("--name", help="name of the set (default: from the input)")
    parser.add_argument("--expected-images", type=int, help="for another number than the official")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="default: 1000")
    set_folder.add_part_arguments(parser)


def write_set(
    arguments: argparse.Namespace,
    preparation: Mapping[str, Any],
    paths: Sequence[str],
    members: Callable[[int, bytes], Mapping[str, bytes]],
) -> None:
    """Write the images `paths` (in the archives `arguments.images`) as the set `arguments.out`.

    `preparation`: tool, name, kind, source, license, identity and extra of the set. `members(i,
    data)` makes the members of sample i. Raises `DataError` if images are absent, and at the end
    if some were no images: an evaluation set with fewer images gives other numbers.
    """
    size = arguments.samples_per_shard
    if size < 1:
        raise ConfigError(f"--samples-per-shard {size}: at least 1")
    set_folder.check_part(arguments.part, arguments.parts)
    images = ImagesByName(arguments.images)
    places = images.locate(paths)
    set_folder.begin(
        arguments.out,
        set_folder.Preparation(
            **{**preparation, "identity": {**preparation["identity"], "samples_per_shard": size}},
            date=date.today().isoformat(),
            shards=-(-len(paths) // size),
            samples_per_shard=size,
            attempted=len(paths),
        ),
    )

    def read(i: int) -> Mapping[str, bytes]:
        return members(i, images.read(places[i]))

    write_shards(arguments.out, permutation(len(paths), 0), read, arguments.part, arguments.parts)
    _check_usable(arguments.out)
    print(f"next: python data_prep/verify.py {arguments.out}")


def _check_usable(out: Path) -> None:
    """`DataError` if a finished shard lacks images that were tried."""
    lost: dict[str, int] = {}
    for stats in set_folder.finished(out).values():
        for reason, count in stats["status_dict"].items():
            lost[reason] = lost.get(reason, 0) + count
    kept = lost.pop("success", 0)
    if lost:
        raise DataError(
            f"{out}: {sum(lost.values())} of {kept + sum(lost.values())} images are unusable "
            f"({lost}); restore them, delete {out} and run again. To go on without them: "
            f"python data_prep/verify.py {out}"
        )
