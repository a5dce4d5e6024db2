"""Images of one's own to shards: class folders, a list, or a set of Hugging Face `datasets`.

    python data_prep/own.py folders DIR --out D
    python data_prep/own.py list FILE --image-column path --caption-column text --out D
    python data_prep/own.py huggingface NAME_OR_DIR --split train --out D

folders: DIR/CLASS/*.jpg; the class is the path of the folder below DIR, `animals/dog` of
  DIR/animals/dog/1.jpg, and its name the last part of it, or what --names says.
list: CSV, TSV, JSONL or parquet with a header (JSONL: keys). The image is a path, relative to the
  list or to --root, or a web address, then fetched as gcc.py does. Several captions: a cell that is
  a list, or --caption-column again.
huggingface: a folder of save_to_disk or of parquet files, or a name for load_dataset; the columns
  are found by their type.

A set with labels is of the kind image_label, another image_text. jpg, png and webp keep their
bytes; bmp, gif, tiff and ppm become png. --validation 0.1 writes two sets, D/train and
D/validation. `--part K --parts N` makes one of N shares of the shards. After a kill the same
command makes what is missing.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from data_prep.archives import class_folders, own_classes, own_datasets, own_samples
from data_prep.archives.own_lists import Columns, OwnList, Side
from data_prep.archives.own_samples import Samples
from data_prep.download import list_set, url_list
from data_prep.download import options as download_options
from data_prep.download.list_rows import LABEL
from data_prep.download.options import Options
from data_prep.sets import arguments as set_arguments
from data_prep.sets import set_folder, split
from loaders.errors import ConfigError, DataError, run_cli
from loaders.manifest import CAPTION_LINES
from loaders.specs import as_path, local

TOOL = "data_prep/own.py"
SAMPLES_PER_SHARD = 2000
SIDES = (split.TRAIN, split.VALIDATION)


def sets_of(arguments: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The command line of each set: of the one, or of both sides of a split.

    Raises `ConfigError` or `DataError`, before anything is read, for what cannot work.
    """
    name = arguments.name or arguments.out.resolve().name
    if arguments.validation is None:
        found = [argparse.Namespace(**vars(arguments) | {"name": name, "side": None})]
    elif (arguments.out / set_folder.RUN).is_file():
        raise DataError(f"{arguments.out}: holds a set that is not split; name another folder")
    else:
        found = [
            argparse.Namespace(
                **vars(arguments) | {"name": f"{name}_{side}", "out": arguments.out / side},
                side=Side(side, arguments.validation, arguments.seed),
            )
            for side in SIDES
        ]
    for one in found:
        set_arguments.check(one)
    return iter(found)


def about(one: argparse.Namespace, source: str) -> dict[str, Any]:
    """Tool, name, source and license of a set."""
    said = one.source or source
    return {"tool": TOOL, "name": one.name, "source": said, "license": one.license}


def of_side(one: argparse.Namespace, samples: Samples, hashes: np.ndarray, what: str) -> Samples:
    """The samples of the side that `one` is about. `hashes`: (n,) uint64 of their groups."""
    if one.side is None:
        return samples
    limit = split.validation_limit(hashes, one.side.fraction, what)
    mask = split.is_validation(hashes, limit)
    return samples.chosen(np.flatnonzero(mask == (one.side.name == split.VALIDATION)))


def split_identity(one: argparse.Namespace, group: str | None = None) -> dict[str, Any]:
    """What of a split goes into the plan of a set; nothing where there is none."""
    if one.side is None:
        return {}
    said = {
        "side": one.side.name,
        "validation": str(one.side.fraction),
        "split_seed": one.side.seed,
    }
    return said | ({} if group is None else {"groups": group})


def say_classes(classes: list[dict], labels: np.ndarray | None, where: str) -> None:
    """Print how many classes there are, and those without an image."""
    if labels is None:
        return
    counts = np.bincount(labels, minlength=len(classes))
    empty = [entry["names"][0] for entry, count in zip(classes, counts, strict=True) if not count]
    print(f"{where}: {len(labels)} images, {len(classes)} classes")
    if empty:
        print(f"  without an image: {len(empty)} classes, {', '.join(empty[:5])}")


def prepare_folders(arguments: argparse.Namespace) -> None:
    """Write the images of class folders."""
    source, sets = arguments.folder, list(sets_of(arguments))
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; name the one that holds the class folders")
    images = class_folders.open_class_folders(source, sets[0].out)
    for what, count in images.passed_over.items():
        print(f"passed over, {what}: {count}")
    if images.ignored:
        print(f"  not named as images: {', '.join(images.ignored)}")
    names = own_classes.read_names(arguments.names)
    classes, number_of = own_classes.class_table(images.groups, names, str(source))
    numbers = np.array([number_of[group] for group in images.groups], np.int64)
    groups = images.rows["group"]

    def origin(i: int) -> str:
        return f"{images.groups[groups[i]]}/{images.names[i].decode(errors='backslashreplace')}"

    samples = Samples(len(images), lambda i: images.read(i)[1], origin, numbers[groups])
    seed = arguments.seed
    hashes = np.array(
        [split.group_hash(seed, origin(i)) for i in range(len(images))] if sets[0].side else [],
        np.uint64,
    )
    for one in sets:
        chosen = of_side(one, samples, hashes, str(source))
        say_classes(classes, chosen.labels, str(one.out))
        own_samples.write(
            one, chosen, classes,
            {"images_sha256": images.digest, **split_identity(one)},
            {"passed_over": images.passed_over},
            **about(one, f"class folders {source.resolve().name}"),
        )  # fmt: skip


