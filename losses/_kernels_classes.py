"""Sums of rows by class on a GPU: `losses._classes` as Triton kernels.

Each is one launch where torch needs several, without a copy of the features by class. Sums are
taken in the order of the samples by one program each, so that they are equal to the last bit from
run to run, which those of `index_add_` on a GPU are not. Nothing makes the host wait.

Letters: as in `losses._classes`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, FEATURES = 8, 128  # of one step of the kernels that walk along rows
MEMBERS, WIDTH = 16, 256  # members of a class, and features, of one step of its sum
WARPS = 4


def numbered(labels: Tensor) -> tuple[Tensor, Tensor]:
    """As `losses._classes.numbered`; ids may have gaps."""
    ids, counts = torch.empty_like(labels), torch.empty_like(labels)
    if len(labels):
        ordered, order = torch.sort(labels, stable=True)
        with torch.cuda.device_of(labels):
            _segments[(triton.cdiv(len(labels), 128),)](
                ordered, order, ids, counts, len(labels), len(labels).bit_length(), BLOCK=128,
                num_warps=WARPS,
            )  # fmt: skip
    return ids, counts


def means(features: Tensor, ids: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
    """As `losses._classes.means`, in float32."""
    count, width = features.shape
    table = features.new_zeros((len(counts), width), dtype=torch.float32)
    if count:
        ordered, order = torch.sort(ids, stable=True)
        with torch.cuda.device_of(features):
            _class_means[(count, triton.cdiv(width, WIDTH))](
                features.contiguous(), None if weights is None else weights.contiguous(),
                ordered, order, counts, table, count, width,
                MEMBERS=MEMBERS, WIDTH=WIDTH, num_warps=WARPS,
            )  # fmt: skip
    return table


def dots(features: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """As `losses._classes.dots`, in float32."""
    count, width = features.shape
    out = features.new_empty(count, dtype=torch.float32)
    if count:
        with torch.cuda.device_of(features):
            _dots[(triton.cdiv(count, ROWS),)](
                features.contiguous(), table, ids, out, count, width,
                ROWS=ROWS, FEATURES=FEATURES, num_warps=WARPS,
            )  # fmt: skip
    return out


def finish(
    grad: Tensor,
    scale: Tensor,
    features: Tensor | None = None,
    table: Tensor | None = None,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `losses._classes.finish`, of a gradient in float32."""
    count, width = grad.shape
    grad = grad.contiguous()
    blocks = triton.cdiv(count, ROWS)
    parts = None if features is None else grad.new_empty(blocks)
    if count:
        with torch.cuda.device_of(grad):
            _finish[(blocks,)](
                grad, scale, None if features is None else features.contiguous(), table, ids,
                None if weights is None else weights.contiguous(), parts, count, width,
                ROWS=ROWS, FEATURES=FEATURES, num_warps=WARPS,
            )  # fmt: skip
    return grad, None if parts is None else parts.sum()


@triton.jit(do_not_specialize=["n", "steps"])
def _segments(ordered, order, ids, counts, n, steps, BLOCK: tl.constexpr):
    """ids[order[k]] = place of the first of ordered (n,) that equals the k-th; counts at it.

    Bisections of `steps` steps, 2^steps > n. Every -1 is a class of its own.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    label = tl.load(ordered + place, mask=inside, other=0)
    first, high = tl.zeros([BLOCK], dtype=tl.int32), place
    last, end = place + 1, tl.zeros([BLOCK], dtype=tl.int32) + n
    for _ in range(steps):
        middle = (first + high) // 2
        open_ = inside & (first < high)
        less = open_ & (tl.load(ordered + middle, mask=open_, other=0) < label)
        first, high = tl.where(less, middle + 1, first), tl.where(less, high, middle)
        middle = (last + end) // 2
        open_ = inside & (last < end)
        same = open_ & (tl.load(ordered + middle, mask=open_, other=0) <= label)
        last, end = tl.where(same, middle + 1, last), tl.where(same, end, middle)
    alone = label == -1
    first, last = tl.where(alone, place, first), tl.where(alone, place + 1, last)
    sample = tl.load(order + place, mask=inside, other=0)
    tl.store(ids + sample, first.to(tl.int64), mask=inside)
    tl.store(counts + place, tl.where(first == place, last - first, 0).to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _class_means(
    features,
    weights,
    ordered,
    order,
    counts,
    table,
    n,
    D,
    MEMBERS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program for each place of the ordered ids: where a class begins, it takes its sum."""
    place = tl.program_id(0)
    number = tl.load(ordered + place)
    before = tl.load(ordered + tl.maximum(place - 1, 0))
    if (place == 0) | (before != number):
        columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        total = tl.zeros([WIDTH], dtype=tl.float32)
        more = place < n
        while more:
            members = place + tl.arange(0, MEMBERS)
            found = tl.load(ordered + members, mask=members < n, other=-1) == number
            rows = tl.load(order + members, mask=found, other=0)
            at = features + rows[:, None] * D + columns[None, :]
            inside = found[:, None] & (columns < D)[None, :]
            values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if weights is not None:
                values *= tl.load(weights + rows, mask=found, other=0.0)[:, None]
            total += tl.sum(values, 0)
            place += MEMBERS
            more = tl.sum(found.to(tl.int32), 0) == MEMBERS
        count = tl.load(counts + number).to(tl.float32)
        tl.store(table + number * D + columns, total / count, mask=columns < D)


@triton.jit(do_not_specialize=["n"])
def _dots(features, table, ids, out, n, D, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    """out (n,): products of rows of features (n, D) and the rows of the table that ids name."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    number = tl.load(ids + rows, mask=rows < n, other=0)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, D, FEATURES):
        columns = start + tl.arange(0, FEATURES)
        inside = (rows < n)[:, None] & (columns < D)[None, :]
        at = rows.to(tl.int64)[:, None] * D + columns[None, :]
        left = tl.load(features + at, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(table + number[:, None] * D + columns[None, :], mask=inside, other=0.0)
        total += tl.sum(left * right, 1)
    tl.store(out + rows, total, mask=rows < n)


@triton.jit(do_not_specialize=["n"])
def _finish(
    grad,
    scale_at,
    features,
    table,
    ids,
    weights,
    parts,
    n,
    D,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """grad (n, D) becomes scale * A, parts (programs,) the sums of features * A, see `finish`."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    scale = tl.load(scale_at)
    total = tl.zeros([ROWS], dtype=tl.float32)
    if table is not None:
        number = tl.load(ids + rows, mask=rows < n, other=0)
    for start in range(0, D, FEATURES):
        columns = start + tl.arange(0, FEATURES)
        inside = (rows < n)[:, None] & (columns < D)[None, :]
        at = rows.to(tl.int64)[:, None] * D + columns[None, :]
        value = tl.load(grad + at, mask=inside, other=0.0)
        if table is not None:
            mean = tl.load(table + number[:, None] * D + columns[None, :], mask=inside, other=0.0)
            if weights is not None:
                mean *= tl.load(weights + rows, mask=rows < n, other=0.0)[:, None]
            value += mean
        if features is not None:
            feature = tl.load(features + at, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(feature * value, 1)
        tl.store(grad + at, value * scale, mask=inside)
    if parts is not None:
        tl.store(parts + tl.program_id(0), tl.sum(total, 0))
