"""Arrays of a sample: members `NAME.npy`, such as features of the objects that a detector found.

They come from anywhere, as the tars do. Only a table of floats is taken, its header is compared
with its length before anything of its size is made, and nothing is ever unpickled. No torch here:
data_prep checks sets by it.

`objects`: the r regions of a picture, the surest first, W numbers each.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np

from loaders.manifest import ShardSet

FLOATS = (np.dtype("<f2"), np.dtype("<f4"))
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class BadArray(Exception):
    """An array that cannot be used; `reason` is one short word for the counts."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class ArrayShape:
    """What every sample's array `name` is padded to: (rows, width) float32."""

    name: str
    rows: int
    width: int


def parse(data: bytes) -> np.ndarray:
    """The table in the bytes of an `.npy` file, (r, W) float16 or float32, little-endian, finite.

    A view of the bytes, not to be written to.

    Raises:
        BadArray: no such file (`not_an_array`), anything else than such a table (`array_type`,
            `array_shape`), fewer or more bytes than its header says (`array_length`), or NaN or
            infinite numbers (`array_not_finite`).
    """
    file = io.BytesIO(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            shape, by_column, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
    except Exception as error:  # numpy and the compiler that reads its header raise anything
        raise BadArray("not_an_array", " ".join(str(error).split())[:200]) from None
    if dtype not in FLOATS:
        raise BadArray("array_type", f"{dtype}; needed are float16 or float32, little-endian")
    if len(shape) != 2 or min(shape) < 0 or shape[1] < 1 or by_column:
        raise BadArray("array_shape", f"{shape}; needed are rows of numbers, row after row")
    if shape[0] * shape[1] * dtype.itemsize != len(data) - file.tell():
        raise BadArray("array_length", f"{len(data) - file.tell()} bytes for {shape} of {dtype}")
    table = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)
    if not np.isfinite(table).all():
        raise BadArray("array_not_finite")
    return table


def read(shards: ShardSet, index: int, shape: ArrayShape) -> dict[str, np.ndarray]:
    """The array of a sample, padded with zeros to its stated number of rows.

    Returns:
        NAME (rows, width) float32, the first rows where there are more; NAME_mask (rows,) bool,
        True where a row is one of the sample's.

    Raises:
        BadArray: as `parse`, and for another width (`array_width`).
        MissingMember: the sample has none, or it is too large to be read.
    """
    table = parse(shards.read_array(index, shape.name))[: shape.rows]
    if table.shape[1] != shape.width:
        raise BadArray("array_width", f"{table.shape[1]}, stated is {shape.width}")
    padded = np.zeros((shape.rows, shape.width), np.float32)
    padded[: len(table)] = table
    return {shape.name: padded, f"{shape.name}_mask": np.arange(shape.rows) < len(table)}
