"""One block of the logits of the contrastive core, tile by tile: see `losses._core`.

`Tiles` is the form for a CPU, and the contract of every other form: the same constructor arguments
x, y, scale and excluded, the same four methods. Results have the type of x, or float32 where x has
16 bits.

Letters: n rows (images), m columns (texts), D embedding size, S = scale * x y^T the logits.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows and columns of a tile: the best on a CPU (measured).
TILE = (2048, 1024)
# One exponential serves rows and columns of a tile while no maximum lies further than this
# below the tile's own: exp(-60) is far from float32 underflow, exp(60) far from overflow.
SAFE_SPREAD = 60.0
# Above it softplus(a) is a to the last bit of float64.
LINEAR = 50.0

Ids = tuple[Tensor, Tensor]


class Tiles:
    """Walks the tiles of S and holds the kept ones between the two passes.

    Args:
        x, y: (n, D), (m, D) of one type; n or m may be 0.
        scale: () multiplier of the products.
        excluded: ids of the rows (n,) and of the columns (m,), int64: the pair (i, j) is left out
            of every sum where they are equal; a negative id excludes nothing.
        tile: rows and columns of one tile; the result does not depend on it.
        keep: bytes for tiles kept between the passes; the result does not depend on it.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        excluded: Ids | None = None,
        tile: tuple[int, int] = TILE,
        keep: int = 0,
    ):
        self.x, self.y, self.scale = x, y, scale
        self.excluded = None
        if excluded is not None:  # negative ids of the two sides made unlike each other
            rows, columns = excluded
            self.excluded = rows.masked_fill(rows < 0, -1), columns.masked_fill(columns < 0, -2)
        self.tile, self.keep_bytes = tile, keep
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
        # |S_ij| <= bound by Cauchy-Schwarz. If twice that is safe, one fixed shift serves all
        # tiles and no maximum has to be searched for.
        bound = 0.0
        if len(x) and len(y):
            norm = torch.linalg.vector_norm
            bound = float(scale.abs() * norm(x, dim=1).max() * norm(y, dim=1).max())
        safe = math.isfinite(bound) and 2 * bound < SAFE_SPREAD
        self.shift = x.new_tensor(bound) if safe else None

    def forward(self) -> tuple[Tensor, Tensor]:
        """logsumexp of S over its columns, r (n,), and over its rows, c (m,).

        It is -inf for a row or column of which every pair is excluded.
        """
        row_lse = self.x.new_full((len(self.x),), -math.inf)
        column_lse = self.x.new_full((len(self.y),), -math.inf)
        budget = self.keep_bytes
        for rows, columns in self._grid():
            tile, shift = self._exponentials(rows, columns)
            if shift is None:
                over_columns, over_rows = tile.logsumexp(1), tile.logsumexp(0)
            else:
                over_columns, over_rows = shift + tile.sum(1).log(), shift + tile.sum(0).log()
            row_lse[rows] = torch.logaddexp(row_lse[rows], over_columns)
            column_lse[columns] = torch.logaddexp(column_lse[columns], over_rows)
            budget -= tile.nbytes
            if budget >= 0:
                self.kept[rows.start, columns.start] = tile, shift
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
        row_lse, row_weights = _without_empty(row_lse, row_weights)
        column_lse, column_weights = _without_empty(column_lse, column_weights)
        grad_x, grad_y = torch.zeros_like(self.x), torch.zeros_like(self.y)
        for rows, columns in self._grid():
            kept = self.kept.pop((rows.start, columns.start), None)
            tile, shift = kept or self._exponentials(rows, columns)
            r, g = row_lse[rows, None], row_weights[rows, None]
            c, h = column_lse[None, columns], column_weights[None, columns]
            if shift is None:
                weights = (tile - r).exp_().mul_(g).addcmul_(tile.sub_(c).exp_(), h)
            else:
                weights = torch.add((shift - r).exp_().mul_(g), (shift - c).exp_().mul_(h))
                weights.mul_(tile)
            self._add_products(weights, rows, columns, grad_x, grad_y)
        return grad_x, grad_y

    def softplus_sum(self, bias: Tensor) -> Tensor:
        """The sum over all pairs (i, j) of log(1 + exp(S_ij + bias)), as a tensor ().

        Args:
            bias: () added to every logit.
        """
        total, budget = self.x.new_zeros(()), self.keep_bytes
        for rows, columns in self._grid():
            tile = self._logits(rows, columns).add_(bias)
            total += F.softplus(tile, threshold=LINEAR).sum()
            budget -= tile.nbytes
            if budget >= 0:
                self.kept[rows.start, columns.start] = tile, None
        return total

    def sigmoid_gradients(self, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """G y (n, D), G^T x (m, D) and the sum of G, with G_ij = 1 / (1 + exp(-S_ij - bias))."""
        grad_x, grad_y = torch.zeros_like(self.x), torch.zeros_like(self.y)
        total = self.x.new_zeros(())
        for rows, columns in self._grid():
            tile, _ = self.kept.pop((rows.start, columns.start), (None, None))
            if tile is None:
                tile = self._logits(rows, columns).add_(bias)
            weights = tile.sigmoid_()
            total += weights.sum()
            self._add_products(weights, rows, columns, grad_x, grad_y)
        return grad_x, grad_y, total

    def _grid(self) -> Iterator[tuple[slice, slice]]:
        height, width = self.tile
        for i in range(0, len(self.x), height):
            for j in range(0, len(self.y), width):
                yield slice(i, i + height), slice(j, j + width)

    def _logits(self, rows: slice, columns: slice) -> Tensor:
        """S of one tile, -inf where a pair is excluded."""
        logits = torch.mm(self.x[rows] * self.scale, self.y[columns].t())
        if self.excluded is not None:
            row_ids, column_ids = self.excluded
            logits.masked_fill_(row_ids[rows, None] == column_ids[None, columns], -math.inf)
        return logits

    def _exponentials(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """(exp(S - s), s) for one tile, or (S, None) where no single shift s is safe."""
        logits = self._logits(rows, columns)
        shift = self.shift
        if shift is None:
            lowest = torch.minimum(logits.amax(1).min(), logits.amax(0).min())
            highest = logits.amax()
            # False for NaN and for -inf as well; NaN then reaches the loss and is seen there.
            if bool(highest - lowest < SAFE_SPREAD):
                shift = highest
        return (logits, None) if shift is None else (logits.sub_(shift).exp_(), shift)

    def _add_products(
        self, weights: Tensor, rows: slice, columns: slice, grad_x: Tensor, grad_y: Tensor
    ) -> None:
        grad_x[rows].addmm_(weights, self.y[columns])
        grad_y[columns].addmm_(weights.t(), self.x[rows])


def _without_empty(lse: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Normalisers and weights such that exp(S - lse) is 0, and never NaN, where lse is -inf."""
    empty = lse == -math.inf
    return lse.masked_fill(empty, math.inf), weights.masked_fill(empty, 0)