def prepare_list(arguments: argparse.Namespace) -> None:
    """Write or download the images of a list."""
    columns = Columns(
        arguments.image_column, tuple(arguments.caption_columns), arguments.label_column,
        arguments.group_column,
    )  # fmt: skip
    for one in list(sets_of(arguments)):
        own = OwnList(tuple(one.files), columns, one.root, one.names, one.side)
        options = check_download(one, own)
        index = url_list.build(
            one.out, own.read_rows, own.files, own.parameters, one.samples_per_shard,
            (LABEL,) if columns.label else (), own.schemes, bool(columns.captions),
        )  # fmt: skip
        facts = index["facts"]
        classes = facts.get("classes", [])
        stated = {"columns": columns.all}
        identity = split_identity(one, columns.group)
        said = about(one, f"list {own.what}")
        if options is not None:
            extra = {CAPTION_LINES: True} if facts["several"] else {}
            list_set.download(one, options, index, said, identity, stated, extra, classes)
            continue
        print(url_list.describe(index, one.part, one.parts, "write"))
        samples = own_samples.from_list(one.out, index, (one.root or one.files[0].parent).resolve())
        say_classes(classes, samples.labels, str(one.out))
        counts = {what: index[what] for what in url_list.SUMMARY}
        own_samples.write(
            one, samples, classes, {"list_sha256": url_list.digest(one.out), **identity},
            {"list": {**stated, **counts}}, **said,
        )  # fmt: skip


def check_download(one: argparse.Namespace, own: OwnList) -> Options | None:
    """How to fetch the images, None where they are files, which are stored as they are.

    Raises `ConfigError` for an option of downloads that files would not heed.
    """
    if not own.is_local:
        return list_set.check(one)
    given, usual = asdict(download_options.read(one)), asdict(Options())
    idle = [f"--{key.replace('_', '-')}" for key in given if given[key] != usual[key]]
    if idle:
        raise ConfigError(
            f"{', '.join(idle)}: about downloads, but {own.what} names files, which are stored as "
            "they are"
        )
    return None


def prepare_huggingface(arguments: argparse.Namespace) -> None:
    """Write the images of a set of Hugging Face `datasets`."""
    sets = list(sets_of(arguments))
    found = own_datasets.read(arguments)
    used = found.columns
    print(f"images in {used.image}, labels in {used.label}, captions in {list(used.captions)}")
    for reason, count in found.left_out.items():
        print(f"rows left out, {reason}: {count}")
    for one in sets:
        chosen = of_side(one, found.samples, found.hashes, arguments.place)
        say_classes(found.classes, chosen.labels, str(one.out))
        own_samples.write(
            one, chosen, found.classes,
            {"input_sha256": found.digest, **split_identity(one, used.group)},
            {"left_out": found.left_out, "split": found.split},
            **about(one, f"Hugging Face {arguments.place} {found.split}".strip()),
        )  # fmt: skip


def _fraction(text: str) -> Fraction:
    try:
        found = Fraction(text)
    except (ValueError, ZeroDivisionError):
        found = Fraction(0)
    if not 0 < found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return found


def _add_common(parser: argparse.ArgumentParser, columns: bool) -> None:
    """The options of all forms. `columns`: of those whose images stand in a table."""
    if columns:
        parser.add_argument(
            "--caption-column", dest="caption_columns", action="append", default=[],
            help="column of captions; may be repeated",
        )  # fmt: skip
        parser.add_argument("--label-column", help="column of class names, or of numbers")
        parser.add_argument(
            "--group-column", help="images with the same cell stay on one side of --validation"
        )
    parser.add_argument(
        "--names", type=as_path, help="table of class names: a class, a tab and its name on a line"
    )
    parser.add_argument(
        "--validation", type=_fraction, help="share of the images for D/validation, such as 0.1"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --validation (default: 0)")
    parser.add_argument("--name", help="name of the set (default: that of the folder --out)")
    parser.add_argument("--source", help="what it is and whence: recorded")
    parser.add_argument(
        "--license", default="not stated", help="licence of images and texts: recorded"
    )


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises `ConfigError` for options that do not go together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    forms = parser.add_subparsers(dest="form", required=True, metavar="FORM")
    folders = forms.add_parser("folders", help="DIR/CLASS/*.jpg, of any depth")
    folders.add_argument("folder", type=as_path, metavar="DIR", help="holds the class folders")
    lists = forms.add_parser("list", help="CSV, TSV, JSONL or parquet")
    lists.add_argument("files", type=as_path, nargs="+", metavar="FILE", help="the list")
    lists.add_argument("--image-column", required=True, help="column of paths or addresses")
    lists.add_argument("--root", type=as_path, help="folder of the paths (default: of the list)")
    hub = forms.add_parser("huggingface", help="a set of Hugging Face datasets")
    hub.add_argument("place", type=local, metavar="NAME_OR_DIR", help="folder, or name on the hub")
    hub.add_argument("--split", help="default: the only one")
    hub.add_argument("--config", help="configuration, where a set on the hub has several")
    hub.add_argument("--image-column", help="default: the only one of type Image")
    for form in (folders, lists, hub):
        _add_common(form, columns=form is not folders)
        set_arguments.add_arguments(form, SAMPLES_PER_SHARD)
    download_options.add_arguments(lists.add_argument_group("web addresses"))
    arguments = parser.parse_args()
    if arguments.form != "folders" and arguments.group_column and arguments.validation is None:
        raise ConfigError("--group-column is about --validation, which is not given")
    if arguments.form == "list" and arguments.root and not arguments.root.is_dir():
        raise ConfigError(f"--root {arguments.root}: no such folder")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    prepare = {"folders": prepare_folders, "list": prepare_list, "huggingface": prepare_huggingface}
    prepare[arguments.form](arguments)


if __name__ == "__main__":
    run_cli(main)
