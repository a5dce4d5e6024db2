"""Where the images of an ELEVATER set come from: torchvision, Hugging Face `datasets`, a folder.

A `Source` lists every image with its labels before anything is read. Files are passed on as they
are; arrays become PNG, which is lossless.
"""

import hashlib
import inspect
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.archives import elevater_targets, hugging_face
from data_prep.archives.image_source import open_images, png, stored_image
from data_prep.sets.shard_writer import Unusable
from loaders.errors import ConfigError, DataError
from loaders.plain_text import read_text, text_lines

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".ppm", ".bmp", ".tif", ".tiff")
_HF_SPLITS = {"train": ["train"], "val": ["validation", "val", "valid"], "test": ["test"]}


@dataclass(frozen=True)
class Source:
    """The images of one split."""

    what: str  # for messages and the manifest
    names: list[str] | None  # class names, at the position that is their number; None: no names
    labels: list[list[int]]  # numbers per image, one unless the set is multi-label
    origins: list[str]  # where each image comes from, relative to the root
    read: Callable[[int], bytes]  # encoded image
    by_number: bool = False  # ELEVATER's archive: label i is class text i if no name says otherwise

    @property
    def digest(self) -> str:
        """sha256 over names, labels and origins, in order; images are not read."""
        content = [self.names, self.labels, self.origins]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def open_source(kind: str, row: dict, split: str, root: str) -> Source:
    """Open `split` of the set that `row` of elevater_sets.yaml describes.

    `kind`: torchvision, hf or folder. `root`: a folder, for hf also the id of a repository.
    Raises `ConfigError` if this kind cannot give the split, `DataError` for what is not there.
    """
    if kind == "hf":
        return _hugging_face(row, split, root)
    if not Path(root).is_dir():
        raise DataError(f"{root}: no such folder; name the one that holds {row['title']}")
    return (_torchvision if kind == "torchvision" else _folder)(row, split, Path(root))


def shard_image(data: bytes, where: str) -> tuple[str, bytes]:
    """Member extension and bytes: jpg, png and webp as they are, ppm, bmp and tiff as PNG.

    Raises `DataError` for anything else, because an evaluation set must be whole.
    """
    try:
        return stored_image(data)
    except Unusable as error:
        raise DataError(f"{where}: {error}; an evaluation set must be whole, mend it") from None


def _file_source(
    what: str, names: list[str] | None, labels: Sequence[list[int]], paths: Sequence, root: Path
) -> Source:
    """A source of single files."""
    files = [Path(path) for path in paths]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise DataError(f"{what}: {len(missing)} images are listed but not there: {missing[:3]}")
    origins = [path.relative_to(root).as_posix() for path in files]
    return Source(what, names, list(labels), origins, lambda i: files[i].read_bytes())


