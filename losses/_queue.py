"""Features of earlier steps: a ring in buffers that is equal on all ranks.

It holds the rows of the global batch. A queue of local rows would differ between ranks, of which a
checkpoint keeps one, so that a continued run would be another. Position and filling are computed in
tensors: nothing waits for the device, and the checkpoint holds all there is.
"""

import torch
from torch import Tensor, nn


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
