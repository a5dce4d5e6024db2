"""Pillow's bicubic resizing, the same to the bit, in a quarter of its time.

Pillow (src/libImaging/Resample.c) resizes along rows, rounds to 8 bits, then resizes along columns.
A value is a sum of 8-bit pixels times weights with 22 bits behind the point, all integers, so that
any order of adding gives the same. Pillow adds pixel by pixel; here 64 rows, or one whole row, are
added at once by vector instructions. Rows are turned into columns for that, eight by eight bytes,
and the result comes in planes, as tensors want it.

Numba compiles this when it is imported (some seconds) and keeps the result in `__pycache__` or,
where that cannot be written, in the user's cache folder, apart for each kind of processor: nodes
of two kinds that start at once on one file system could take each other's code from one folder.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from llvmlite import binding
from numba import config, njit

Pixels = np.ndarray
Box = tuple[int, int, int, int]

_BITS = 22  # of a weight behind the point: Pillow's PRECISION_BITS
_HALF = np.int32(1 << (_BITS - 1))
_A = -0.5  # Pillow's bicubic
_SUPPORT = 2.0  # pixels of the larger scale to each side
_ROWS = 64  # turned and added at once
_WHOLE, _HALVES, _QUARTERS = (np.uint64(bits) for bits in (32, 16, 8))
_MASK_WHOLE = np.uint64(0x00000000FFFFFFFF)
_MASK_HALVES = np.uint64(0x0000FFFF0000FFFF)
_MASK_QUARTERS = np.uint64(0x00FF00FF00FF00FF)


def _folder() -> Path:
    """Where the compiled code for this kind of processor is kept."""
    here = Path(__file__).parent
    base = here / "__pycache__"
    if not os.access(base if base.exists() else here, os.W_OK):
        base = Path("~/.cache/unicl").expanduser()
    processor = f"{binding.get_host_cpu_name()} {binding.get_host_cpu_features().flatten()}"
    return base / f"numba-{hashlib.blake2b(processor.encode(), digest_size=6).hexdigest()}"


def _compiled(signature: str) -> Callable[[Callable], Callable]:
    def compile_(function: Callable) -> Callable:
        chosen = config.CACHE_DIR  # of the user: NUMBA_CACHE_DIR
        config.CACHE_DIR = chosen or str(_folder())
        try:
            return njit(signature, cache=True, nogil=True)(function)
        except RuntimeError:  # no folder can be written to: every process compiles
            return njit(signature, nogil=True)(function)
        finally:
            config.CACHE_DIR = chosen

    return compile_


@njit(nogil=True)
def _cubic(x: float) -> float:
    x = abs(x)
    if x < 1.0:
        return ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * _A
    return 0.0


@njit(nogil=True)
def _weights(n_in: int, n_out: int) -> tuple[Pixels, Pixels, Pixels]:
    """First pixel (n_out), number of pixels (n_out), weights int32 (n_out, most pixels)."""
    scale = n_in / n_out
    wide = max(scale, 1.0)
    support = _SUPPORT * wide
    most = int(np.ceil(support)) * 2 + 1
    first, count = np.empty(n_out, np.int64), np.empty(n_out, np.int64)
    table, line = np.zeros((n_out, most), np.int32), np.empty(most)
    for out in range(n_out):
        center = (out + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        number = min(int(center + support + 0.5), n_in) - low
        total = 0.0
        for i in range(number):
            line[i] = _cubic((i + low - center + 0.5) * (1.0 / wide))
            total += line[i]
        for i in range(number):
            share = line[i] / total if total != 0.0 else line[i]
            table[out, i] = int(share * (1 << _BITS) + (-0.5 if share < 0 else 0.5))
        first[out], count[out] = low, number
    return first, count, table


@njit(nogil=True)
def _swap(a: int, b: int, shift: int, mask: int) -> tuple[int, int]:
    """The masked high part of `a` and the masked low part of `b`, exchanged."""
    moved = ((a >> shift) ^ b) & mask
    return a ^ (moved << shift), b ^ moved


@njit(nogil=True)
def _turn(source: Pixels, target: Pixels) -> None:
    """Bytes transposed: uint64 (8 m, n) -> uint64 (8 n, m), each of eight bytes in a row.

    In blocks of eight by eight bytes: their quarters change places, and those within these, and so
    on (H. S. Warren, Hacker's Delight, 2nd edition, section 7-3).
    """
    for m in range(source.shape[0] // 8):
        s = 8 * m
        for n in range(source.shape[1]):
            a0, a4 = _swap(source[s, n], source[s + 4, n], _WHOLE, _MASK_WHOLE)
            a1, a5 = _swap(source[s + 1, n], source[s + 5, n], _WHOLE, _MASK_WHOLE)
            a2, a6 = _swap(source[s + 2, n], source[s + 6, n], _WHOLE, _MASK_WHOLE)
            a3, a7 = _swap(source[s + 3, n], source[s + 7, n], _WHOLE, _MASK_WHOLE)
            a0, a2 = _swap(a0, a2, _HALVES, _MASK_HALVES)
            a1, a3 = _swap(a1, a3, _HALVES, _MASK_HALVES)
            a4, a6 = _swap(a4, a6, _HALVES, _MASK_HALVES)
            a5, a7 = _swap(a5, a7, _HALVES, _MASK_HALVES)
            t = 8 * n
            target[t, m], target[t + 1, m] = _swap(a0, a1, _QUARTERS, _MASK_QUARTERS)
            target[t + 2, m], target[t + 3, m] = _swap(a2, a3, _QUARTERS, _MASK_QUARTERS)
            target[t + 4, m], target[t + 5, m] = _swap(a4, a5, _QUARTERS, _MASK_QUARTERS)
            target[t + 6, m], target[t + 7, m] = _swap(a6, a7, _QUARTERS, _MASK_QUARTERS)


@njit(nogil=True)
def _add(
    lines: Pixels, start: int, step: int, left: int, weights: Pixels, total: Pixels, to: Pixels
) -> None:
    """to[x] = sum over i of weights[i] * lines[start + i * step, left + x], x < len(total)."""
    total[:] = _HALF
    for i in range(len(weights)):
        weight, line = weights[i], lines[start + i * step, left : left + len(total)]
        for x in range(len(total)):
            total[x] += np.int32(line[x]) * weight
    for x in range(len(total)):
        to[x] = min(max(total[x] >> _BITS, 0), 255)


@_compiled("void(uint8[:, ::1], int64, int64, int64, int64, int64, uint8[:, :, ::1])")
def _rows(
    source: Pixels, top: int, rows: int, left: int, n_in: int, n_out: int, result: Pixels
) -> None:
    """Rows resized, each to n_out pixels.

    `source`: uint8 (H, 3 W), of which the pixels `left` to `left + n_in` of `rows` rows from `top`.
    `result`: uint8 (3, 64 k >= rows, 8 m >= n_out), filled up with anything.
    """
    first, count, table = _weights(n_in, n_out)
    block = np.zeros((_ROWS, (3 * n_in + 7) // 8), np.uint64)
    turned = np.empty((8 * block.shape[1], _ROWS // 8), np.uint64)
    done = np.zeros((3, result.shape[2], _ROWS // 8), np.uint64)
    block_bytes, turned_bytes = block.view(np.uint8), turned.view(np.uint8)
    done_bytes, planes = done.view(np.uint8), result.view(np.uint64)
    total = np.empty(_ROWS, np.int32)
    for done_rows in range(0, rows, _ROWS):
        for j in range(min(_ROWS, rows - done_rows)):
            line, pixels = block_bytes[j], source[top + done_rows + j, 3 * left : 3 * (left + n_in)]
            for x in range(3 * n_in):
                line[x] = pixels[x]
        _turn(block, turned)
        for out in range(n_out):
            weights = table[out, : count[out]]
            for channel in range(3):
                start = 3 * first[out] + channel
                _add(turned_bytes, start, 3, 0, weights, total, done_bytes[channel, out])
        for channel in range(3):
            _turn(done[channel], planes[channel, done_rows : done_rows + _ROWS])


@_compiled("void(uint8[:, ::1], int64, int64, int64, uint8[:, ::1])")
def _columns(source: Pixels, top: int, n_in: int, left: int, result: Pixels) -> None:
    """Columns resized: uint8 (H, W or more) from (top, left) on, n_in rows -> all of `result`."""
    first, count, table = _weights(n_in, result.shape[0])
    total = np.empty(result.shape[1], np.int32)
    for y in range(result.shape[0]):
        weights = table[y, : count[y]]
        _add(source, top + first[y], 1, left, weights, total, result[y])


def resize(pixels: Pixels, box: Box, width: int, height: int) -> Pixels:
    """`image.crop(box).resize((width, height), BICUBIC)` of an RGB image as Pillow 13 does it.

    Args:
        pixels: uint8 (H, W, 3), contiguous and writable (nothing is written).
        box: left, top, right, bottom in pixels, within the image and not empty.
        width, height: of the result, in pixels.

    Returns:
        uint8 (3, height, width), contiguous.

    Source: Pillow 13.0.0, src/libImaging/Resample.c, `ImagingResampleInner`: columns first where
    they lose more than twice as many pixels as rows, which earlier versions do not. A side that
    keeps its length goes through here as well, with weights 1 and 0.
    """
    left, top, right, bottom = box
    rows, columns = bottom - top, right - left
    source = pixels.reshape(pixels.shape[0], -1)
    result = np.empty((3, height, width), np.uint8)
    columns_first = rows > height and rows - height > 2 * (columns - width)
    blocks = -(-(height if columns_first else rows) // _ROWS)
    planes = np.empty((3, _ROWS * blocks, -(-width // 8) * 8), np.uint8)
    if columns_first:
        flat = np.empty((height, 3 * columns), np.uint8)
        _columns(source, top, rows, 3 * left, flat)
        _rows(flat, 0, height, 0, columns, width, planes)
        result[:] = planes[:, :height, :width]
    else:
        _rows(source, top, rows, left, columns, width, planes)
        for plane, to in zip(planes, result, strict=True):
            _columns(plane, 0, rows, 0, to)
    return result
