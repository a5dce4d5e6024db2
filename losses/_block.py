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
from types import ModuleType

import torch
from torch import Tensor

from losses import _classes
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


def on_kernels(x: Tensor) -> bool:
    """Whether kernels compute with x: on a GPU, except for float64, which is there for tests."""
    return x.is_cuda and x.dtype != torch.float64


def backend(x: Tensor, y: Tensor, scale: Tensor, excluded: Ids | None, walk: Walk) -> Tiles:
    """What computes a block: kernels, or tiles by torch's operators."""
    if not on_kernels(x):
        return Tiles(x, y, scale, excluded, walk.tile, walk.keep_bytes)
    from losses._kernels import KernelTiles  # it needs Triton, which comes with torch for GPUs

    if walk.precision == torch.bfloat16:
        x, y = x.bfloat16(), y.bfloat16()
    return KernelTiles(x, y, scale, excluded)


def of_classes(x: Tensor) -> ModuleType:
    """The functions of `losses._classes` for features like x, chosen as `backend` chooses."""
    if not on_kernels(x):
        return _classes
    from losses import _kernels_classes

    return _kernels_classes


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
        x, y: (n, D), (m, D) of the block, in float32, or the type of x if wider; on one GPU alone
            bfloat16 features stay what they are, since no sum of ranks is taken of them.
        dtype: float32, or the type of x if wider: of scales, sums and results.
    """

    def __init__(
        self, x: Tensor, y: Tensor, gather: Gather, walk: Walk = WALK, paired: bool = False
    ):
        super().__init__(x, y, gather, paired)
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        exact = x.dtype == y.dtype == torch.bfloat16
        self.walk = replace(walk, precision=torch.bfloat16) if exact else walk
        if not (exact and x.is_cuda and gather.world_size == 1):
            x, y = x.to(self.dtype), y.to(self.dtype)
        self.x, self.y = self.rows(x), self.columns(y)

    def normalisers(
        self, scale: Tensor, exclude: Ids | None = None, classes: "Classes | None" = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `losses._core.normalisers` returns, and (b,) what `Classes` says of each own row.

        The last is empty without `classes`.
        """
        excluded = None if exclude is None else (self.rows(exclude[0]), self.columns(exclude[1]))
        scale = scale.to(self.dtype).reshape(())
        return _Normalisers.apply(self.x, self.y, scale, self, excluded, classes)

    def sigmoid_share(
        self, scale: Tensor, bias: Tensor, classes: "Classes | None" = None
    ) -> tuple[Tensor, Tensor]:
        """The part of `losses._core.sigmoid_sum` that this block is, and as `normalisers`."""
        scale, bias = (value.to(self.dtype).reshape(()) for value in (scale, bias))
        return _Sigmoids.apply(self.x, self.y, scale, bias, self, classes)


