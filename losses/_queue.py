"""Features of earlier steps: a ring in buffers that is equal on all ranks.

It holds the rows of the global batch. A queue of local rows would differ between ranks, of which a
checkpoint keeps one, so that a continued run would be another. Position and filling are computed in
tensors: nothing waits for the device, and the checkpoint holds all there is.
"""

import math

import torch
from torch import Tensor, nn

TILE = 4096  # rows that a search looks at together


class Queue(nn.Module):
    """First in, first out; starts empty.

    A method keeps the rows of a step in `loss` and writes them in `step_end`, so that the loss of a
    step sees earlier steps only.

    Args:
        size: how many rows it holds. width: D, of a row.

    Attributes:
        rows: (size, D) float32; those that were never written are 0 and to be left out.
        written: (1,) int64, how many rows were written so far.
    """

    def __init__(self, size: int, width: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, width))
        self.register_buffer("written", torch.zeros(1, dtype=torch.int64))
        self.kept: Tensor | None = None

    def filled(self) -> Tensor:
        """(size,) bool: which rows hold features."""
        return torch.arange(len(self.rows), device=self.rows.device) < self.written

    @torch.no_grad()
    def nearest(self, queries: Tensor) -> Tensor:
        """The row whose product with each query is largest; of unit length the nearest one.

        By tiles, so that no matrix of all products exists.

        Args:
            queries: (b, D), compared in the type of the rows.

        Returns:
            (b, D) of the rows that hold features; zeros while none does.
        """
        queries, filled = queries.to(self.rows.dtype), self.filled()
        best = torch.full_like(queries[:, 0], -math.inf)
        place = torch.zeros_like(best, dtype=torch.int64)
        for first in range(0, len(self.rows), TILE):
            tile = slice(first, first + TILE)
            products = (queries @ self.rows[tile].T).masked_fill(~filled[tile], -math.inf)
            value, index = products.max(1)
            place = torch.where(value > best, first + index, place)
            best = torch.maximum(value, best)
        return self.rows[place]

    def keep(self, rows: Tensor) -> None:
        """Remember the rows of this step, (B, D) of the **global** batch, until `write`."""
        self.kept = rows.detach()

    @torch.no_grad()
    def write(self) -> None:
        """Put the kept rows in, in place of the oldest ones.

        Raises:
            RuntimeError: none were kept since the last call.
        """
        if self.kept is None:
            raise RuntimeError("a step wrote its queue before its loss kept rows for it")
        size, count = len(self.rows), len(self.kept)
        newest = self.kept[-size:]  # of more rows than it holds
        first = self.written + count - len(newest)
        place = (first + torch.arange(len(newest), device=self.rows.device)) % size
        self.rows.index_copy_(0, place, newest.to(self.rows.dtype))
        self.written += count
        self.kept = None
