"""What a loss needs of the other ranks: one gather with gradient, used by every method.

The convention, fixed here once: each rank computes the gradient of the **global** loss with
respect to its local features and multiplies it by the number of ranks; the engine then
*averages* parameter gradients over ranks, which gives the single-process gradient exactly.
The multiplication needs no code in a method: a gather whose backward pass sums over ranks,
together with a loss that is a mean over local rows, has it built in.
"""

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these collectives; 2.11 has the old names only.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Gather:
    """Collectives of one process group; the identity when there is one process.

    Args:
        group: a `torch.distributed` process group. None means the default group when one is
            initialised, otherwise a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        distributed = dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size(group) if distributed else 1
        self.rank = dist.get_rank(group) if distributed else 0

    def sizes(self, rows: int, device: torch.device) -> list[int]:
        """Number of local rows of every rank, in rank order."""
        if self.world_size == 1:
            return [rows]
        counts = torch.empty(self.world_size, dtype=torch.int64, device=device)
        _all_gather_single(counts, torch.tensor([rows], device=device), group=self.group)
        return counts.tolist()

    def rows(self, local: Tensor, sizes: list[int] | None = None) -> Tensor:
        """Concatenate the rows of all ranks, in rank order, with gradient.

        Args:
            local: (b, ...) rows of this rank; b may differ between ranks.
            sizes: what `sizes(b)` returned, if known already.

        Returns:
            (B, ...) with B the sum of all b. The backward pass sums over ranks the gradient
            that each of them holds for this rank's rows.
        """
        if self.world_size == 1:
            return local
        sizes = sizes or self.sizes(local.shape[0], local.device)
        return _GatherRows.apply(local, self, sizes)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place, without gradient."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Maximum over ranks, in place, without gradient."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor


class _GatherRows(torch.autograd.Function):
    """All-gather of rows; its backward is the reduce-scatter (sum) of the gradient."""

    @staticmethod
    def forward(ctx, local: Tensor, gather: Gather, sizes: list[int]) -> Tensor:
        ctx.gather, ctx.sizes = gather, sizes
        longest = max(sizes)
        padded = _pad_rows(local.contiguous(), longest)
        out = padded.new_empty((longest * gather.world_size, *padded.shape[1:]))
        _all_gather_single(out, padded, group=gather.group)
        if all(size == longest for size in sizes):
            return out
        return torch.cat([block[:n] for block, n in zip(out.split(longest), sizes, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        gather, sizes = ctx.gather, ctx.sizes
        longest = max(sizes)
        if any(size != longest for size in sizes):
            gradient = torch.cat([_pad_rows(part, longest) for part in gradient.split(sizes)])
        out = gradient.new_empty((longest, *gradient.shape[1:]))
        _reduce_scatter_single(out, gradient.contiguous(), group=gather.group)
        return out[: sizes[gather.rank]], None, None


def _pad_rows(tensor: Tensor, rows: int) -> Tensor:
    if tensor.shape[0] == rows:
        return tensor
    padding = tensor.new_zeros((rows - tensor.shape[0], *tensor.shape[1:]))
    return torch.cat([tensor, padding])
