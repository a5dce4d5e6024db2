"""Labels of the ImageNet validation images, from the development kit of ILSVRC2012 (task 1 and 2).

`data/ILSVRC2012_validation_ground_truth.txt` holds one ILSVRC2012_ID a line, in the order of the
image names. The ID is not the training label: `data/meta.mat` says which WNID it stands for (the
synsets without children; its 860 inner nodes have IDs over 1000), and the training label is the
rank of that WNID. Layout: the kit's readme.txt, and torchvision 0.29's reader of it.
"""

import codecs
import io
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loaders.errors import DataError

META = "data/meta.mat"
TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_OFFICIAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
# First images of the real validation set.
_KNOWN = {1: "n01751748", 2: "n09193705", 3: "n02105855", 4: "n04263257"}
_REAL_SIZE = 50_000


def read_labels(devkit: Path, synsets: Sequence[str]) -> np.ndarray:
    """Training label of each validation image in the order of names, (n,) int32.

    `synsets`: WNIDs in label order. Raises `DataError` for a kit that is damaged, of another
    challenge, or whose IDs are not 1 to the number of classes.
    """
    files = _read_files(devkit)
    wnids = _wnid_of_id(devkit, files[META])
    differing = sorted(set(wnids.values()) ^ set(synsets))
    if differing or sorted(wnids) != list(range(1, len(synsets) + 1)):
        raise DataError(
            f"{devkit}: {META} has {len(wnids)} synsets without children with IDs "
            f"{min(wnids, default=None)} to {max(wnids, default=None)}, and "
            f"{len(differing)} differences from the {len(synsets)} classes of ImageNet-1K "
            f"({', '.join(differing[:5])}): the kit of another challenge? "
            "Use ILSVRC2012_devkit_t12.tar.gz"
        )
    label = {synset: rank for rank, synset in enumerate(synsets)}
    ids = _parse_truth(devkit, files[TRUTH], len(synsets))
    return np.array([label[wnids[number]] for number in ids], np.int32)


def check_order(names: Sequence[str], labels: np.ndarray, synsets: Sequence[str]) -> None:
    """Raise `DataError` if validation images, sorted by name, do not fit their labels.

    Official names must be numbered without a gap. The full set is compared with the labels of its
    first four images, which a shuffled list or a folder sorted by another rule gets wrong.
    """
    for position, name in enumerate(names):
        match = _OFFICIAL_NAME.fullmatch(name)
        if match and int(match[1]) != position + 1:
            raise DataError(
                f"{name} is image {position + 1} by sorted name: images before it are missing or "
                "twice there, and all labels after that would be shifted; get the whole set"
            )
    if len(names) != _REAL_SIZE or not _OFFICIAL_NAME.fullmatch(names[0]):
        return
    for number, synset in _KNOWN.items():
        found = synsets[labels[number - 1]]
        if found != synset:
            raise DataError(
                f"{names[number - 1]} has class {found}, but it is {synset} in ILSVRC2012: the "
                "labels are not in the order of the images (the kit of another year, or images "
                "sorted into folders by another rule)"
            )


def _read_files(devkit: Path) -> dict[str, bytes]:
    """The two files of the kit."""
    found = {}
    try:
        with tarfile.open(devkit) as kit:
            for member in kit:
                for name in (META, TRUTH):
                    if member.isfile() and f"/{member.name}".endswith(f"/{name}"):
                        found[name] = kit.extractfile(member).read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{devkit}: cannot read the development kit ({error})") from None
    missing = [name for name in (META, TRUTH) if name not in found]
    if missing:
        raise DataError(
            f"{devkit}: no {' and no '.join(missing)} in it; the validation labels are in "
            "ILSVRC2012_devkit_t12.tar.gz (task 1 and 2), not in the kit of task 3"
        )
    return found


def _wnid_of_id(devkit: Path, data: bytes) -> dict[int, str]:
    """ILSVRC2012_ID -> WNID of the synsets without children."""
    import scipy.io  # here, because only the validation split needs it

    try:
        synsets = scipy.io.loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        return {
            int(synset["ILSVRC2012_ID"]): str(synset["WNID"])
            for synset in np.atleast_1d(synsets)
            if int(synset["num_children"]) == 0
        }
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise DataError(
            f"{devkit}: cannot read {META} ({type(error).__name__}: {error}); get the kit again"
        ) from None


def _parse_truth(devkit: Path, data: bytes, classes: int) -> list[int]:
    """ILSVRC2012_IDs of the validation images, checked to be 1..classes."""
    ids = []
    lines = data.removeprefix(codecs.BOM_UTF8).rstrip().splitlines()  # of a kit packed again
    for number, line in enumerate(lines, 1):
        if not re.fullmatch(rb"\d{1,9}", line.strip()):
            raise DataError(f"{devkit}: {TRUTH}, line {number}: {line[:40]!r} is no class ID")
        ids.append(int(line))
    low, high = min(ids, default=0), max(ids, default=0)
    if low == 0 or high > classes:
        based = "they look 0-based" if low == 0 and high < classes else "they are another list"
        raise DataError(
            f"{devkit}: {TRUTH}: IDs {low} to {high}, expected 1 to {classes}: {based}, and every "
            "label would be wrong; use the file of ILSVRC2012_devkit_t12.tar.gz"
        )
    return ids
