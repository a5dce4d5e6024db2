"""A whole release of ImageNet (ImageNet-22K, ImageNet-21K) to shards, without unpacking it.

    python data_prep/imagenet21k.py --archive fall11_whole.tar --release fall11 --out D
    python data_prep/imagenet21k.py --archive winter21_whole.tar --release winter21 --out D

`--archive` is the tar of class tars, or a folder of class archives `n00004475.tar` or class folders
`n00004475/`. ImageNet-22K of the UniCL paper is the release fall11; with `--exclude-in1k` the
classes of ImageNet-1K are left out by WNID, which gives its ImageNet-21K. Labels are the ranks of
the sorted WNIDs that have images, class names the words of WordNet 3.0. Images keep their bytes.
After a kill the same command makes what is missing.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.archives import imagenet_set, wordnet
from data_prep.archives.image_table import Images
from data_prep.archives.nested_tar import open_images
from data_prep.sets import arguments as set_arguments
from loaders.errors import DataError, run_cli
from loaders.specs import as_path

# Classes: Alibaba-MIIL/ImageNet21K issue 16. Which release is the paper's: its Table 1 has 21,841
# concepts and 14.2 M images.
CLASS_COUNTS = {"fall11": 21_841, "winter21": 19_167}
# Images: Ridnik et al., "ImageNet-21K Pretraining for the Masses" (fall11, as ImageNet's own
# statistics); the table of data sets in the README of visual-layer/fastdup (winter21).
IMAGE_COUNTS = {"fall11": 14_197_122, "winter21": 13_153_500}
NAMES = {  # release, without the classes of ImageNet-1K -> name of the set
    ("fall11", False): "imagenet22k",
    ("fall11", True): "imagenet21k",
    ("winter21", False): "imagenet_winter21",
    ("winter21", True): "imagenet_winter21_without_1k",
}
NOTES = {
    "fall11": "the release of the UniCL paper's ImageNet-22K",
    "winter21": "not ImageNet-22K of the UniCL paper (that is fall11): 2,674 classes fewer",
}


def check_groups(images: Images, source: Path) -> list[str]:
    """Classes with images, sorted by WNID; prints what is odd but usable.

    Raises `DataError` for images without classes, classes that are not named by WNID, and a class
    all of whose images are named for another one.
    """
    strange = [g for g in images.groups if not (g[:1] == "n" and len(g) == 9 and g[1:].isdecimal())]
    if strange:
        what = "images that are not sorted into classes" if strange == [""] else "not named by WNID"
        raise DataError(
            f"{source}: {what} {', '.join(map(repr, strange[:5]))}; name the archive or the folder "
            "that holds n00004475.tar and others, or n00004475/ and others"
        )
    rows = list(zip(images.groups, images.counts().tolist(), images.misplaced, strict=True))
    for group, count, misplaced in rows:
        if count and misplaced == count:
            raise DataError(
                f"{source}: all {count} images of {group} are named for another class: the "
                "folders were renamed or mixed; unpack the archive again"
            )
    if any(images.misplaced):
        print(f"note: {sum(images.misplaced)} images are named for another class than they lie in")
    empty = [group for group, count, _ in rows if not count]
    if empty:
        print(f"note: {len(empty)} classes without images are left out: {', '.join(empty[:5])}")
    if images.ignored:
        print(f"note: files without the name of an image: {', '.join(images.ignored)}")
    return [group for group, count, _ in rows if count]


def check_counts(args: argparse.Namespace, facts: dict, written: dict[str, int]) -> None:
    """Raise `DataError` for other numbers of classes or images than the release has.

    `facts`: `classes_in_archive`, `images_in_archive`. `written`: classes and images that are left
    without those of ImageNet-1K, compared with a number that the command line states.
    """
    for what, official in (("classes", CLASS_COUNTS), ("images", IMAGE_COUNTS)):
        stated, found = getattr(args, f"expected_{what}"), facts[f"{what}_in_archive"]
        if stated is None and found != official[args.release]:
            raise DataError(
                f"{args.archive}: {found} {what}, expected {official[args.release]} (release "
                f"{args.release} of ImageNet); get the missing ones, name the right --release, or "
                f"state the number to write: --expected-{what} {written[what]}"
            )
        if stated is not None and written[what] != stated:
            raise DataError(
                f"{args.archive}: {written[what]} {what} to write, but --expected-{what} {stated}; "
                "the archive is not complete, or is another one"
            )


def prepare(args: argparse.Namespace) -> None:
    """Check and count the source, then write the missing shards of this part."""
    images = open_images(args.archive, args.out)
    present = check_groups(images, args.archive)
    in1k = {entry["synset"] for entry in imagenet_set.read_classes()}
    found = sorted(in1k.intersection(present))
    count = dict(zip(images.groups, images.counts().tolist(), strict=True))
    facts = {
        "release": args.release,
        "release_note": NOTES[args.release],
        "classes_in_archive": len(present),
        "images_in_archive": len(images),
        "in1k_classes_in_archive": len(found),
        "in1k_images_in_archive": sum(count[group] for group in found),
        "in1k_classes_not_in_archive": sorted(in1k - set(found))[:10],
        "in1k_excluded": args.exclude_in1k,
    }
    for key, value in facts.items():
        print(f"{key.replace('_', ' ')}: {value}")
    chosen = [group for group in present if not (args.exclude_in1k and group in in1k)]
    if not chosen:
        raise DataError(f"{args.archive}: no class is left")
    images = images.only(chosen)
    check_counts(args, facts, {"classes": len(chosen), "images": len(images)})
    name = NAMES[args.release, args.exclude_in1k]
    print(f"{name}: {len(chosen)} classes, {len(images)} images")
    imagenet_set.write(
        args,
        images,
        np.arange(len(images)),
        images.rows["group"],
        [
            {"id": label, "synset": synset, "names": list(wordnet.names(synset))}
            for label, synset in enumerate(chosen)
        ],
        "{synset}/{name}",
        tool="data_prep/imagenet21k.py",
        name=name,
        source=f"ImageNet, release {args.release} (https://image-net.org)",
        identity={"release": args.release, "exclude_in1k": args.exclude_in1k},
        extra=facts,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--archive", type=as_path, required=True, help="tar of class tars, or folder"
    )
    parser.add_argument("--release", choices=sorted(CLASS_COUNTS), required=True)
    parser.add_argument("--exclude-in1k", action="store_true", help="leave out ImageNet-1K classes")
    parser.add_argument(
        "--expected-classes", type=int, help="to write; default: all of the release"
    )
    parser.add_argument("--expected-images", type=int, help="to write; default: all of the release")
    set_arguments.add_arguments(parser, samples_per_shard=10_000)
    args = parser.parse_args()
    set_arguments.check(args)
    if not args.archive.exists():
        raise DataError(f"{args.archive}: no such file or folder")
    prepare(args)


if __name__ == "__main__":
    run_cli(main)
