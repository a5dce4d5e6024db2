"""What a loss needs of the other ranks: one gather with gradient, used by every method.

The ranks also form a grid of p rows and q columns, p q = R, that the contrastive core uses: the
images of a grid row and the texts of a grid column meet on the rank where the two cross, so that
each rank computes one block of the logits. With b local rows, gathering both sides moves
(p + q - 2) b rows per rank, and their gradients as many; p and q are chosen to make that
smallest. q = 1 is the one-sided form, in which only texts move: 2 ranks, and any prime number.

The convention, fixed here once: each rank computes the gradient of the **global** loss with
respect to its local features and multiplies it by the number of ranks; the engine then
*averages* parameter gradients over ranks, which gives the single-process gradient exactly.
The multiplication needs no code in a method: a gather whose backward pass sums over ranks,
together with a loss that is a mean over local rows, has it built in. So has `Ranks.total`.
"""

import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these collectives; 2.11 has the old names only.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Ranks:
    """Collectives of some of the ranks that share a batch; the identity for a single one.

    Args:
        group: their `torch.distributed` process group; not used for a single rank.
        members: their numbers among all ranks that share the batch, in the order of the group.
        rank: position of this process in `members`.
    """

    def __init__(self, group: dist.ProcessGroup | None, members: Sequence[int], rank: int):
        self.group, self.members, self.rank = group, members, rank
        self.world_size = len(members)
        self.equal_rows = False

    def sizes(self, rows: int, device: torch.device) -> list[int]:
        """Number of local rows of every rank, in rank order. The only wait for the device here,
        and none where all ranks are known to have equally many."""
        if self.world_size == 1 or self.equal_rows:
            return [rows] * self.world_size
        counts = torch.empty(self.world_size, dtype=torch.int64, device=device)
        own = torch.full((1,), rows, dtype=torch.int64, device=device)
        _all_gather_single(counts, own, group=self.group)
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

    def own_rows(self, gradient: Tensor, sizes: list[int]) -> Tensor:
        """The reverse of `rows`, without gradient: the sum over ranks of what each of them holds
        for the rows of all.

        Args:
            gradient: (B, ...), in the order of `rows`. sizes: as there.

        Returns:
            (b, ...), the sums for the rows of this rank.
        """
        if self.world_size == 1:
            return gradient
        longest = max(sizes)
        if any(size != longest for size in sizes):
            gradient = torch.cat([_pad_rows(part, longest) for part in gradient.split(sizes)])
        out = gradient.new_empty((longest, *gradient.shape[1:]))
        _reduce_scatter_single(out, gradient.contiguous(), group=self.group)
        return out[: sizes[self.rank]]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place, without gradient."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group)
        return tensor

    def total(self, share: Tensor) -> Tensor:
        """Sum over ranks with gradient, equal on every rank.

        Args:
            share: tensor of any shape, the same on all ranks, as is the gradient of the sum; what
                this rank contributes gets that gradient times the number of ranks (the convention
                above).
        """
        return share if self.world_size == 1 else _Total.apply(share, self)

    def mean(self, each: Tensor) -> Tensor:
        """Mean over the samples of all ranks with gradient, equal on every rank; 0 of none.

        Args:
            each: (b,) of the samples of this rank; b may differ between ranks.
        """
        count = sum(self.sizes(len(each), each.device))
        return self.total(each.sum()) / max(count, 1)

    def max_(self, tensor: Tensor) -> Tensor:
        """Maximum over ranks, in place, without gradient."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor


class Gather(Ranks):
    """All ranks that share a batch, and the rank grid they form.

    Construction is collective: every rank of the group takes part.

    Args:
        group: a `torch.distributed` process group. None means the default group when one is
            initialised, otherwise a single process.
        equal_rows: all ranks always have equally many local rows, as the engine's have. They then
            need not ask each other, for which the host would wait.

    Attributes:
        row: the q ranks of this rank's grid row; they gather images.
        column: the p ranks of its grid column; they gather texts.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, equal_rows: bool = False):
        distributed = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size(group) if distributed else 1
        rank = dist.get_rank(group) if distributed else 0
        super().__init__(group, range(world_size), rank)
        self.equal_rows = equal_rows
        _, columns = grid_shape(world_size)
        # Making process groups takes every process of the job, and the members of a part of
        # them cannot ask the others: they use the one-sided form, which needs no more groups.
        if columns == 1 or group not in (None, dist.group.WORLD):
            self.row, self.column = Ranks(None, [rank], 0), self
        else:
            self.row, self.column = _grid(rank, world_size, columns)


def grid_shape(world_size: int) -> tuple[int, int]:
    """(p, q) with p q = world_size and the smallest p + q; p >= q."""
    q = max(n for n in range(1, math.isqrt(world_size) + 1) if world_size % n == 0)
    return world_size // q, q


# By default group, because a loss function that is given a group makes a Gather in every call.
_grids: WeakKeyDictionary[dist.ProcessGroup, tuple[Ranks, Ranks]] = WeakKeyDictionary()


def _grid(rank: int, world_size: int, columns: int) -> tuple[Ranks, Ranks]:
    """Grid row and grid column of this rank; makes the process groups of all of them once.

    A grid row holds consecutive ranks, which usually share a node.
    """
    if dist.group.WORLD not in _grids:
        order = range(world_size)
        rows = [order[first : first + columns] for first in order[::columns]]
        mine = []
        # Every rank makes every group, in the same order, as new_group demands.
        for members in [*rows, *(order[first::columns] for first in range(columns))]:
            group = dist.new_group(list(members))
            if rank in members:
                mine.append(Ranks(group, members, members.index(rank)))
        _grids[dist.group.WORLD] = mine[0], mine[1]
    return _grids[dist.group.WORLD]


class _GatherRows(torch.autograd.Function):
    """All-gather of rows; its backward is the reduce-scatter (sum) of the gradient."""

    @staticmethod
    def forward(ctx, local: Tensor, gather: Ranks, sizes: list[int]) -> Tensor:
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
        return ctx.gather.own_rows(gradient, ctx.sizes), None, None


class _Total(torch.autograd.Function):
    """All-reduce whose backward is a multiplication, because all ranks have the same gradient."""

    @staticmethod
    def forward(ctx, share: Tensor, ranks: Ranks) -> Tensor:
        ctx.world_size = ranks.world_size
        return ranks.sum_(share.clone())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        return gradient * ctx.world_size, None


def _pad_rows(tensor: Tensor, rows: int) -> Tensor:
    if tensor.shape[0] == rows:
        return tensor
    padding = tensor.new_zeros((rows - tensor.shape[0], *tensor.shape[1:]))
    return torch.cat([tensor, padding])
