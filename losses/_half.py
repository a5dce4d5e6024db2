"""Tiles whose matrix products take bfloat16: the GPU's form of `losses._tiles`.

The products go to cuBLAS with float32 sums and results; what is done to each element of a tile is
one pass before each reduction or product, compiled on a GPU. No tile is kept, because computing it
again costs about what reading it costs, and no maximum is brought to the host, which would stop
the queue at every tile.
"""

import math
from functools import cache

import torch
from torch import Tensor

from losses._tiles import Tiles


class HalfTiles(Tiles):
    """As `Tiles`; sums, normalisers and gradients are float32, products of bfloat16 inputs."""

    def __init__(self, x: Tensor, y: Tensor, scale: Tensor, tile: tuple[int, int]):
        super().__init__(x, y, scale, tile, keep=0)
        self.x_half, self.y_half = x.bfloat16(), y.bfloat16()

    def forward(self) -> tuple[Tensor, Tensor]:
        """logsumexp of the block's logits over its columns (n,) and over its rows (m,)."""
        row_lse = self.x.new_full((len(self.x),), -math.inf)
        column_lse = self.x.new_full((len(self.y),), -math.inf)
        normalisers = _pass(_normalisers, self.x.is_cuda)
        for rows, columns in self._grid():
            cosines = _product(self.x_half[rows], self.y_half[columns].t())
            over_columns, over_rows = normalisers(cosines, self.scale, self.shift)
            row_lse[rows] = torch.logaddexp(row_lse[rows], over_columns)
            column_lse[columns] = torch.logaddexp(column_lse[columns], over_rows)
        return row_lse, column_lse

    def backward(self, row_lse: Tensor, column_lse: Tensor) -> tuple[Tensor, Tensor]:
        """G y (n, D) and G^T x (m, D) with G_ij = exp(S_ij - r_i) + exp(S_ij - c_j)."""
        grad_x, grad_y = torch.zeros_like(self.x), torch.zeros_like(self.y)
        weights_of = _pass(_weights, self.x.is_cuda)
        for rows, columns in self._grid():
            cosines = _product(self.x_half[rows], self.y_half[columns].t())
            weights = weights_of(cosines, self.scale, row_lse[rows], column_lse[columns])
            grad_x[rows] += _product(weights, self.y_half[columns])
            grad_y[columns] += _product(weights.t(), self.x_half[rows])
        return grad_x, grad_y


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 from bfloat16 inputs. On a CPU, where torch has no such product, the inputs
    are widened first, which gives the same numbers."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _normalisers(cosines: Tensor, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """logsumexp of the scaled tile over columns and over rows; `shift`: see `Tiles`."""
    logits = cosines * scale
    if shift is None:
        return logits.logsumexp(1), logits.logsumexp(0)
    shifted = (logits - shift).exp()
    return shift + shifted.sum(1).log(), shift + shifted.sum(0).log()


def _weights(cosines: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor) -> Tensor:
    """G of a tile, in bfloat16."""
    logits = cosines * scale
    return ((logits - row_lse[:, None]).exp() + (logits - column_lse[None]).exp()).bfloat16()


@cache
def _pass(function, compiled: bool):
    """The function as it is, or fused by torch.compile."""
    return torch.compile(function) if compiled else function