def _torchvision(row: dict, split: str, root: Path) -> Source:
    """Files on the disk through a class of torchvision.datasets, which never downloads here."""
    entry = row["torchvision"] or {}
    if split not in entry:
        raise ConfigError(
            f"{row['title']}, split {split}: torchvision cannot give ELEVATER's images of it (why: "
            "data_prep/elevater_sets.yaml); use --from hf or --from folder"
        )
    from torchvision import datasets

    dataset_class = getattr(datasets, entry["class"])
    arguments = dict(entry[split])
    accepted = inspect.signature(dataset_class).parameters
    if "loader" in accepted:
        arguments["loader"] = str  # an image is then its path
    if "download" in accepted:
        arguments["download"] = False
    what = f"torchvision {entry['class']}"
    try:
        data = dataset_class(root=str(root), **arguments)
        return _read_torchvision(what, data, "loader" in accepted, split, root)
    except (RuntimeError, OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        raise DataError(
            f"{root}: {what} cannot read it: {type(error).__name__}: {error} (nothing is "
            "downloaded here: unpack the set as torchvision's documentation of the class says)"
        ) from None


def _read_torchvision(what: str, data: Any, gives_paths: bool, split: str, root: Path) -> Source:
    kind, names = type(data).__name__, getattr(data, "classes", None)
    if kind == "VOCDetection":
        found = [elevater_targets.voc_names(Path(path).read_bytes()) for path in data.targets]
        names = sorted({name for one in found for name in one})
        labels = [[names.index(name) for name in one] for one in found]
        return _file_source(what, names, labels, data.images, root)
    if kind == "Kitti":
        numbers = elevater_targets.kitti_splits(root / "Kitti" / "raw" / "mapping")[split]
        base = root / "Kitti" / "raw" / "training"
        paths = [base / "image_2" / f"{number:06d}.png" for number in sorted(numbers)]
        texts = [read_text(base / "label_2" / f"{path.stem}.txt") for path in paths]
        classes = [elevater_targets.closest_vehicle_class(text) for text in texts]
        return _file_source(what, None, [[i] for i in classes], paths, root)
    if kind == "OxfordIIITPet":
        return _file_source(what, names, [[i] for i in data._labels], data._images, root)
    if kind == "GTSRB":
        pairs = data._samples
        return _file_source(what, None, [[i] for _, i in pairs], [p for p, _ in pairs], root)
    if gives_paths:
        pairs = [data[i] for i in range(len(data))]
        return _file_source(what, names, [[int(i)] for _, i in pairs], [p for p, _ in pairs], root)
    if kind == "PCAM":  # one image at a time would open the file for each label
        with data.h5py.File(data._base_folder / data._FILES[split]["targets"][0]) as file:
            labels = file["y"][:].reshape(-1)
    else:
        labels = getattr(data, "targets", None)
        labels = [data[i][1] for i in range(len(data))] if labels is None else labels
    origins = [str(i) for i in range(len(data))]
    return Source(what, names, [[int(i)] for i in labels], origins, lambda i: png(data[i][0]))


def _hugging_face(row: dict, split: str, root: str) -> Source:
    """A dataset saved to disk, a folder of parquet files, or a repository (cached, or online)."""
    names = {**_HF_SPLITS, **row["hf"].get("splits", {})}[split]
    data = hugging_face.choose(hugging_face.load(root), names, root)
    cell = hugging_face.image_reader(data, hugging_face.image_column(data, root), root)

    def read(i: int) -> bytes:
        try:
            return cell(i)
        except Unusable as error:
            raise DataError(f"{root}, row {i}: {error}; an evaluation set must be whole") from None

    column, class_names = _label_column(row, data, root)
    labels = [value if isinstance(value, list) else [value] for value in data[column]]
    if any(label is None or label < 0 for numbers in labels for label in numbers):
        raise DataError(f"{root}: split {names[0]}: images without a label in column {column}")
    origins = [str(i) for i in range(len(labels))]
    return Source(f"Hugging Face {root}", class_names, labels, origins, read)


def _label_column(row: dict, data: Any, root: str) -> tuple[str, list[str] | None]:
    """Column with the labels, and its class names if it has them."""
    from datasets import ClassLabel

    def inner(feature: Any) -> Any:  # of a list of labels
        return getattr(feature, "feature", feature)

    named = [n for n, f in data.features.items() if isinstance(inner(f), ClassLabel)]
    stated = row["hf"].get("label")
    column = stated if stated in data.column_names else named[0] if len(named) == 1 else "label"
    if column not in data.column_names or (len(named) > 1 and column != stated):
        raise DataError(
            f"{root}: which column is the label? Columns {data.column_names}, with class names "
            f"{named}; call it {stated or 'label'}"
        )
    feature = inner(data.features[column])
    return column, list(feature.names) if isinstance(feature, ClassLabel) else None


def _folder(row: dict, split: str, root: Path) -> Source:
    """ELEVATER's archive if its index file is there, else class folders."""
    archive = row["archive"]
    index = archive["index"][split]
    for base in (root, root / archive["folder"]):
        if index and (base / index).is_file():
            return _archive(base, index, archive["labels"])
    if (root / split).is_dir():
        return _class_folders(root, split)
    raise DataError(
        f"{root}: neither {index} (ELEVATER's archive) nor a folder {split}/ of class folders"
    )


def _class_folders(root: Path, split: str) -> Source:
    """ROOT/SPLIT/CLASS/*: class folders, however deep the images lie in them."""
    images = open_images(root / split)
    found = [n for n in images.names() if "/" in n and n.lower().endswith(_SUFFIXES)]
    names = sorted({name.split("/")[0] for name in found})
    number = {name: i for i, name in enumerate(names)}
    labels = [[number[name.split("/")[0]]] for name in found]
    origins = [f"{split}/{name}" for name in found]
    return Source(f"folder {split}", names, labels, origins, lambda i: images.read(found[i]))


def _archive(base: Path, index: str, label_map: str | None) -> Source:
    """The layout of vision-datasets 0.2: an index of `ZIP@PATH` names (text or COCO json)."""
    try:
        text = (base / index).read_text(encoding="utf-8-sig")
        if index.endswith(".json"):
            names, files, labels = _read_coco(json.loads(text))
        else:
            names = text_lines((base / label_map).read_text("utf-8-sig"))
            if unnamed := [n for n, name in enumerate(names, 1) if not name.strip()]:
                raise ValueError(f"{label_map}, line {unnamed[0]}: empty, so no name of a class")
            files, labels = _read_index(text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{base / index}: not readable: {type(error).__name__}: {error}") from None
    places = [_locate(base, name) for name in files]
    sources = {place: open_images(place) for place in dict.fromkeys(place for place, _ in places)}
    there = {place: set(source.names()) for place, source in sources.items()}
    missing = [
        f for f, (place, name) in zip(files, places, strict=True) if name not in there[place]
    ]
    if missing:
        raise DataError(
            f"{base / index}: {len(missing)} of {len(files)} images are not there: {missing[:3]}; "
            "unpack or download the archive again"
        )
    return Source(
        f"ELEVATER archive, {index}",
        [name.strip() for name in names],
        labels,
        files,
        lambda i: sources[places[i][0]].read(places[i][1]),
        by_number=True,
    )


def _read_index(text: str) -> tuple[list[str], list[list[int]]]:
    """Lines `PATH LABEL[,LABEL…]`; only the path may hold spaces."""
    files, labels = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, space, label = line.strip().rpartition(" ")
        if not space or not all(part.isdecimal() for part in label.split(",")):
            raise ValueError(f"line {number}: {line!r} is not 'path label'")
        files.append(name.replace("\\", "/"))
        labels.append(sorted({int(part) for part in label.split(",")}))
    return files, labels


def _read_coco(content: dict) -> tuple[list[str], list[str], list[list[int]]]:
    """Class names in the order of the category ids, image files and their labels."""
    categories = sorted(content["categories"], key=lambda category: category["id"])
    position = {category["id"]: i for i, category in enumerate(categories)}
    labels: dict[Any, set[int]] = {image["id"]: set() for image in content["images"]}
    for annotation in content["annotations"]:
        labels[annotation["image_id"]].add(position[annotation["category_id"]])
    images = sorted(content["images"], key=lambda image: image["id"])
    files = [
        f"{image['zip_file']}@{image['file_name']}" if image.get("zip_file") else image["file_name"]
        for image in images
    ]
    names = [str(category["name"]) for category in categories]
    return names, files, [sorted(labels[image["id"]]) for image in images]


def _locate(base: Path, file: str) -> tuple[Path, str]:
    """Folder or zip, and name in it, of `ZIP@PATH` or `PATH`. An unpacked zip is a folder."""
    archive, at, name = file.partition("@")
    name = name if at else archive
    for part in (archive, name):
        if PurePosixPath(part).is_absolute() or ".." in PurePosixPath(part).parts:
            raise DataError(f"{base}: {file!r} leaves the folder; do not use this index")
    if not at:
        return base, name
    path = base / archive
    unpacked = path.with_suffix("")
    return (unpacked if unpacked.is_dir() and not path.exists() else path), name
