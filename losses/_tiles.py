"""One block of the logits of the contrastive core, tile by tile: see `losses._core`."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# One exponential serves rows and columns of a tile while no maximum lies further than this
# below the tile's own: exp(-60) is far from float32 underflow, exp(60) far from overflow.
SAFE_SPREAD = 60.0


class Tiles:
    """Walks the tiles of S = scale * x y^T and holds the kept ones between the two passes."""

    def __init__(self, x: Tensor, y: Tensor, scale: Tensor, tile: tuple[int, int], keep: int):
        self.x, self.y, self.scale = x, y, scale
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

    def _grid(self) -> Iterator[tuple[slice, slice]]:
        height, width = self.tile
        for i in range(0, len(self.x), height):
            for j in range(0, len(self.y), width):
                yield slice(i, i + height), slice(j, j + width)

    def _compute(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """(exp(S - m), m) for one tile, or (S, None) where no single shift m is safe."""
        logits = torch.mm(self.x[rows] * self.scale, self.y[columns].t())
        shift = self.shift
        if shift is None:
            lowest = torch.minimum(logits.amax(1).min(), logits.amax(0).min())
            highest = logits.amax()
            # False for NaN as well, which then reaches the loss and is seen there.
            if bool(highest - lowest < SAFE_SPREAD):
                shift = highest
        return (logits, None) if shift is None else (logits.sub_(shift).exp_(), shift)

    def forward(self) -> tuple[Tensor, Tensor]:
        """logsumexp of the block's logits over its columns (n,) and over its rows (m,)."""
        row_lse = self.x.new_full((len(self.x),), -math.inf)
        column_lse = self.x.new_full((len(self.y),), -math.inf)
        budget = self.keep_bytes
        for rows, columns in self._grid():
            tile, shift = self._compute(rows, columns)
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

    def backward(self, row_lse: Tensor, column_lse: Tensor) -> tuple[Tensor, Tensor]:
        """G y (n, D) and G^T x (m, D) with G_ij = exp(S_ij - r_i) + exp(S_ij - c_j)."""
        grad_x, grad_y = torch.zeros_like(self.x), torch.zeros_like(self.y)
        for rows, columns in self._grid():
            kept = self.kept.pop((rows.start, columns.start), None)
            tile, shift = kept or self._compute(rows, columns)
            r, c = row_lse[rows, None], column_lse[None, columns]
            if shift is None:
                weights = (tile - r).exp_().add_((tile - c).exp_())
            else:
                weights = torch.add((shift - r).exp_(), (shift - c).exp_()).mul_(tile)
            grad_x[rows].addmm_(weights, self.y[columns])
            grad_y[columns].addmm_(weights.t(), self.x[rows])
        return grad_x, grad_y
