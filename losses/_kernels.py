"""One block of the logits by Triton kernels: the GPU's form of `losses._tiles`.

One unit is the product x y^T: 2 n m D operations.

* Normalisers: 1 unit, both from one walk. A program keeps the running sums of its rows while it
  walks over column blocks; it writes one logsumexp per row and walk, and one per column and row
  block, which a second kernel joins. Rows are taken in slabs, so that these parts stay small:
  4 bytes x 64 row blocks x m columns, 16 MiB at m = 65,536 and 256 MiB at 2^20.
* Gradients: 3 units. A kernel computes the product again and writes G, in the type of x, into a
  scratch of at most SCRATCH bytes; the vendor's matrix products take it to G y and G^T x. The other
  way, a kernel that adds up its rows of G y in registers and another for G^T x, writes no G but
  costs 4 units, and with D from 512 to 1,024 the sums leave registers for blocks of 64 rows at
  most, which read x and y from the cache twice as often. Writing G once and reading it twice moves
  6 bytes per pair against 6 D operations.

Memory beside x and y: that scratch, the float32 gradients, and one product of at most SLAB rows
(or columns) before it is added to them. Nothing has the size n m unless that is below the scratch.

bfloat16 inputs, and float32 ones where torch allows TF32 in products, go to the tensor cores from
these kernels. Other float32 products are left to the vendor's library, which writes them into the
scratch, where the same kernels take them from: Triton computes them without tensor cores and below
the library's speed.

Results are equal to the last bit from run to run: no kernel adds atomically, and block sizes
follow from the shape alone, never from a timing. Nothing makes the host wait for the device.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from losses import _kernels_triton as kernels
from losses._tiles import SAFE_SPREAD, Ids

SCRATCH = 128 * 2**20
# Rows of a slab. G's slab has as many columns in bfloat16: then the two products have enough blocks
# of output for every multiprocessor, at D 512 without splitting their sums.
SLAB = 8192
# Rows, columns and features of one step, warps and stages. Derived on paper and from the compiler's
# count of registers and shared memory (two programs at a time on a multiprocessor of an H100, one
# of them in its products while the other is in its exponentials; at most 100 KiB, so that every
# card since Ampere runs it) until a run on a card replaces it.
LARGE = {torch.bfloat16: (128, 128, 64, 4, 3), torch.float32: (128, 128, 32, 4, 3)}
# For shapes with fewer large blocks than FILLED, which would leave most of a card without work.
SMALL = {torch.bfloat16: (64, 64, 64, 4, 4), torch.float32: (64, 64, 32, 4, 4)}
FILLED = 128
# For products taken from the scratch: large blocks of them do not fit the registers, in which the
# compiler lays them out worse than what the tensor cores return.
GIVEN = (64, 64, 32, 8, 1)
# Walks of the normalisers grow so that there are this many: some eight for every multiprocessor.
WALKS = 1024
# How far the normalisers of a block may lie below their bound, see `_softmax_weights`.
SAFE = 40.0


class KernelTiles:
    """As `losses._tiles.Tiles`; sums, normalisers and gradients are float32.

    Args:
        x, y: (n, D), (m, D) on one GPU, both bfloat16 or both float32; n or m may be 0. Products
            take inputs of this type (G is rounded to it before its products with x and y).
        scale: () multiplier of the products, on the same device.
        excluded: ids of the rows (n,) and of the columns (m,), int64: the pair (i, j) is left out
            of every sum where they are equal; a negative id excludes nothing.

    Raises:
        TypeError: x and y are neither both bfloat16 nor both float32.
    """

    def __init__(self, x: Tensor, y: Tensor, scale: Tensor, excluded: Ids | None = None):
        if x.dtype != y.dtype or x.dtype not in LARGE:
            raise TypeError(f"x and y must both be bfloat16 or float32, not {x.dtype}, {y.dtype}")
        self.x, self.y, self.scale = x.contiguous(), y.contiguous(), scale.float()
        self.excluded = None if excluded is None else tuple(ids.contiguous() for ids in excluded)
        self.given = x.dtype == torch.float32 and not _tf32_is_allowed()

    def forward(self) -> tuple[Tensor, Tensor]:
        """logsumexp of S over its columns, r (n,), and over its rows, c (m,).

        It is -inf for a row or column of which every pair is excluded.
        """
        row_lse, column_lse = (self._of_nothing(len(side)) for side in (self.x, self.y))
        for slab in self._slabs(self.given):
            walk = max(1, slab.row_blocks * slab.column_blocks // WALKS)
            groups = triton.cdiv(slab.column_blocks, walk)
            row_parts = self.scale.new_empty((groups, slab.n))
            column_parts = self.scale.new_empty((slab.row_blocks, slab.m))
            slab.launch(
                kernels.logsumexps,
                slab.row_blocks * groups,
                row_parts=row_parts,
                column_parts=column_parts,
                walk=walk,
                SPREAD=SAFE_SPREAD,
            )
            _combine(row_parts, row_lse[slab.rows], first=slab.columns.start == 0)
            _combine(column_parts, column_lse[slab.columns], first=slab.rows.start == 0)
        return row_lse, column_lse

    def _of_nothing(self, count: int) -> Tensor:
        """(count,) that the first parts are written into; what it is where there are none."""
        if len(self.x) and len(self.y):
            return self.scale.new_empty(count)
        return self.scale.new_full((count,), -torch.inf)

    def backward(
        self, row_lse: Tensor, column_lse: Tensor, row_weights: Tensor, column_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """G y (n, D) and G^T x (m, D) with G_ij = g_i exp(S_ij - r_i) + h_j exp(S_ij - c_j).

        Args:
            row_lse, column_lse: r (n,), c (m,), of these or of more columns and rows. Where one is
                -inf its weight counts as 0.
            row_weights, column_weights: g (n,), h (m,) of any sign.
        """
        r, g = row_lse.float().contiguous(), row_weights.float().contiguous()
        c, h = column_lse.float().contiguous(), column_weights.float().contiguous()

        def weigh(slab: "_Slab", weights: Tensor) -> None:
            slab.launch(
                kernels.pair_weights,
                slab.row_blocks * slab.column_blocks,
                bias_at=None,
                row_lse=r[slab.rows],
                column_lse=c[slab.columns],
                row_weights=g[slab.rows],
                column_weights=h[slab.columns],
                weights_out=weights,
                sums_out=None,
                SIGMOID=False,
                SAFE=SAFE,
            )

        return self._gradients(weigh)

    def softplus_sum(self, bias: Tensor) -> Tensor:
        """The sum over all pairs (i, j) of log(1 + exp(S_ij + bias)), as a tensor ().

        Args:
            bias: () added to every logit.
        """
        total = self.scale.new_zeros((), dtype=torch.float64)
        for slab in self._slabs(self.given):
            sums = self.scale.new_empty(slab.row_blocks * slab.column_blocks)
            slab.launch(kernels.softplus_sums, len(sums), bias_at=bias.float(), sums_out=sums)
            total += sums.sum(dtype=torch.float64)
        return total.float()

    def sigmoid_gradients(self, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """G y (n, D), G^T x (m, D) and the sum of G, with G_ij = 1 / (1 + exp(-S_ij - bias))."""
        total = self.scale.new_zeros((), dtype=torch.float64)

        def weigh(slab: "_Slab", weights: Tensor) -> None:
            sums = self.scale.new_empty(slab.row_blocks * slab.column_blocks)
            slab.launch(
                kernels.pair_weights,
                len(sums),
                bias_at=bias.float(),
                row_lse=None,
                column_lse=None,
                row_weights=None,
                column_weights=None,
                weights_out=weights,
                sums_out=sums,
                SIGMOID=True,
                SAFE=SAFE,
            )
            total.add_(sums.sum(dtype=torch.float64))

        return *self._gradients(weigh), total.float()

    def _gradients(self, weigh: Callable[["_Slab", Tensor], None]) -> tuple[Tensor, Tensor]:
        """G y and G^T x; `weigh` writes G of a slab into its second argument."""
        grads: tuple[Tensor, ...] = ()
        for slab in self._slabs(scratch=True):
            weigh(slab, slab.scratch)
            of_x = _product(slab.scratch, self.y[slab.columns])
            of_y = _product(slab.scratch.t(), self.x[slab.rows])
            if slab.n == len(self.x) and slab.m == len(self.y):
                return of_x, of_y
            grads = grads or self._zeros()
            grads[0][slab.rows].add_(of_x)
            grads[1][slab.columns].add_(of_y)
        return grads or self._zeros()

    def _zeros(self) -> tuple[Tensor, Tensor]:
        x, y = (torch.zeros_like(side, dtype=torch.float32) for side in (self.x, self.y))
        return x, y

    def _slabs(self, scratch: bool) -> Iterator["_Slab"]:
        """Parts of S of at most SLAB rows; with a scratch, of as many columns as fit it."""
        n, m = len(self.x), len(self.y)
        if n == 0 or m == 0:
            return
        height, width, memory = min(n, SLAB), m, None
        if scratch:
            # Rows of the scratch begin at multiples of 16 bytes, which fast products need.
            width = min(triton.cdiv(m, 8) * 8, SCRATCH // self.x.element_size() // height // 8 * 8)
            memory = self.x.new_empty((height, width))
        for i in range(0, n, height):
            for j in range(0, m, width):
                rows, columns = slice(i, min(i + height, n)), slice(j, min(j + width, m))
                shape = rows.stop - rows.start, columns.stop - columns.start
                part = None if memory is None else memory[: shape[0], : shape[1]]
                slab = _Slab(self, rows, columns, *shape, part)
                if self.given:
                    torch.mm(self.x[rows], self.y[columns].t(), out=part)
                yield slab


@dataclass
class _Slab:
    """The rows and columns of S that one launch takes; n, m their numbers, scratch (n, m)."""

    tiles: KernelTiles
    rows: slice
    columns: slice
    n: int
    m: int
    scratch: Tensor | None

    def __post_init__(self):
        self.blocks = LARGE[self.tiles.x.dtype]
        if triton.cdiv(self.n, self.blocks[0]) * triton.cdiv(self.m, self.blocks[1]) < FILLED:
            self.blocks = SMALL[self.tiles.x.dtype]
        if self.tiles.given:
            self.blocks = GIVEN
        self.row_blocks = triton.cdiv(self.n, self.blocks[0])
        self.column_blocks = triton.cdiv(self.m, self.blocks[1])

    def launch(self, kernel: triton.JITFunction, programs: int, **arguments) -> None:
        """Start `programs` programs of the kernel, with what all kernels take and `arguments`."""
        tiles = self.tiles
        block_n, block_m, block_d, warps, stages = self.blocks
        row_ids, column_ids = tiles.excluded or (None, None)
        with torch.cuda.device_of(tiles.x):
            kernel[(programs,)](
                x=tiles.x[self.rows],
                y=tiles.y[self.columns],
                given=self.scratch if tiles.given else None,
                scale_at=tiles.scale,
                row_ids=None if row_ids is None else row_ids[self.rows],
                column_ids=None if column_ids is None else column_ids[self.columns],
                n=self.n,
                m=self.m,
                D=tiles.x.shape[1],
                stride=0 if self.scratch is None else self.scratch.stride(0),
                EVEN=tiles.x.shape[1] % block_d == 0,
                WIDEN=not tiles.x.is_cuda,
                BLOCK_N=block_n,
                BLOCK_M=block_m,
                BLOCK_D=block_d,
                num_warps=warps,
                num_stages=stages,
                **arguments,
            )


def _combine(parts: Tensor, totals: Tensor, first: bool) -> None:
    """totals (k,) becomes the logsumexp of parts (count, k) over the parts, and of itself unless
    these are the first."""
    with torch.cuda.device_of(parts):
        grid = (triton.cdiv(len(totals), 128),)
        kernels.combine[grid](
            parts, totals, *parts.shape, FIRST=first, PARTS=32, BLOCK=128, num_warps=4
        )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32; a CPU has no such product of bfloat16, so its inputs are widened."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _tf32_is_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
