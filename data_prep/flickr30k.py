"""Flickr30k with Karpathy's splits, as tar shards: five captions an image.

    python data_prep/flickr30k.py --karpathy dataset_flickr30k.json --images flickr30k-images \\
        --split test --out data/flickr30k_test

`--images` is a folder, a zip or a plain tar, read in place.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.archives import image_list, karpathy
from data_prep.sets import arguments as set_arguments
from loaders.errors import run_cli
from loaders.specs import as_path

# Images of each split: dataset cards on Hugging Face (umaru97/flickr30k_train_val_test,
# AnyModal/flickr30k). Every image has five captions.
SPLITS = {"train": 29_000, "val": 1_014, "test": 1_000}


def prepare(arguments: argparse.Namespace) -> None:
    """Write a split as an image_text set. Raises `DataError` for a count that differs."""
    path, split = arguments.karpathy, arguments.split
    found = karpathy.read_split(path, "flickr30k", (split,))
    expected = arguments.expected_images
    images = SPLITS[split] if expected is None else expected
    captions = karpathy.CAPTIONS_PER_IMAGE * len(found.images)
    karpathy.check_counts(path, split, found, images, captions)
    about = {
        "tool": "data_prep/flickr30k.py",
        "name": arguments.name or f"flickr30k_karpathy_{split}",
        "source": "Flickr30k (Young et al., TACL 2014), splits of Karpathy and Li 2015",
        # README of Flickr30k Entities (BryanPlummer/flickr30k_entities)
        "license": "non-commercial research and education; images under the terms of Flickr",
    }
    karpathy.write(arguments, about, found, None, identity={})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--karpathy", type=as_path, required=True, help="dataset_flickr30k.json")
    parser.add_argument("--split", choices=tuple(SPLITS), required=True)
    image_list.add_arguments(parser)
    arguments = parser.parse_args()
    set_arguments.check(arguments)
    prepare(arguments)


if __name__ == "__main__":
    run_cli(main)
