"""ImageNet-1K (ILSVRC2012) to shards, read from the official archives without unpacking them.

    python data_prep/imagenet.py --split train --tar ILSVRC2012_img_train.tar --out D
    python data_prep/imagenet.py --split val --tar ILSVRC2012_img_val.tar \\
        --devkit ILSVRC2012_devkit_t12.tar.gz --out D
    python data_prep/imagenet.py --split train --folder DIR --out D

The archives need a registration at https://image-net.org. `--folder` takes what is already
unpacked: class folders `n01440764/`, class archives `n01440764.tar`, or validation images. The
label of a class is its rank among the 1000 sorted WNIDs. Images keep their bytes. `--part K
--parts N` makes one of N shares of the shards. After a kill the same command makes what is missing.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.archives import imagenet_devkit, imagenet_set
from data_prep.archives.image_table import Images
from data_prep.archives.nested_tar import open_images
from data_prep.sets import arguments as set_arguments
from loaders.errors import ConfigError, DataError, run_cli
from loaders.progress import Progress
from loaders.specs import as_path

SOURCE = "ImageNet, ILSVRC2012 (https://image-net.org)"
COUNTS = {"train": 1_281_167, "val": 50_000}
MD5 = {  # torchvision 0.29, torchvision/datasets/imagenet.py
    "train": "1d675b47d978889d74fa0da5fadfb00e",
    "val": "29b22e2961454d5413ddabcf34fc5622",
    "devkit": "fa75699e90414af021442c21a62c3abf",
}
ORIGIN = {"train": "train/{synset}/{name}", "val": "val/{name}"}  # of an image, in its json


def check_groups(images: Images, source: Path, table: list[dict]) -> None:
    """Raise `DataError`, in words, unless the groups are the 1000 WNIDs and hold their images."""
    synsets, groups = [entry["synset"] for entry in table], images.groups
    missing, extra = sorted(set(synsets) - set(groups)), sorted(set(groups) - set(synsets))
    if missing or extra:
        raise DataError(f"{source}: {_what_is_wrong(groups, missing, extra, table)}")
    empty = [group for group, count in zip(groups, images.counts(), strict=True) if not count]
    if empty:
        raise DataError(
            f"{source}: no image (*.JPEG) in {len(empty)} of {len(groups)} classes: "
            f"{', '.join(empty[:5])}; images must lie directly in the folder of their class"
        )
    if any(images.misplaced):
        group = next(i for i, count in enumerate(images.misplaced) if count)
        raise DataError(
            f"{source}: {sum(images.misplaced)} images are named for another class than the one "
            f"they lie in, {images.misplaced[group]} of them in {groups[group]}: the folders were "
            "renamed or mixed, and their labels would be wrong; unpack the archive again"
        )


def _what_is_wrong(groups, missing: list[str], extra: list[str], table: list[dict]) -> str:
    """Says what the groups of a source look like when they are not the classes."""
    if groups == ("",):
        return (
            "images that are not sorted into classes. Training images come as class folders or "
            "class archives; for validation images say --split val --devkit "
            "ILSVRC2012_devkit_t12.tar.gz"
        )
    if {"train", "val"} & set(groups):
        return f"holds {', '.join(groups[:5])}: name the folder of one split"
    if all(group.isdecimal() for group in groups):
        low = min(int(group) for group in groups)
        first = table[0]
        return (
            f"{len(groups)} class folders named by number, from {low}: which class a number means "
            f"is not stated. If they are ranks of the sorted WNIDs, {low} is {first['synset']} "
            f"({first['names'][0]}); if they are ILSVRC2012_IDs they are not, and sorted as text "
            f"({', '.join(sorted(groups)[:4])}, …) they are in no order at all. Look at some "
            "images, then rename the folders to their WNIDs"
        )
    strange = [name for name in extra if not (name[:1] == "n" and name[1:].isdecimal())]
    if strange:
        return (
            f"{len(strange)} class folders that are not named by WNID, such as n01440764: "
            f"{', '.join(map(repr, strange[:5]))}; rename or remove them"
        )
    names = {entry["synset"]: entry["names"][0] for entry in table}
    return (
        f"{len(groups)} class folders, but they are not the 1000 classes of ImageNet-1K "
        f"(ILSVRC2012): {len(missing)} are missing"
        + "".join(f", {synset} ({names[synset]})" for synset in missing[:3])
        + f"; {len(extra)} are others"
        + "".join(f", {synset}" for synset in extra[:3])
        + ". A subset or another release of ImageNet has other labels (data_prep/imagenet21k.py "
        "takes the whole releases)"
    )


def label_images(images: Images, args, table: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Order of the images before permutation, and the label of each image, (n,) both.

    Training images are ordered by WNID, then name; validation images by name. So the shards do
    not depend on the form of the source.
    """
    source, synsets = args.tar or args.folder, [entry["synset"] for entry in table]
    by_class = images.groups != ("",)
    if args.split == "train" or by_class:
        check_groups(images, source, table)
    order, labels = np.arange(len(images)), images.rows["group"].astype(np.int32)
    if args.split == "train":
        return order, labels
    if images.names is None:
        raise DataError(f"{source}: class archives; validation images are one archive or folder")
    order = np.argsort(images.names, kind="stable")
    if args.devkit is not None:
        truth = imagenet_devkit.read_labels(args.devkit, synsets)
        if len(truth) != len(images):
            raise DataError(
                f"{source} has {len(images)} images, but the ground truth of {args.devkit} has "
                f"{len(truth)} lines; one of the two is not complete"
            )
        wrong = np.flatnonzero(labels[order] != truth) if by_class else []
        if len(wrong):
            name = images.names[order[wrong[0]]].decode(errors="replace")
            raise DataError(
                f"{source}: {len(wrong)} images lie in another class folder than {args.devkit} "
                f"says, such as {name}: in {synsets[labels[order[wrong[0]]]]}, but it is "
                f"{synsets[truth[wrong[0]]]}; sort them again, or name the official archive"
            )
        labels[order] = truth
    elif not by_class:
        raise DataError(
            f"{source}: validation images that are not sorted into classes; their labels are in "
            "the development kit: --devkit ILSVRC2012_devkit_t12.tar.gz"
        )
    names = [name.decode(errors="replace") for name in images.names[order]]
    imagenet_devkit.check_order(names, labels[order], synsets)
    return order, labels


