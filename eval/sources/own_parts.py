"""The splits of a person's own folder, and what each of them holds. Needs no torch."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.sources.class_texts import CLASS_NAMES, TEMPLATES, GivenNames
from eval.sources.presence import class_folders, image_files, meant, recognise
from loaders import manifest
from loaders.errors import DataError

KINDS = {
    "shards": "manifest.json",
    "webdataset": "webdataset tars",
    "huggingface": "Hugging Face datasets",
    "folder": "class folders",
}
SPLITS = {
    "train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
}  # fmt: skip
ACCEPTED = (
    "a set of data_prep (manifest.json), class folders (CLASS/*.jpg, or train/CLASS/*.jpg and "
    "test/CLASS/*.jpg), tars as CLIP_benchmark has them (classnames.txt and test/*.tar), or a "
    "folder of Hugging Face datasets (save_to_disk, or *.parquet)"
)
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Part:
    """One split as it lies on disk.

    Attributes:
        kind: a key of KINDS. folder: where it is.
        names: class names by id, None if the set has none, or they are not known yet.
        counts: images of each class id, None if the labels are not known yet.
        images: their number. unlabelled: those without a label.
        several_captions: each line, or entry of a list, is a caption of its own.
        others: files that are no images, or lie in no class folder.
        facts: what changes with the content, for a digest.
    """

    kind: str
    folder: Path
    names: list[str] | None
    counts: list[int] | None
    images: int | None
    unlabelled: int = 0
    several_captions: bool = False
    others: tuple[Path, ...] = ()
    facts: tuple = ()

    def renamed(self, given: GivenNames | None, complete: bool = False) -> list[str] | None:
        """Class names by id, those of `given` if there are any; DataError where they do not fit."""
        if given is None or self.counts is None:
            return self.names
        if self.kind == "folder":
            return given.of_folders(self.names or [], str(self.folder), complete)
        return given.of_ids(self.names, str(self.folder))


def split_folders(place: Path) -> dict[str, Path]:
    """Split -> where it lies: `test`, and `train` and `val` where there are such; the only folder
    is `test`, and so is the validation split where there is no other, as in ImageNet.

    Raises DataError for no folder, one of training images alone, and folders of splits beside
    others, which may be classes.
    """
    if not place.is_dir():
        what = "a file, and a folder is needed" if place.exists() else "no such folder"
        raise DataError(f"{place}: {what}; accepted are {ACCEPTED}")
    inside = class_folders(place)
    splits = [name for name in inside if name in SPLITS]
    roles = {SPLITS[name] for name in splits}
    whole = recognise(place) != "folder"  # it has a manifest, tars or tables of its own
    certain = "test" in roles or {"train", "val"} <= roles or len(splits) == len(inside)
    if whole or not splits or not certain:
        return {"test": place}
    if len(splits) < len(inside):
        others = [name for name in inside if name not in SPLITS]
        raise DataError(
            f"{place}: the folders {', '.join(splits)} look like splits, and "
            f"{', '.join(others[:SHOWN])} beside them like classes; move one kind elsewhere"
        )
    if len(roles) < len(splits):
        raise DataError(f"{place}: {', '.join(splits)} name one split twice; keep one of them")
    found = {SPLITS[name]: place / name for name in splits}
    if "test" not in found:
        if "val" not in found:
            raise DataError(
                f"{place}: `train` alone, and an evaluation needs images that were not trained "
                f"on, in {place / 'test'}; or give {place / 'train'} itself"
            )
        found["test"] = found.pop("val")
    return {split: found[split] for split in ("train", "val", "test") if split in found}


def read_part(folder: Path, given: GivenNames | None) -> Part:
    """What a split holds; images are listed, none is opened.

    Raises DataError for a folder that is none of ACCEPTED, naming what is in it; for a class folder
    without an image, or with folders of images; and as `loaders.manifest.open_shards`.
    """
    kind = recognise(folder)
    if kind == "folder" or kind is None:
        return _folder_part(folder)
    if kind == "webdataset" and any(
        image_files(folder / name)[0] for name in class_folders(folder)
    ):
        raise DataError(f"{folder}: tars and folders of images; move one of them elsewhere")
    if kind == "huggingface":
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        tables = {path.name.split("-")[0] for path in files if path.suffix == ".parquet"}
        if len(mixed := sorted(tables & SPLITS.keys())) > 1:
            raise DataError(
                f"{folder}: tables of {' and '.join(mixed)} in one folder would be read as one; "
                "put each split into a folder of its name"
            )
        facts = tuple((path.relative_to(folder).as_posix(), path.stat().st_size) for path in files)
        return Part(kind, folder, None, None, None, several_captions=True, facts=facts)
    return _shard_part(kind, folder, given)


def _folder_part(folder: Path) -> Part:
    names, counts, facts, empty = class_folders(folder), [], [], []
    known = (CLASS_NAMES, *TEMPLATES)
    loose = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in known]
    others = [path for path in loose if meant(path.name)]
    for name in names:
        images, rest = image_files(folder / name)
        counts.append(len(images))
        others += rest
        if deep := next((path for path in images if path.parent != folder / name), None):
            raise DataError(
                f"{folder}: {deep.relative_to(folder)} lies deeper than in a class folder, and its "
                f"class may be {name} or {deep.parent.relative_to(folder)}; put the images of a "
                "class into its folder itself, or prepare the set (docs/data.md)"
            )
        facts += [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in images]
        empty += [] if images else [name]
    if not sum(counts):
        raise DataError(f"{folder}: {_contents(folder)}. Accepted are {ACCEPTED}")
    if empty:
        raise DataError(
            f"{folder}: no image in the class folders {', '.join(empty[:SHOWN])} ({len(empty)} of "
            f"{len(names)}); add them, or take the folders away"
        )
    total = sum(counts)
    return Part("folder", folder, names, counts, total, others=tuple(others), facts=tuple(facts))


def _shard_part(kind: str, folder: Path, given: GivenNames | None) -> Part:
    shards = manifest.open_shards(str(folder), kind="image_text" if given else None)
    names = [entry.names[0].strip() for entry in shards.classes] or None
    labelled = shards.labels[shards.labels >= 0]
    counts = np.bincount(labelled).tolist()
    several = bool(shards.caption_lines) or _lists_captions(shards)
    facts = (
        shards.fingerprint,
        *(str(shard.sha256) for shard in shards.shards),
        hashlib.sha256(shards.labels.astype("<i8").tobytes()).hexdigest(),
    )
    unlabelled = len(shards) - len(labelled)
    return Part(kind, folder, names, counts, len(shards), unlabelled, several, facts=facts)


def _lists_captions(shards: manifest.ShardSet) -> bool:
    """Whether the first sample's `.json` has a list of captions."""
    try:
        content = shards.read_json(0) if len(shards) else None
    except (ValueError, LookupError):  # a damaged one; whoever reads all of them says which
        return False
    return isinstance((content or {}).get("captions"), list)


def _contents(folder: Path) -> str:
    """What lies in a folder, in words."""
    if (folder / "run.yaml").is_file() and (folder / "shards").is_dir():
        return f"a set that is not finished; close it with: python data_prep/verify.py {folder}"
    images, others = image_files(folder)
    direct = [path for path in images if path.parent == folder]
    files = [path.name for path in others if path.parent == folder]
    names = class_folders(folder)
    found = [f"{len(direct)} images that lie in no class folder"] if direct else []
    found += [f"{len(files)} other files ({', '.join(files[:SHOWN])})"] if files else []
    found += [f"the folders {', '.join(names[:SHOWN])} without images"] if names else []
    return f"holds {' and '.join(found) or 'nothing'}, which is no evaluation set"
