"""A set of ImageNet's images: what imagenet.py and imagenet21k.py share."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.archives.image_table import Images, sample_reader
from data_prep.sets import set_folder
from data_prep.sets.shard_writer import permutation, plan, write_shards

CLASSES = Path(__file__).resolve().parents[2] / "prompts" / "imagenet1k.json"
LICENSE = "ImageNet terms of access: non-commercial research and education; images of their owners"
SEED = 0


def read_classes() -> list[dict]:
    """Class table of ImageNet-1K: 1000 dicts with id, synset, names, by sorted WNID."""
    return json.loads(CLASSES.read_text(encoding="utf-8"))["classes"]


def write(
    args: argparse.Namespace,
    images: Images,
    order: np.ndarray,
    labels: np.ndarray,
    table: Sequence[dict],
    origin: str,
    *,
    identity: dict[str, Any],
    **about: Any,
) -> None:
    """Begin the set `args.out`, write the missing shards of this part, and say what is next.

    `order` (n,): the images as the set counts them, before they are shuffled. `labels` (n,): class
    of each image of `images`. `table`: the classes. `origin`: as `sample_reader` wants it.
    `identity`: what the folder must agree on besides the images. `about`: tool, name, source and
    extra of the set.
    """
    preparation = plan(
        len(images),
        args.samples_per_shard,
        {"images_sha256": images.digest, "seed": SEED, **identity},
        kind="image_label",
        license=LICENSE,
        **about,
    )
    set_folder.begin(args.out, preparation, table)
    read = sample_reader(images, labels, [entry["synset"] for entry in table], origin)
    write_shards(args.out, order[permutation(len(images), SEED)], read, args.part, args.parts)
    set_folder.say_next(args.out)