def check_md5(path: Path, expected: str) -> None:
    """Raise `DataError` unless the file has this MD5 sum; shows progress."""
    digest = hashlib.md5(usedforsecurity=False)
    with (
        open(path, "rb") as file,
        Progress(desc=f"md5 {path.name}", unit="B", scaled=True, total=path.stat().st_size) as bar,
    ):
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != expected:
        raise DataError(
            f"{path}: md5 {digest.hexdigest()}, but the official archive has {expected}: cut "
            "short or another file; get it again"
        )


def check_arguments(args: argparse.Namespace) -> None:
    """Raise `ConfigError` for options that do not fit together, `DataError` for no such file."""
    set_arguments.check(args)
    for wrong, what in (
        (args.devkit and args.split == "train", "--devkit holds the labels of --split val only"),
        (args.check_md5 and args.folder, "--check-md5 compares the official archive: name --tar"),
        (args.tar and args.tar.is_dir(), f"--tar {args.tar}: a folder; name it with --folder"),
        (args.folder and args.folder.is_file(), f"--folder {args.folder}: a file; say --tar"),
    ):
        if wrong:
            raise ConfigError(what)
    for path in filter(None, (args.tar, args.folder, args.devkit)):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")


def prepare(args: argparse.Namespace) -> None:
    """Check the source, then write the missing shards of this part."""
    source, table = args.tar or args.folder, imagenet_set.read_classes()
    if args.check_md5:
        check_md5(args.tar, MD5[args.split])
        if args.devkit is not None:
            check_md5(args.devkit, MD5["devkit"])
    images = open_images(source, args.out)
    order, labels = label_images(images, args, table)
    expected = COUNTS[args.split] if args.expected_images is None else args.expected_images
    if len(images) != expected:
        raise DataError(
            f"{source}: {len(images)} images, expected {expected} ({args.split} of ILSVRC2012); "
            "get the missing ones, or state a smaller set: --expected-images N"
        )
    if images.ignored:
        print(f"files without the name of an image are left out: {', '.join(images.ignored)}")
    imagenet_set.write(
        args,
        images,
        order,
        labels,
        table,
        ORIGIN[args.split],
        tool="data_prep/imagenet.py",
        name=f"imagenet1k_{args.split}",
        source=SOURCE,
        identity={
            "labels_sha256": hashlib.sha256(labels[order].astype("<i4").tobytes()).hexdigest()
        },
        extra={"split": args.split},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=sorted(COUNTS), required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tar", type=as_path, help="ILSVRC2012_img_train.tar or …_val.tar")
    source.add_argument("--folder", type=as_path, help="the same unpacked")
    parser.add_argument("--devkit", type=as_path, help="ILSVRC2012_devkit_t12.tar.gz, for val")
    parser.add_argument("--expected-images", type=int, help="default: that of ILSVRC2012")
    parser.add_argument("--check-md5", action="store_true", help="compare the archives first")
    set_arguments.add_arguments(parser, samples_per_shard=2000)
    args = parser.parse_args()
    check_arguments(args)
    prepare(args)


if __name__ == "__main__":
    run_cli(main)