class Classes:
    """Positives of a block by labels: the mean logit of each row with the columns of its label.

    As products of class sums: with n_c samples of class c on each side of the whole batch, the mean
    of row i is scale * x_i . Y_c(i) / n_c(i), Y_c the sum of the texts of class c.

    Args:
        block: rows and columns are the same samples.
        ids: (B,) class of every sample of all ranks, see `losses._classes.numbered`.
        counts: (B,) samples of each class, at least up to the largest id.
    """

    def __init__(self, block: Block, ids: Tensor, counts: Tensor):
        parts = ids.split(block.row_sizes)
        gather = block.gather
        sides = [torch.cat([parts[k] for k in r.members]) for r in (gather.row, gather.column)]
        sizes = [len(side) for side in sides]
        if sum(sizes) < len(ids):  # class sums of the whole batch would be larger than the block
            both = torch.cat(sides)
            numbers = _classes.number(both)
            counts = counts.new_ones(len(both)).scatter_(0, numbers, counts[both])
            sides = numbers.split(sizes)
        self.row_ids, self.column_ids = sides
        self.counts = counts.clamp(min=1)  # 0 for what is no id

    def text_means(self, y: Tensor) -> Tensor:
        """(C, D): the mean text of each class over the global batch, the part of this block."""
        return of_classes(y).means(y, self.column_ids, self.counts)

    def finish(
        self,
        x: Tensor,
        text_means: Tensor,
        weights: Tensor,
        scale: Tensor,
        grads: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scale gradients after adding those of sum_i weights_i x_i . Y_c(i) / n_c(i).

        Returns:
            Gradients of x and y, and that of the scale.
        """
        ops, (grad_x, grad_y) = of_classes(x), grads
        image_means = ops.means(x, self.row_ids, self.counts, weights)
        grad_x, of_scale = ops.finish(grad_x, scale, x, text_means, self.row_ids, weights)
        grad_y, _ = ops.finish(grad_y, scale, table=image_means, ids=self.column_ids)
        return grad_x, grad_y, of_scale


class _Normalisers(torch.autograd.Function):
    """From one block x (n, D), y (m, D) per rank the normalisers of its own rows and columns."""

    @staticmethod
    def forward(ctx, x, y, scale, block, excluded, classes):
        tiles = backend(x, y, scale, excluded, block.walk)
        row_lse, column_lse = tiles.forward()
        text_means = None if classes is None else classes.text_means(y)
        terms = []
        if classes is not None:
            terms = [scale * of_classes(x).dots(x, text_means, classes.row_ids)]
        row_lse, *terms = combine(block.gather.row, row_lse, *terms)
        (column_lse,) = combine(block.gather.column, column_lse)
        ctx.tiles, ctx.block, ctx.classes = tiles, block, classes
        ctx.save_for_backward(x, scale, row_lse, column_lse, text_means)
        positive = _own(terms[0], block.own_rows) if terms else x.new_zeros(0)
        return _own(row_lse, block.own_rows), _own(column_lse, block.own_columns), positive

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_rows, of_columns, of_positive):
        x, scale, row_lse, column_lse, text_means = ctx.saved_tensors
        block, classes = ctx.block, ctx.classes
        of_rows, of_columns = block.rows(of_rows), block.columns(of_columns)
        grads = ctx.tiles.backward(row_lse, column_lse, of_rows, of_columns)
        return *_finish(block, classes, x, text_means, of_positive, scale, grads), None, None, None


class _Sigmoids(torch.autograd.Function):
    """The sum of log(1 + exp(S_ij + bias)) over the block; positives as in `_Normalisers`."""

    @staticmethod
    def forward(ctx, x, y, scale, bias, block, classes):
        tiles = backend(x, y, scale, None, block.walk)
        share, positive, text_means = tiles.softplus_sum(bias), x.new_zeros(0), None
        if classes is not None:
            text_means = classes.text_means(y)
            positive = scale * of_classes(x).dots(x, text_means, classes.row_ids)
            positive = _own(block.gather.row.sum_(positive), block.own_rows)
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
        finished = _finish(
            ctx.block, ctx.classes, x, text_means, of_positive, scale, (grad_x, grad_y)
        )
        return *finished, total * of_share, None, None


def _finish(block, classes, x, text_means, of_positive, scale, grads) -> tuple[Tensor, ...]:
    """Gradients of x, y and scale from G y and G^T x, and with classes from their positives'."""
    if classes is not None:
        return classes.finish(x, text_means, block.rows(of_positive), scale, grads)
    ops = of_classes(x)
    grad_x, of_scale = ops.finish(grads[0], scale, x)
    return grad_x, ops.finish(grads[1], scale)[0], of_scale


def _own(values: Tensor, own: slice) -> Tensor:
    """Those of this rank, not as a view of the others."""
    return values if own == slice(0, len(values)) else values[own].clone()


def combine(ranks: Ranks, lse: Tensor, *terms: Tensor) -> tuple[Tensor, ...]:
    """Over ranks that hold parts of the same rows: logsumexp of `lse`, sum of each of `terms`."""
    if ranks.world_size == 1:
        return lse, *terms
    shift = ranks.max_(lse.clone())
    shift.masked_fill_(shift == -math.inf, 0)  # every pair is excluded: exp(-inf - -inf) is NaN
    sums = ranks.sum_(torch.stack([(lse - shift).exp(), *terms]))
    return shift + sums[0].log(), *sums[1:]
