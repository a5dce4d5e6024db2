"""COCO: captions with Karpathy's splits, or instances for detection, as tar shards.

    python data_prep/coco.py --task captions --karpathy dataset_coco.json \\
        --images train2014.zip val2014.zip --split test --out data/coco_captions_test
    python data_prep/coco.py --task instances --annotations instances_val2017.json \\
        --images val2017.zip --out data/coco_val2017

Images are read from the zips (or folders, or tars) in place and stored as they are. Counts that
differ from the official ones are an error.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.archives import image_list, karpathy
from data_prep.archives.image_source import image_extension
from data_prep.sets import arguments as set_arguments
from loaders.errors import ConfigError, DataError, run_cli
from loaders.specs import as_path

# Images and captions of each split. Images: catalogue of TensorFlow Datasets, coco_captions 1.1.0.
# Captions of test and val, and the sum of train and restval: Hugging Face,
# justram/COCO2014-Captions (dataset card); the parts of that sum: counts printed by public
# conversion scripts.
SPLITS = {
    "train": (82_783, 414_113),
    "restval": (30_504, 152_634),
    "val": (5_000, 25_010),
    "test": (5_000, 25_010),
}
TRAIN_RESTVAL = "train_restval"
# Images of an annotation file, those without annotations included. 2017: dataset cards of the set
# on Hugging Face (BrandonLSX/coco-2017, surenreddy/coco2017). 2014: the splits above, of which
# train is train2014 and the rest val2014.
INSTANCES = {
    "instances_train2017": 118_287,
    "instances_val2017": 5_000,
    "instances_train2014": 82_783,
    "instances_val2014": 40_504,
}
FIELDS = ("id", "category_id", "bbox", "segmentation", "area", "iscrowd")
ABOUT = {
    "tool": "data_prep/coco.py",
    "license": "annotations CC BY 4.0 (cocodataset.org); images under the terms of Flickr",
}


def prepare_captions(arguments: argparse.Namespace) -> None:
    """Write the captions of a split as an image_text set."""
    split = arguments.split
    splits = ("train", "restval") if split == TRAIN_RESTVAL else (split,)
    found = karpathy.read_split(arguments.karpathy, "coco", splits)
    images, captions = (sum(SPLITS[part][i] for part in splits) for i in range(2))
    if arguments.expected_images is not None:
        images, captions = arguments.expected_images, found.captions
    karpathy.check_counts(arguments.karpathy, split, found, images, captions)
    limit = arguments.captions_per_image
    about = {
        **ABOUT,
        "name": arguments.name or f"coco_captions_karpathy_{split}",
        "source": "COCO 2014 (cocodataset.org), splits of Karpathy and Li 2015",
    }
    count = None if limit == "all" else int(limit)
    karpathy.write(arguments, about, found, count, {"captions_per_image": limit})


def prepare_instances(arguments: argparse.Namespace) -> None:
    """Write the images and annotations of a detection file.

    The kind is image_text although there is no `txt`: a manifest knows image_label and image_text
    only, and image_label asks for one class a sample, which an image of many objects has not.
    """
    path = arguments.annotations
    content, digest = image_list.read_json(path)
    images, categories = read_instances(path, content)
    expected = arguments.expected_images
    if expected is None:
        if path.stem not in INSTANCES:
            raise ConfigError(
                f"{path}: the number of images is known of {', '.join(INSTANCES)} only; give "
                "--expected-images"
            )
        expected = INSTANCES[path.stem]
    image_list.check_count(f"{path}, images", len(images), expected)
    bare = sum(not image["annotations"] for image in images)
    print(f"{len(images)} images, {bare} of them without annotations")
    about = {
        **ABOUT,
        "name": arguments.name or f"coco_{path.stem}",
        "source": f"COCO (cocodataset.org), {path.name}",
        "identity": {"annotations_sha256": digest},
        # pycocotools needs the file itself: this says which one.
        "extra": {
            "annotations": {"file": path.name, "sha256": digest},
            "categories": categories,
            "annotated_objects": sum(len(image["annotations"]) for image in images),
        },
    }
    image_list.write(
        arguments,
        about,
        [image["file_name"] for image in images],
        lambda i, data: {
            image_extension(data): data,
            "json": json.dumps(images[i]).encode(),
        },
    )


def read_instances(path: Path, content: Mapping[str, Any]) -> tuple[list[dict], list[dict]]:
    """Images with their annotations in file order, and the categories with their original ids.

    Raises `DataError` for a file of another form, naming the entry, and for an annotation of an
    image or category that is not in the file.
    """
    categories: dict[int, dict] = {}
    images: dict[int, dict] = {}

    def add_category(entry: dict) -> None:
        categories[entry["id"]] = {key: entry[key] for key in ("id", "name", "supercategory")}

    def add_image(entry: dict) -> None:
        if entry["id"] in images:
            raise ValueError(f"image id {entry['id']} occurs twice")
        about = {key: entry[key] for key in ("width", "height", "file_name")}
        images[entry["id"]] = {"image_id": entry["id"], **about, "annotations": []}

    def add_annotation(entry: dict) -> None:
        if entry["category_id"] not in categories:
            raise ValueError(f"category {entry['category_id']} is not in the file")
        if entry["image_id"] not in images:
            raise ValueError(f"image {entry['image_id']} is not in the file")
        images[entry["image_id"]]["annotations"].append({key: entry[key] for key in FIELDS})

    for part, add in (
        ("categories", add_category),
        ("images", add_image),
        ("annotations", add_annotation),
    ):
        if not isinstance(content.get(part), list):
            raise DataError(f"{path}: no list {part!r}; name an instances_*.json of COCO")
        for number, entry in enumerate(content[part]):
            try:
                add(entry)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{path}: {part}, entry {number}: not as in COCO's instances files "
                    f"({type(error).__name__}: {error}); download the file again"
                ) from None
    return list(images.values()), list(categories.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=("captions", "instances"), required=True)
    parser.add_argument("--karpathy", type=as_path, help="captions: dataset_coco.json")
    parser.add_argument("--split", choices=(*SPLITS, TRAIN_RESTVAL), help="captions: which images")
    parser.add_argument(
        "--captions-per-image",
        choices=(str(karpathy.CAPTIONS_PER_IMAGE), "all"),
        help="captions: 5 keeps the first five, as retrieval tables count; some images have more "
        "(default: 5)",
    )
    parser.add_argument("--annotations", type=as_path, help="instances: instances_*.json")
    image_list.add_arguments(parser)
    arguments = parser.parse_args()
    set_arguments.check(arguments)
    own = {"captions": ("karpathy", "split"), "instances": ("annotations",)}
    absent = [key for key in own[arguments.task] if getattr(arguments, key) is None]
    others = {
        "captions": ("annotations",),
        "instances": ("karpathy", "split", "captions_per_image"),
    }
    idle = [key for key in others[arguments.task] if getattr(arguments, key) is not None]
    for keys, what in ((absent, "needs"), (idle, "does not take")):
        if keys:
            options = ", ".join("--" + key.replace("_", "-") for key in keys)
            raise ConfigError(f"--task {arguments.task} {what} {options}")
    if arguments.task == "instances":
        prepare_instances(arguments)
    else:
        arguments.captions_per_image = arguments.captions_per_image or "5"
        prepare_captions(arguments)


if __name__ == "__main__":
    run_cli(main)
