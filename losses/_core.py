"""The contrastive core: soft-target cross-entropy in both directions, by tiles.

With S = scale * x y^T over the global batch of B samples, targets "same label" (n_c samples of
class c), r_i = logsumexp_j S_ij, c_j = logsumexp_i S_ij and class sums X_c, Y_c:

    L       = (sum_i r_i + sum_j c_j) / (2B) - (scale / B) sum_c <X_c, Y_c> / n_c
    dL/dx_i = scale / (2B) * [ sum_j (P_ij + Q_ij) y_j - 2 Y_c(i) / n_c(i) ]
    dL/dy_j = scale / (2B) * [ sum_i (P_ij + Q_ij) x_i - 2 X_c(j) / n_c(j) ]
    dL/dscale = sum_i <x_i, dL/dx_i> / scale

where P_ij = exp(S_ij - r_i) and Q_ij = exp(S_ij - c_j). It is the code form of Algorithm 1 of
UniCL (arXiv 2204.03610): mean over rows, halved sum of both directions. Neither the target
matrix nor the logits exist as a whole: the positive term is a product of class sums, the
normalisers are accumulated tile by tile, and tiles are computed again in the backward pass
except those that fit the budget for kept logits.

Letters: b local rows, B global rows, D embedding size, U labels present in the global batch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from losses._gather import Gather

# One exponential serves rows and columns of a tile while no maximum lies further than this
# below the tile's own: exp(-60) is far from float32 underflow, exp(60) far from overflow.
SAFE_SPREAD = 60.0


@dataclass
class Contrast:
    """Result of `contrast`.

    Attributes:
        loss: scalar, the global loss (equal on every rank), differentiable.
        sample_loss: (b,) without gradient; its mean over the global batch, or over any set
            closed under "same label", is the loss of that batch or set.
        positives: (b,) int64, the number of positives |P(i)| of each local sample.
    """

    loss: Tensor
    sample_loss: Tensor
    positives: Tensor


def global_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Relabel the gathered batch: every -1 gets a label of its own.

    Args:
        labels: (B,) int64 of the **global** batch; class id >= 0, -1 for an image-text pair
            with a label of its own, <= -2 for a group of pairs with equal captions.

    Returns:
        ids (B,) in [0, U), equal exactly where labels are equal; counts (U,).
        The argument is not changed.
    """
    if labels.numel() == 0:
        return labels, labels
    own = labels.max().clamp(min=-1) + 1 + torch.arange(len(labels), device=labels.device)
    distinct = torch.where(labels == -1, own, labels)
    _, ids, counts = torch.unique(distinct, return_inverse=True, return_counts=True)
    return ids, counts


def contrast(
    image_features: Tensor,
    text_features: Tensor,
    labels: Tensor,
    scale: Tensor,
    gather: Gather,
    keep_bytes: int = 64 * 2**20,
    tile: tuple[int, int] = (2048, 1024),
) -> Contrast:
    """UniCL's bidirectional loss over the global batch (equations 1 to 3, code form).

    Args:
        image_features, text_features: (b, D) l2-normalised features of this rank.
        labels: (b,) int64, see `global_labels`.
        scale: (1,) or scalar multiplier of the cosines (not its logarithm), positive.
        gather: the ranks that share the batch.
        keep_bytes: memory per rank for logits kept for the backward pass; the result does
            not depend on it.
        tile: rows and columns of one tile; the result does not depend on it.

    Returns:
        `Contrast`. Gradients follow the convention of `losses._gather`.
    """
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    x, y = image_features.to(dtype), text_features.to(dtype)
    sizes = gather.sizes(len(x), x.device)
    ids, counts = global_labels(gather.rows(labels, sizes))
    if len(ids) == 0:  # no rank has a row: a zero that keeps the graph alive
        return Contrast((x.sum() + y.sum()) * 0, x.new_zeros(0), labels.new_zeros(0))
    first = sum(sizes[: gather.rank])
    own = slice(first, first + len(x))
    loss, sample_loss = _TiledContrast.apply(
        x,
        gather.rows(y, sizes),
        scale.to(dtype).reshape(()),
        ids,
        counts,
        own,
        gather,
        tile,
        keep_bytes,
    )
    return Contrast(loss, sample_loss, counts[ids[own]])


class _TiledContrast(torch.autograd.Function):
    """Local rows against gathered columns; the module docstring has the formulas."""

    @staticmethod
    def forward(ctx, x, y, scale, ids, counts, own, gather, tile, keep_bytes):
        tiles = _Tiles(x, y, scale, tile, keep_bytes)
        row_lse, column_lse = tiles.forward()
        text_means = _class_means(y, ids, counts)
        positive = scale * (x * text_means[ids[own]]).sum(1)

        # A column is complete only after the rows of all ranks: combine (max, sum).
        shift = gather.max_(column_lse.clone())
        shared = torch.cat([(column_lse - shift).exp(), (row_lse - 2 * positive).sum()[None]])
        gather.sum_(shared)
        column_lse = shift + shared[:-1].log()

        ctx.tiles, ctx.own, ctx.gather = tiles, own, gather
        ctx.save_for_backward(x, y, scale, ids, counts, row_lse, column_lse, text_means)
        loss = (shared[-1] + column_lse.sum()) / (2 * len(y))
        sample_loss = 0.5 * (row_lse + column_lse[own]) - positive
        ctx.mark_non_differentiable(sample_loss)
        return loss, sample_loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):
        x, y, scale, ids, counts, row_lse, column_lse, text_means = ctx.saved_tensors
        grad_x, grad_y = ctx.tiles.backward(row_lse, column_lse)
        grad_x.sub_(text_means[ids[ctx.own]], alpha=2)
        grad_y.sub_(_class_means(x, ids[ctx.own], counts)[ids], alpha=2)
        # Parameter gradients are averaged over ranks later, hence the world size here.
        factor = gradient * ctx.gather.world_size / (2 * len(y))
        grad_scale = (x * grad_x).sum() * factor
        grad_x.mul_(factor * scale)
        grad_y.mul_(factor * scale)
        return grad_x, grad_y, grad_scale, None, None, None, None, None, None


class _Tiles:
    """Walks the tiles of S = scale * x y^T and holds the kept ones between the two passes."""

    def __init__(self, x: Tensor, y: Tensor, scale: Tensor, tile: tuple[int, int], keep: int):
        self.x, self.y, self.scale = x, y, scale
        self.tile, self.keep_bytes = tile, keep
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
        # |S_ij| <= bound by Cauchy-Schwarz. If twice that is safe, one fixed shift serves all
        # tiles and no maximum has to be searched for.
        bound = 0.0
        if len(x):
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
        """logsumexp of the local logits over columns (b,) and over local rows (B,)."""
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
        """G y (b, D) and G^T x (B, D) with G_ij = exp(S_ij - r_i) + exp(S_ij - c_j)."""
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


def _class_means(features: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    """(U, D): sum of the given features of each label over its count in the global batch."""
    sums = features.new_zeros((len(counts), features.shape[1])).index_add_(0, ids, features)
    return sums.div_(counts[:, None])
