"""One rank's block of the logits of the global batch: gathers, normalisers, gradients.

Over ranks (see `losses._gather`) a rank computes one block of S = scale * x y^T: the rows (images)
of its grid row times the columns (texts) of its grid column. A row is complete only with the
columns of all ranks of the grid row, a column only with the rows of all ranks of the grid column;
normalisers are combined over them. In the backward pass the gradients of the normalisers, which
only their owners know, are gathered the same way, and the gradients of x and y go back by the
reduce-scatter of their gathers.

Letters: b and b' local rows and columns, n and m those of the block, B and B' those of all ranks, D
embedding size.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from losses._gather import Gather, Ranks
from losses._tiles import TILE, Ids, Tiles


@dataclass(frozen=True)
class Walk:
    """How a block is walked.

    Attributes:
        keep_bytes: memory per rank for logits that a CPU keeps for the backward pass; the result
            does not depend on it.
        tile: rows and columns of one tile on a CPU; the result does not depend on it.
        precision: type of the weights in the forward pass. Under bfloat16, and with features that
            are bfloat16 already, a GPU's matrix products take bfloat16 inputs; all sums stay
            float32. It changes nothing on a CPU.
    """

    keep_bytes: int = 64 * 2**20
    tile: tuple[int, int] = TILE
    precision: torch.dtype = torch.float32


WALK = Walk()


def backend(x: Tensor, y: Tensor, scale: Tensor, excluded: Ids | None, walk: Walk) -> Tiles:
    """What computes a block: kernels on a GPU, except for float64, which is there for tests."""
    if not x.is_cuda or x.dtype == torch.float64:
        return Tiles(x, y, scale, excluded, walk.tile, walk.keep_bytes)
    from losses._kernels import KernelTiles  # it needs Triton, which comes with torch for GPUs

    if walk.precision == torch.bfloat16:
        x, y = x.bfloat16(), y.bfloat16()
    return KernelTiles(x, y, scale, excluded)


class Place:
    """Which rows and columns of all ranks meet on this one; collective.

    Args:
        rows, columns: (b, ...), (b', ...) of this rank; only their numbers matter.
        gather: the ranks that share the batch.
        paired: b = b' on every rank, so that the ranks need not tell each other b' as well.

    Attributes:
        row_sizes, column_sizes: b and b' of every rank.
        own_rows, own_columns: where those of this rank lie in the block.
    """

    def __init__(self, rows: Tensor, columns: Tensor, gather: Gather, paired: bool = False):
        self.gather = gather
        self.row_sizes = gather.sizes(len(rows), rows.device)
        self.column_sizes = self.row_sizes if paired else gather.sizes(len(columns), columns.device)
        first = sum(self.row_sizes[rank] for rank in gather.row.members[: gather.row.rank])
        self.own_rows = slice(first, first + len(rows))
        first = sum(self.column_sizes[rank] for rank in gather.column.members[: gather.column.rank])
        self.own_columns = slice(first, first + len(columns))

    def rows(self, local: Tensor) -> Tensor:
        """(n, ...) of the block from (b, ...) of this rank; collective over the grid row."""
        ranks = self.gather.row
        return ranks.rows(local, [self.row_sizes[rank] for rank in ranks.members])

    def columns(self, local: Tensor) -> Tensor:
        """(m, ...) of the block from (b', ...) of this rank; collective over the grid column."""
        ranks = self.gather.column
        return ranks.rows(local, [self.column_sizes[rank] for rank in ranks.members])


class Block(Place):
    """The block of this rank, gathered once for everything that is computed of it; collective.

    Args:
        x, y: (b, D), (b', D) local rows and columns of the logits; need not be of unit length.
        walk: how the block is walked.
        gather, paired: as for `Place`.

    Attributes:
        x, y: (n, D), (m, D) of the block, in float32, or the type of x if wider.
    """

    def __init__(
        self, x: Tensor, y: Tensor, gather: Gather, walk: Walk = WALK, paired: bool = False
    ):
        super().__init__(x, y, gather, paired)
        dtype = torch.promote_types(x.dtype, torch.float32)
        exact = x.dtype == y.dtype == torch.bfloat16
        self.walk = replace(walk, precision=torch.bfloat16) if exact else walk
        self.x, self.y = self.rows(x.to(dtype)), self.columns(y.to(dtype))

    def normalisers(
        self, scale: Tensor, exclude: Ids | None = None, classes: "Classes | None" = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `losses._core.normalisers` returns, and (b,) what `Classes` says of each own row.

        The last is empty without `classes`.
        """
        excluded = None if exclude is None else (self.rows(exclude[0]), self.columns(exclude[1]))
        scale = scale.to(self.x.dtype).reshape(())
        return _Normalisers.apply(self.x, self.y, scale, self, excluded, classes)

    def sigmoid_share(
        self, scale: Tensor, bias: Tensor, classes: "Classes | None" = None
    ) -> tuple[Tensor, Tensor]:
        """The part of `losses._core.sigmoid_sum` that this block is, and as `normalisers`."""
        scale, bias = (value.to(self.x.dtype).reshape(()) for value in (scale, bias))
        return _Sigmoids.apply(self.x, self.y, scale, bias, self, classes)


class Classes:
    """Positives of a block by labels: the mean logit of each row with the columns of its label.

    As products of class sums: with n_c samples of class c on each side of the whole batch, the mean
    of row i is scale * x_i . Y_c(i) / n_c(i), Y_c the sum of the texts of class c.

    Args:
        block: rows and columns are the same samples.
        ids: (B,) label of every sample of all ranks, from 0, see `losses._core.global_labels`.
        counts: (B,) samples of each label, at least up to the largest label.
    """

    def __init__(self, block: Block, ids: Tensor, counts: Tensor):
        parts = ids.split(block.row_sizes)
        gather = block.gather
        sides = [torch.cat([parts[k] for k in r.members]) for r in (gather.row, gather.column)]
        sizes = [len(side) for side in sides]
        if sum(sizes) < len(
            ids
        ):  # the class sums of the whole batch would be larger than the block
            both = torch.cat(sides)
            numbered = number(both)
            counts = counts.new_ones(len(both)).scatter_(0, numbered, counts[both])
            sides = numbered.split(sizes)
        self.row_ids, self.column_ids = sides
        self.counts = counts.clamp(min=1)  # beyond the largest label it is 0

    def means(self, features: Tensor, ids: Tensor) -> Tensor:
        """Sum of the given features of each label over its count in the global batch."""
        shape = len(self.counts), features.shape[1]
        return features.new_zeros(shape).index_add_(0, ids, features).div_(self.counts[:, None])

    def add_gradients(
        self, x: Tensor, text_means: Tensor, weights: Tensor, grad_x: Tensor, grad_y: Tensor
    ) -> None:
        """Add, in place, the gradients of sum_i weights_i x_i . Y_c(i) / n_c(i)."""
        grad_x.addcmul_(text_means[self.row_ids], weights[:, None])
        image_means = self.means(x * weights[:, None], self.row_ids)
        grad_y.add_(image_means[self.column_ids])


def number(labels: Tensor) -> Tensor:
    """Numbers from 0 without gaps, equal exactly where labels (k,) int64 are equal; in their order.

    As the inverse of `torch.unique`, for which the host would wait for the device.
    """
    ordered, order = torch.sort(labels, stable=True)
    new = torch.zeros_like(labels)
    new[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(labels).scatter_(0, order, new.cumsum(0))


class _Normalisers(torch.autograd.Function):
    """From one block x (n, D), y (m, D) per rank the normalisers of its own rows and columns."""

    @staticmethod
    def forward(ctx, x, y, scale, block, excluded, classes):
        tiles = backend(x, y, scale, excluded, block.walk)
        row_lse, column_lse = tiles.forward()
        text_means = None if classes is None else classes.means(y, classes.column_ids)
        terms = [] if classes is None else [scale * (x * text_means[classes.row_ids]).sum(1)]
        row_lse, *terms = combine(block.gather.row, row_lse, *terms)
        (column_lse,) = combine(block.gather.column, column_lse)
        ctx.tiles, ctx.block, ctx.classes = tiles, block, classes
        ctx.save_for_backward(x, scale, row_lse, column_lse, text_means)
        positive = terms[0][block.own_rows].clone() if terms else x.new_zeros(0)
        return row_lse[block.own_rows].clone(), column_lse[block.own_columns].clone(), positive

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_rows, of_columns, of_positive):
        x, scale, row_lse, column_lse, text_means = ctx.saved_tensors
        block, classes = ctx.block, ctx.classes
        of_rows, of_columns = block.rows(of_rows), block.columns(of_columns)
        grad_x, grad_y = ctx.tiles.backward(row_lse, column_lse, of_rows, of_columns)
        if classes is not None:
            weights = block.rows(of_positive)
            classes.add_gradients(x, text_means, weights, grad_x, grad_y)
        grad_scale = (x * grad_x).sum()
        return grad_x.mul_(scale), grad_y.mul_(scale), grad_scale, None, None, None


class _Sigmoids(torch.autograd.Function):
    """The sum of log(1 + exp(S_ij + bias)) over the block; positives as in `_Normalisers`."""

    @staticmethod
    def forward(ctx, x, y, scale, bias, block, classes):
        tiles = backend(x, y, scale, None, block.walk)
        share, positive, text_means = tiles.softplus_sum(bias), x.new_zeros(0), None
        if classes is not None:
            text_means = classes.means(y, classes.column_ids)
            positive = scale * (x * text_means[classes.row_ids]).sum(1)
            positive = block.gather.row.sum_(positive)[block.own_rows].clone()
        ctx.tiles, ctx.block, ctx.classes = tiles, block, classes
        ctx.save_for_backward(x, scale, bias, text_means)
        return share, positive

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_share, of_positive):
        x, scale, bias, text_means = ctx.saved_tensors
        grad_x, grad_y, total = ctx.tiles.sigmoid_gradients(bias)
        grad_x.mul_(of_share)
        grad_y.mul_(of_share)
        if ctx.classes is not None:
            weights = ctx.block.rows(of_positive)
            ctx.classes.add_gradients(x, text_means, weights, grad_x, grad_y)
        grad_scale = (x * grad_x).sum()
        grad_x, grad_y = grad_x.mul_(scale), grad_y.mul_(scale)
        return grad_x, grad_y, grad_scale, total * of_share, None, None


def combine(ranks: Ranks, lse: Tensor, *terms: Tensor) -> tuple[Tensor, ...]:
    """Over ranks that hold parts of the same rows: logsumexp of `lse`, sum of each of `terms`."""
    if ranks.world_size == 1:
        return lse, *terms
    shift = ranks.max_(lse.clone())
    shift.masked_fill_(shift == -math.inf, 0)  # every pair is excluded: exp(-inf - -inf) is NaN
    sums = ranks.sum_(torch.stack([(lse - shift).exp(), *terms]))
    return shift + sums[0].log(), *sums[1:]
