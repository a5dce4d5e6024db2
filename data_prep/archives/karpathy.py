"""Captions with the splits of Karpathy and Li (CVPR 2015), written as shards of image and text.

The file of a set is {"images": [{"filepath", "filename", "split", "sentids", "sentences":
[{"raw"}], "cocoid" or "imgid"}]}. In the shards `txt` holds the captions one a line, as
CLIP_benchmark's webdatasets do, and `json` holds them as a list.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.archives import image_list
from data_prep.archives.image_list import check_count, read_json
from data_prep.archives.image_source import image_extension
from loaders.errors import DataError
from loaders.manifest import CAPTION_LINES

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


def check_counts(path: Path, split: str, found: SplitFile, images: int, captions: int) -> None:
    """Raise `DataError` with both numbers unless a split has as many captions and images."""
    check_count(f"{path}: split {split}, captions", found.captions, captions)
    check_count(f"{path}: split {split}, images", len(found.images), images)


def write(
    arguments: argparse.Namespace,
    about: Mapping[str, Any],
    found: SplitFile,
    captions_per_image: int | None,
    identity: Mapping[str, Any],
) -> None:
    """Write the images of `found` with their captions as the set `arguments.out`.

    `about`: tool, name, source and license of the set. `captions_per_image`: as `keep_captions`
    wants it. `identity`: what the folder must agree on besides the file and the split.
    """
    images = keep_captions(found.images, captions_per_image)
    kept = sum(len(image.captions) for image in images)
    print(f"{len(images)} images, {kept} captions; {found.empty} without text left out")
    image_list.write(
        arguments,
        {
            **about,
            "identity": {
                "karpathy_sha256": found.sha256,
                "split": arguments.split,
                **identity,
            },
            # Each line of `txt` is one of the captions.
            "extra": {"captions": kept, "captions_without_text": found.empty, CAPTION_LINES: True},
        },
        [image.path for image in images],
        lambda i, data: _caption_members(images[i], data),
    )


def _caption_members(image: Captioned, data: bytes) -> dict[str, bytes]:
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
