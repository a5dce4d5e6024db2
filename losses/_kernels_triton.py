"""The Triton kernels of `losses._kernels`, which has their arithmetic; one program, one part of S.

They take the products x y^T of a slab. Rows and columns behind the last are the last one again, so
that loads need no mask and no number appears that is not a real product; what they would add is
masked out behind that. Offsets within a slab have 32 bits: it has fewer than 2^31 elements. No
kernel adds to memory atomically: every word is written by one program, so the result is the same to
the last bit in every run.

Numbers of rows and columns are not compiled in, so that another batch size needs no compilation.

Letters: n rows and m columns of the slab at hand, `stride` elements from one row of it to the next;
BLOCK_N, BLOCK_M the rows and columns that one step takes.
"""

import triton
import triton.language as tl


@triton.jit
def _products(products_at, rows, columns, n, m, stride):
    """x[rows] y[columns]^T."""
    near = tl.minimum(rows, n - 1)[:, None] * stride + tl.minimum(columns, m - 1)[None, :]
    return tl.load(products_at + near)


@triton.jit
def _kept(row_ids, column_ids, rows, columns, n, m):
    """Where a pair counts: inside the slab and not excluded."""
    kept = (rows < n)[:, None] & (columns < m)[None, :]
    if row_ids is not None:
        row_id = tl.load(row_ids + tl.minimum(rows, n - 1))
        column_id = tl.load(column_ids + tl.minimum(columns, m - 1))
        # Negative ids of the two sides are made unlike each other.
        row_id = tl.where(row_id < 0, -1, row_id)
        column_id = tl.where(column_id < 0, -2, column_id)
        kept = kept & (row_id[:, None] != column_id[None, :])
    return kept


@triton.jit
def _finite(shift):
    """0 in place of -inf, so that exp(-inf - shift) is 0 and not NaN."""
    return tl.where(shift == float("-inf"), 0.0, shift)


@triton.jit
def _sums(products, kept, scale, SPREAD: tl.constexpr):
    """Sums of exponentials of a tile: (shifts, sums) of its rows, (shifts, sums) of its columns.

    While the whole tile lies within SPREAD one shift and one exponential serve both directions.
    """
    ends = tl.max(tl.max(products, 1), 0) * scale, tl.min(tl.min(products, 1), 0) * scale
    highest, lowest = tl.maximum(ends[0], ends[1]), tl.minimum(ends[0], ends[1])
    # False for NaN as well, which then reaches the sums.
    if highest - lowest < SPREAD:
        weights = tl.where(kept, tl.exp(products * scale - highest), 0.0)
        row_sums, column_sums = tl.sum(weights, 1), tl.sum(weights, 0)
        # A row without a pair has no maximum: what it has elsewhere may lie far below this one.
        row_shifts = tl.where(row_sums == 0.0, float("-inf"), highest)
        column_shifts = tl.where(column_sums == 0.0, float("-inf"), highest)
    else:
        logits = tl.where(kept, products * scale, float("-inf"))
        row_shifts, column_shifts = tl.max(logits, 1), tl.max(logits, 0)
        row_sums = tl.sum(tl.exp(logits - _finite(row_shifts)[:, None]), 1)
        column_sums = tl.sum(tl.exp(logits - _finite(column_shifts)[None, :]), 0)
    return row_shifts, row_sums, column_shifts, column_sums


@triton.jit(do_not_specialize=["n", "m", "walk", "parts_stride"])
def logsumexps(
    products_at,
    scale_at,
    row_ids,
    column_ids,
    row_parts,
    column_parts,
    n,
    m,
    walk,
    stride,
    parts_stride,
    SPREAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Logsumexps of one row block over `walk` column blocks, and of these columns over the rows.

    Writes row_parts (groups of `walk` column blocks, n) and column_parts (row blocks, m), whose
    rows are `parts_stride` apart.
    """
    row_blocks = tl.cdiv(n, BLOCK_N)
    block, group = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    scale = tl.load(scale_at)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_shifts = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    row_sums = tl.zeros([BLOCK_N], dtype=tl.float32)
    for step in range(group * walk, tl.minimum((group + 1) * walk, tl.cdiv(m, BLOCK_M))):
        columns = step * BLOCK_M + tl.arange(0, BLOCK_M)
        products = _products(products_at, rows, columns, n, m, stride)
        kept = _kept(row_ids, column_ids, rows, columns, n, m)
        shifts, sums, column_shifts, column_sums = _sums(products, kept, scale, SPREAD)
        larger = tl.maximum(row_shifts, shifts)
        row_sums *= tl.exp(row_shifts - _finite(larger))
        row_sums += sums * tl.exp(shifts - _finite(larger))
        row_shifts = larger
        column_at = column_parts + block.to(tl.int64) * parts_stride + columns
        tl.store(column_at, column_shifts + tl.log(column_sums), mask=columns < m)
    tl.store(row_parts + group.to(tl.int64) * n + rows, row_shifts + tl.log(row_sums), rows < n)


@triton.jit(do_not_specialize=["count", "length"])
def combine(
    parts,
    totals,
    count,
    length,
    FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """totals (length,) = logsumexp of parts (count, length) over the parts; unless FIRST, of itself
    as well."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    shift = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    if not FIRST:
        shift = tl.load(totals + at, mask=at < length, other=float("-inf"))
    total = tl.exp(shift - _finite(shift))
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < count)[:, None] & (at < length)[None, :]
        part_at = parts + part.to(tl.int64)[:, None] * length + at[None, :]
        values = tl.load(part_at, mask=inside, other=float("-inf"))
        larger = tl.maximum(shift, tl.max(values, 0))
        total *= tl.exp(shift - _finite(larger))
        total += tl.sum(tl.exp(values - _finite(larger)[None, :]), 0)
        shift = larger
    tl.store(totals + at, shift + tl.log(total), mask=at < length)


