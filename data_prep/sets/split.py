"""Training and validation images of one source: which is which follows from a seed.

A group (a patient, a camera, a photographer; without a column the image itself) is on one side as
a whole. It has the hash of (seed, group), and those with the smallest hashes are for validation, so
neither the order of the source nor the number of processes has a part in it.
"""

import hashlib
import json
from fractions import Fraction

import numpy as np

from loaders.errors import DataError

TRAIN, VALIDATION = "train", "validation"


def group_hash(seed: int, group: str) -> int:
    """Hash of a group, 64 bits: blake2b as `selection.by_fraction` has it."""
    identity = json.dumps([seed, group]).encode()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "big")


def validation_limit(hashes: np.ndarray, fraction: Fraction, what: str) -> int:
    """The largest hash of an image for validation.

    `hashes`: (n,) uint64, of the group of each image. Groups in the order of their hashes are
    taken while that brings the number of images nearer to `fraction` of n. Raises `DataError`,
    naming `what`, where nothing would be left on one side.
    """
    values, counts = np.unique(hashes, return_counts=True)
    ends = np.cumsum(counts)
    wanted = float(fraction * len(hashes))
    taken = int(np.argmin(np.abs(ends - wanted))) if len(ends) else 0
    if len(values) < 2:
        raise DataError(
            f"{what}: {len(values)} groups in {len(hashes)} images; at least two are needed, one "
            "for training and one for validation"
        )
    return int(values[min(taken, len(values) - 2)])


def is_validation(hashes: np.ndarray, limit: int) -> np.ndarray:
    """Mask (n,) bool of the images for validation."""
    return hashes <= np.uint64(limit)
