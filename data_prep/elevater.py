"""The 20 image classification sets of ELEVATER as tar shards.

    python data_prep/elevater.py --set dtd --split test --from torchvision --root DIR --out D

`--from torchvision`: DIR is the root of the class of torchvision.datasets (nothing is downloaded).
`--from hf`: a folder of `save_to_disk`, a folder of parquet files, or the id of a repository
(HF_HUB_OFFLINE=1 keeps to the cache). `--from folder`: ELEVATER's own archive, or class folders
DIR/SPLIT/CLASS/*.jpg. All give the same labels, those of prompts/elevater/SET.json: class names are
matched by name, and a count that is not ELEVATER's is an error. What each set needs, and its traps:
data_prep/elevater_sets.yaml.
"""

# ruff: noqa: E402  (started as a script, the repository must be put on the path first)
import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from data_prep.archives.elevater_sources import Source, open_source, shard_image
from data_prep.archives.elevater_targets import ClassTable
from data_prep.sets import arguments as set_arguments
from data_prep.sets import set_folder
from data_prep.sets.shard_writer import plan, write_shards
from loaders.errors import ConfigError, DataError, run_cli
from loaders.specs import local

SETS = Path(__file__).with_name("elevater_sets.yaml")
PROMPTS = REPOSITORY / "prompts" / "elevater"
SPLITS = ("train", "val", "test")
KINDS = ("torchvision", "hf", "folder")


def read_sets() -> dict[str, dict]:
    """The rows of elevater_sets.yaml, by id."""
    return yaml.safe_load(SETS.read_text(encoding="utf-8"))


def class_ids(source: Source, table: ClassTable, multilabel: bool) -> list[list[int]]:
    """Class ids per image; `DataError` if the source's classes or labels are not the set's."""
    wrong = [i for i, numbers in enumerate(source.labels) if len(numbers) != 1]
    if wrong and not multilabel:
        raise DataError(
            f"{source.what}: one label per image is needed, {source.origins[wrong[0]]} has "
            f"{source.labels[wrong[0]]} ({len(wrong)} such images)"
        )
    if source.names is None:
        occurring = sorted({number for numbers in source.labels for number in numbers})
        ids = dict(zip(occurring, table.by_integer(occurring, source.what), strict=True))
        if len(ids) != len(table.texts):
            raise DataError(
                f"{source.what}: {len(table.texts)} classes expected, {len(ids)} occur; is the set "
                "complete?"
            )
    else:
        ids = dict(enumerate(table.by_name(source.names, source.what, source.by_number)))
    unknown = sorted({number for numbers in source.labels for number in numbers} - set(ids))
    if unknown:
        raise DataError(f"{source.what}: labels {unknown[:5]} without a class name")
    return [sorted(ids[number] for number in numbers) for numbers in source.labels]


def check_count(row: dict, split: str, found: int, expected: int | None) -> None:
    """`DataError` unless `found` images are as many as ELEVATER has, or as `expected` says."""
    stated = row["sizes"][split]
    if found != (stated if expected is None else expected):
        who = "ELEVATER has" if expected is None else "--expected-images says"
        raise DataError(
            f"{row['title']}, split {split}: {who} {stated if expected is None else expected} "
            f"images, {found} are there; complete the source (--expected-images {found} takes it "
            "as it is, and scores are then not comparable)"
        )


def prepare(arguments: argparse.Namespace) -> None:
    """Write one split of one set. Raises `ConfigError` or `DataError`."""
    row, split = read_sets()[arguments.set], arguments.split
    if row["sizes"][split] is None:
        has = ", ".join(name for name in SPLITS if row["sizes"][name] is not None)
        raise ConfigError(f"{row['title']} has no split {split} in ELEVATER; it has {has}")
    set_arguments.check(arguments)
    prompts_file = PROMPTS / f"{arguments.set}.json"
    prompts = json.loads(prompts_file.read_text(encoding="utf-8"))
    texts = [entry["names"][0] for entry in prompts["classes"]]
    source = open_source(arguments.source, row, split, arguments.root)
    table = ClassTable(texts, row["aliases"], row["integers"])
    labels = class_ids(source, table, prompts["multilabel"])
    check_count(row, split, len(labels), arguments.expected_images)
    digest = hashlib.sha256(prompts_file.read_bytes()).hexdigest()
    set_folder.begin(
        arguments.out,
        plan(
            len(labels),
            arguments.samples_per_shard,
            {"input_sha256": source.digest},
            tool="data_prep/elevater.py",
            name=f"{arguments.set}-{split}",
            # An image_label set has one label per image.
            kind="image_text" if prompts["multilabel"] else "image_label",
            source=f"{row['title']}, split {split} of ELEVATER, from {source.what}",
            license=f"terms of the data set{': ' + row['url'] if row['url'] else ''}",
            extra={
                "elevater_id": arguments.set,
                "split": split,
                "metric": row["metric"],
                "multilabel": prompts["multilabel"],
                "templates": {"file": f"prompts/elevater/{arguments.set}.json", "sha256": digest},
            },
        ),
        prompts["classes"],
    )

    def members(i: int) -> dict[str, bytes]:
        extension, data = shard_image(source.read(i), source.origins[i])
        if prompts["multilabel"]:
            return {extension: data, "json": _json(labels=labels[i], source=source.origins[i])}
        (label,) = labels[i]
        about = _json(label=label, name=texts[label], source=source.origins[i])
        return {extension: data, "cls": str(label).encode(), "json": about}

    # The source's order: ELEVATER's probe tunes on the first samples of each class.
    order = np.arange(len(labels))
    write_shards(arguments.out, order, members, arguments.part, arguments.parts)
    print(f"{len(labels)} images, {len(texts)} classes, from {source.what}")
    print(f"next: python data_prep/verify.py {arguments.out}")


def _json(**content) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=sorted(read_sets()), required=True)
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--from", dest="source", choices=KINDS, required=True)
    parser.add_argument(
        "--root", type=local, required=True, help="folder, or for hf the id of a repository"
    )
    parser.add_argument("--expected-images", type=int, help="default: ELEVATER's number")
    set_arguments.add_arguments(parser, samples_per_shard=5000)
    prepare(parser.parse_args())


if __name__ == "__main__":
    run_cli(main)