@triton.jit
def _softmax_weights(logits, row_lse, column_lse, row_weights, column_weights, SAFE: tl.constexpr):
    """g exp(S - r) + h exp(S - c) of a tile; 0 where r or c is -inf.

    S is at most `bound`, because it is at most r and c. While no r and no c lies further than SAFE
    below it, exp(S - bound) serves both terms: what it loses by underflow is less than
    exp(SAFE - 87) of a weight of 1.
    """
    row_weights = tl.where(row_lse == float("-inf"), 0.0, row_weights)
    column_weights = tl.where(column_lse == float("-inf"), 0.0, column_weights)
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    column_lse = tl.where(column_lse == float("-inf"), float("inf"), column_lse)
    bound = tl.minimum(tl.max(row_lse, 0), tl.max(column_lse, 0))
    depth = bound - tl.minimum(tl.min(row_lse, 0), tl.min(column_lse, 0))
    if depth < SAFE:  # false for NaN
        row_factors = row_weights * tl.exp(bound - row_lse)
        column_factors = column_weights * tl.exp(bound - column_lse)
        weights = tl.exp(logits - bound) * (row_factors[:, None] + column_factors[None, :])
    else:
        weights = tl.exp(logits - row_lse[:, None]) * row_weights[:, None]
        weights += tl.exp(logits - column_lse[None, :]) * column_weights[None, :]
    return weights


@triton.jit(do_not_specialize=["n", "m"])
def pair_weights(
    products_at,
    scale_at,
    bias_at,
    row_ids,
    column_ids,
    row_lse,
    column_lse,
    row_weights,
    column_weights,
    weights_out,
    sums_out,
    n,
    m,
    stride,
    SIGMOID: tl.constexpr,
    SAFE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One block of G into weights_out (n, m), in its type, which may be `products_at` itself.

    With SIGMOID G is sigmoid(S + bias) and its sum goes to sums_out (programs,); else see
    `_softmax_weights`.
    """
    column_blocks = tl.cdiv(m, BLOCK_M)
    block, step = tl.program_id(0) // column_blocks, tl.program_id(0) % column_blocks
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = step * BLOCK_M + tl.arange(0, BLOCK_M)
    near_rows, near_columns = tl.minimum(rows, n - 1), tl.minimum(columns, m - 1)
    logits = _products(products_at, rows, columns, n, m, stride) * tl.load(scale_at)
    if SIGMOID or row_ids is not None:
        kept = _kept(row_ids, column_ids, rows, columns, n, m)
        logits = tl.where(kept, logits, float("-inf"))
    if SIGMOID:
        weights = 1.0 / (1.0 + tl.exp(-logits - tl.load(bias_at)))
        tl.store(sums_out + tl.program_id(0), tl.sum(tl.sum(weights, 1), 0))
    else:
        weights = _softmax_weights(
            logits,
            tl.load(row_lse + near_rows),
            tl.load(column_lse + near_columns),
            tl.load(row_weights + near_rows),
            tl.load(column_weights + near_columns),
            SAFE,
        )
    out_at = weights_out + (rows * stride)[:, None] + columns[None, :]
    inside = (rows < n)[:, None] & (columns < m)[None, :]
    tl.store(out_at, weights.to(weights_out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "m"])
def softplus_sums(
    products_at,
    scale_at,
    bias_at,
    row_ids,
    column_ids,
    sums_out,
    n,
    m,
    stride,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """sums_out (programs,): the sum of log(1 + exp(S + bias)) over one block of pairs."""
    column_blocks = tl.cdiv(m, BLOCK_M)
    block, step = tl.program_id(0) // column_blocks, tl.program_id(0) % column_blocks
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = step * BLOCK_M + tl.arange(0, BLOCK_M)
    products = _products(products_at, rows, columns, n, m, stride)
    kept = _kept(row_ids, column_ids, rows, columns, n, m)
    logits = tl.where(kept, products * tl.load(scale_at) + tl.load(bias_at), float("-inf"))
    # log(1 + e) = 2 artanh(e / (2 + e)) by its series, because 1 + e has lost a small e; the ratio
    # is at most 1/3, so all terms after the last make 2e-8 of the sum.
    small = tl.exp(-tl.abs(logits))
    ratio = small / (2.0 + small)
    square = ratio * ratio
    series = 1 / 11 + square * (1 / 13)
    series = 1 / 7 + square * (1 / 9 + square * series)
    series = 1 / 3 + square * (1 / 5 + square * series)
    softplus = tl.maximum(logits, 0.0) + 2.0 * ratio * (1.0 + square * series)
    tl.store(sums_out + tl.program_id(0), tl.sum(tl.sum(softplus, 1), 0))
