"""Features of earlier steps: a ring in buffers that is equal on all ranks.

It holds the rows of the global batch. A queue of local rows would differ between ranks, of which a
checkpoint keeps one, so that a continued run would be another. Position and filling are computed in
tensors: nothing waits for the device, and the checkpoint holds all there is.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

QUERIES, TILE = 1024, 4096  # how many a search compares with how many rows at a time
GROUP = 64  # of numbers in a row of which `largest` looks at one place at a time


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
        some = queries.to(self.rows.dtype).split(QUERIES)
        return self.rows[torch.cat([self._places(each) for each in some])]

    def _places(self, queries: Tensor) -> Tensor:
        """(b,) int64: where the nearest row of each of a few queries (b, D) lies."""
        # Added to the products of each row: nothing, or what no product is larger than.
        empty = torch.zeros_like(self.rows[:, 0]).masked_fill_(~self.filled(), -math.inf)
        best = torch.full_like(queries[:, 0], -math.inf)
        place = torch.zeros_like(best, dtype=torch.int64)
        for first in range(0, len(self.rows), TILE):
            tile = slice(first, first + TILE)
            value, index = largest(torch.addmm(empty[tile], queries, self.rows[tile].T))
            place = torch.where(value > best, first + index, place)
            best = torch.maximum(value, best)
        return place

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


def largest(products: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number of each row, and where it is: `products.max(1)`.

    In two steps, because a maximum alone is found ten times as fast on a CPU as its place: the
    largest number at each place of a group, over all groups, then which group it came from.

    Args:
        products: (b, n), n > 0.

    Returns:
        Values (b,) and places (b,) int64; the place may lie outside where all numbers are -inf.
    """
    short = -products.shape[1] % GROUP
    groups = F.pad(products, (0, short), value=-math.inf) if short else products
    groups = groups.unflatten(1, (-1, GROUP))
    value, column = groups.amax(1).max(1)
    chosen = column[:, None, None].expand(-1, groups.shape[1], 1)
    row = groups.gather(2, chosen).squeeze(2).argmax(1)
    return value, row * GROUP + column
