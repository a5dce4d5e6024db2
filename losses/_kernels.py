"""One block of the logits on a GPU: the form of `losses._tiles` with Triton kernels.

One unit is the product x y^T: 2 n m D operations. The vendor's library makes all products, at three
times the speed of a product inside a Triton kernel (measured on an H200: 790 against 230 to 270
TFLOP/s at D 512); the kernels do everything else of a slab of S in one pass over it.

* Normalisers: 1 unit, both from one walk. A program keeps the running sums of its rows while it
  walks over column blocks; it writes one logsumexp per row and walk, and one per column and row
  block, which a second kernel joins: 4 bytes x 64 row blocks x m columns, 16 MiB at m = 65,536 and
  256 MiB at 2^20.
* Gradients: 3 units. S again, a kernel that makes G of it in the type of x, then G y and G^T x.

Memory beside x and y: a slab of S in float32 and of G, at most SCRATCH bytes together, the float32
gradients, and one product of at most SLAB rows (or columns) before it is added to them. Nothing has
the size n m unless that is below the scratch.

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

SCRATCH = 192 * 2**20
SLAB = 8192  # rows of a slab
# Rows and columns of one step of a kernel, and warps.
SUMS = (128, 64, 8)
WEIGHTS = (32, 128, 4)
# Walks of the normalisers grow so that there are this many: some eight for every multiprocessor.
WALKS = 1024
# How far the normalisers of a block may lie below their bound, see `_softmax_weights`.
SAFE = 40.0


class KernelTiles:
    """As `losses._tiles.Tiles`; sums, normalisers and gradients are float32.

    Args:
        x, y: (n, D), (m, D) on one GPU, both bfloat16 or both float32; n or m may be 0. Products
            take inputs of this type (G is rounded to it before its products with x and y); float32
            ones are TF32 where torch allows that.
        scale: () multiplier of the products, on the same device.
        excluded: ids of the rows (n,) and of the columns (m,), int64: the pair (i, j) is left out
            of every sum where they are equal; a negative id excludes nothing.

    Raises:
        TypeError: x and y are neither both bfloat16 nor both float32.
    """

    def __init__(self, x: Tensor, y: Tensor, scale: Tensor, excluded: Ids | None = None):
        if x.dtype != y.dtype or x.dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(f"x and y must both be bfloat16 or float32, not {x.dtype}, {y.dtype}")
        self.x, self.y, self.scale = x.contiguous(), y.contiguous(), scale.float()
        self.excluded = None if excluded is None else tuple(ids.contiguous() for ids in excluded)

    def forward(self) -> tuple[Tensor, Tensor]:
        """logsumexp of S over its columns, r (n,), and over its rows, c (m,).

        It is -inf for a row or column of which every pair is excluded.
        """
        row_lse, column_lse = (
            self.scale.new_full((len(side),), -torch.inf) for side in (self.x, self.y)
        )
        row_parts, column_parts = [], self.scale.new_empty(0)
        for slab in self._slabs(weights=False):
            row_blocks, column_blocks = slab.blocks(SUMS)
            if slab.columns.start == 0:
                row_parts, column_parts = [], self.scale.new_empty((row_blocks, len(self.y)))
            walk = max(1, row_blocks * column_blocks // WALKS)
            row_parts.append(self.scale.new_empty((triton.cdiv(column_blocks, walk), slab.n)))
            slab.launch(
                kernels.logsumexps,
                row_blocks * len(row_parts[-1]),
                SUMS,
                row_parts=row_parts[-1],
                column_parts=column_parts[:, slab.columns],
                parts_stride=len(self.y),
                walk=walk,
                SPREAD=SAFE_SPREAD,
            )
            if slab.columns.stop == len(self.y):
                parts = row_parts[0] if len(row_parts) == 1 else torch.cat(row_parts)
                _combine(parts, row_lse[slab.rows], first=True)
                _combine(column_parts, column_lse, first=slab.rows.start == 0)
        return row_lse, column_lse

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

        def weigh(slab: "_Slab") -> None:
            slab.launch(
                kernels.pair_weights,
                slab.programs(WEIGHTS),
                WEIGHTS,
                bias_at=None,
                row_lse=r[slab.rows],
                column_lse=c[slab.columns],
                row_weights=g[slab.rows],
                column_weights=h[slab.columns],
                weights_out=slab.weights,
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
        for slab in self._slabs(weights=False):
            sums = self.scale.new_empty(slab.programs(WEIGHTS))
            slab.launch(
                kernels.softplus_sums, len(sums), WEIGHTS, bias_at=bias.float(), sums_out=sums
            )
            total += sums.sum(dtype=torch.float64)
        return total.float()

    def sigmoid_gradients(self, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """G y (n, D), G^T x (m, D) and the sum of G, with G_ij = 1 / (1 + exp(-S_ij - bias))."""
        total = self.scale.new_zeros((), dtype=torch.float64)

        def weigh(slab: "_Slab") -> None:
            sums = self.scale.new_empty(slab.programs(WEIGHTS))
            slab.launch(
                kernels.pair_weights,
                len(sums),
                WEIGHTS,
                bias_at=bias.float(),
                row_lse=None,
                column_lse=None,
                row_weights=None,
                column_weights=None,
                weights_out=slab.weights,
                sums_out=sums,
                SIGMOID=True,
                SAFE=SAFE,
            )
            total.add_(sums.sum(dtype=torch.float64))

        return *self._gradients(weigh), total.float()

    def _gradients(self, weigh: Callable[["_Slab"], None]) -> tuple[Tensor, Tensor]:
        """G y and G^T x; `weigh` writes G of a slab into its `weights`."""
        grads: tuple[Tensor, ...] = ()
        for slab in self._slabs(weights=True):
            weigh(slab)
            of_x = _product(slab.weights, self.y[slab.columns])
            of_y = _product(slab.weights.t(), self.x[slab.rows])
            if slab.n == len(self.x) and slab.m == len(self.y):
                return of_x, of_y
            grads = grads or self._zeros()
            grads[0][slab.rows].add_(of_x)
            grads[1][slab.columns].add_(of_y)
        return grads or self._zeros()

    def _zeros(self) -> tuple[Tensor, Tensor]:
        x, y = (torch.zeros_like(side, dtype=torch.float32) for side in (self.x, self.y))
        return x, y

    def _slabs(self, weights: bool) -> Iterator["_Slab"]:
        """Parts of S of at most SLAB rows and as many columns as fit the scratch; all columns of
        the first rows come first.

        Args:
            weights: there is to be room for G as well.
        """
        n, m = len(self.x), len(self.y)
        if n == 0 or m == 0:
            return
        own = weights and self.x.dtype != torch.float32  # else G takes the place of S
        pair = 4 + (self.x.element_size() if own else 0)
        height = min(n, SLAB)
        # Rows begin at multiples of 16 bytes, which fast products need.
        width = min(triton.cdiv(m, 8) * 8, SCRATCH // pair // height // 8 * 8)
        products = self.scale.new_empty((height, width))
        made = self.x.new_empty((height, width)) if own else products
        for i in range(0, n, height):
            for j in range(0, m, width):
                rows, columns = slice(i, min(i + height, n)), slice(j, min(j + width, m))
                part = slice(rows.stop - i), slice(columns.stop - j)
                _product(self.x[rows], self.y[columns].t(), products[part])
                yield _Slab(self, rows, columns, products[part], made[part] if weights else None)


@dataclass
class _Slab:
    """A part of S: its rows and columns, products x y^T (n, m), and room for G (n, m)."""

    tiles: KernelTiles
    rows: slice
    columns: slice
    products: Tensor
    weights: Tensor | None

    def __post_init__(self):
        self.n, self.m = self.products.shape

    def blocks(self, shape: tuple[int, int, int]) -> tuple[int, int]:
        """How many steps of so many rows and columns it takes."""
        return triton.cdiv(self.n, shape[0]), triton.cdiv(self.m, shape[1])

    def programs(self, shape: tuple[int, int, int]) -> int:
        """One for each step."""
        row_blocks, column_blocks = self.blocks(shape)
        return row_blocks * column_blocks

    def launch(
        self,
        kernel: triton.JITFunction,
        programs: int,
        shape: tuple[int, int, int],
        **arguments,
    ) -> None:
        """Start `programs` programs of the kernel, with what all kernels take and `arguments`."""
        row_ids, column_ids = self.tiles.excluded or (None, None)
        with torch.cuda.device_of(self.products):
            kernel[(programs,)](
                products_at=self.products,
                scale_at=self.tiles.scale,
                row_ids=None if row_ids is None else row_ids[self.rows],
                column_ids=None if column_ids is None else column_ids[self.columns],
                n=self.n,
                m=self.m,
                stride=self.products.stride(0),
                BLOCK_N=shape[0],
                BLOCK_M=shape[1],
                num_warps=shape[2],
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


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b in float32; a CPU has no such product of bfloat16, so its inputs are widened."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if not a.is_cuda:
        return torch.mm(a.float(), b.float(), out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)
