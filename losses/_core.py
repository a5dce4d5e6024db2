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

Over ranks (see `losses._gather`) a rank computes one block of S: the images of its grid row times
the texts of its grid column. Normalisers and positive terms are combined over the ranks that
share them; gradients go back by the reduce-scatter of the gathers.

Letters: b local rows, B global rows, D embedding size, U labels present.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses._gather import Gather, Ranks
from losses._half import HalfTiles
from losses._tiles import Tiles

# Rows and columns of a tile by the type of the products' inputs: the best on a CPU (measured), and
# for bfloat16 large enough that a GPU's product takes longer than its launch (not measured).
TILES = {torch.float32: (2048, 1024), torch.bfloat16: (4096, 8192)}


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
    tile: tuple[int, int] | None = None,
    products: torch.dtype = torch.float32,
) -> Contrast:
    """UniCL's bidirectional loss over the global batch (equations 1 to 3, code form).

    Args:
        image_features, text_features: (b, D) l2-normalised features of this rank.
        labels: (b,) int64, see `global_labels`.
        scale: (1,) or scalar multiplier of the cosines (not its logarithm), positive.
        gather: the ranks that share the batch.
        keep_bytes: memory per rank for logits kept for the backward pass; the result does
            not depend on it.
        tile: rows and columns of one tile; the result does not depend on it. None: TILES.
        products: type of the inputs of matrix products, of float32 (or the features' own, if
            wider) and bfloat16. With bfloat16 all sums stay float32 and no logits are kept.

    Returns:
        `Contrast`. Gradients follow the convention of `losses._gather`.
    """
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    x, y = image_features.to(dtype), text_features.to(dtype)
    sizes = gather.sizes(len(x), x.device)
    ids, counts = global_labels(gather.rows(labels, sizes))
    if len(ids) == 0:  # no rank has a row: a zero that keeps the graph alive
        return Contrast((x.sum() + y.sum()) * 0, x.new_zeros(0), labels.new_zeros(0))
    row, column = gather.row, gather.column
    loss, sample_loss = _TiledContrast.apply(
        row.rows(x, [sizes[rank] for rank in row.members]),
        column.rows(y, [sizes[rank] for rank in column.members]),
        scale.to(dtype).reshape(()),
        _Block.of(gather, sizes, ids, counts),
        gather,
        tile or TILES[products],
        keep_bytes,
        products,
    )
    own = ids.split(sizes)[gather.rank]
    return Contrast(loss, sample_loss, counts[own])


@dataclass
class _Block:
    """This rank's block of the logits: n images of its grid row, m texts of its grid column.

    Attributes:
        row_ids, column_ids: (n,), (m,) labels in [0, U), U labels present in the block.
        counts: (U,) samples of each label in the **global** batch.
        own_rows, own_columns: where the samples of this rank lie.
        total: B, rows of the global batch.
    """

    row_ids: Tensor
    column_ids: Tensor
    counts: Tensor
    own_rows: slice
    own_columns: slice
    total: int

    @classmethod
    def of(cls, gather: Gather, sizes: list[int], ids: Tensor, counts: Tensor) -> "_Block":
        """The block of this rank, from the labels of the global batch."""
        parts = ids.split(sizes)
        sides = [torch.cat([parts[k] for k in r.members]) for r in (gather.row, gather.column)]
        # Numbered again, because class sums of the whole batch may be larger than the block.
        present, block_ids = torch.unique(torch.cat(sides), return_inverse=True)
        row_ids, column_ids = block_ids.split([len(side) for side in sides])
        own = []
        for ranks in (gather.row, gather.column):
            first = sum(sizes[k] for k in ranks.members[: ranks.rank])
            own.append(slice(first, first + sizes[gather.rank]))
        return cls(row_ids, column_ids, counts[present], *own, len(ids))


class _TiledContrast(torch.autograd.Function):
    """Loss from one block (x (n, D), y (m, D)) per rank; the module docstring has the formulas."""

    @staticmethod
    def forward(ctx, x, y, scale, block, gather, tile, keep_bytes, products):
        half = products == torch.bfloat16
        tiles = HalfTiles(x, y, scale, tile) if half else Tiles(x, y, scale, tile, keep_bytes)
        row_lse, column_lse = tiles.forward()
        text_means = _class_means(y, block.column_ids, block.counts)
        positive = scale * (x * text_means[block.row_ids]).sum(1)

        # A row is complete only with the texts of all grid columns, a column only with the
        # images of all grid rows.
        row_lse, positive = _combine(gather.row, row_lse, positive)
        (column_lse,) = _combine(gather.column, column_lse)
        sample_loss = 0.5 * (row_lse[block.own_rows] + column_lse[block.own_columns])
        sample_loss -= positive[block.own_rows]
        # A class has as many images as texts, so both directions have the same positive term.
        loss = gather.sum_(sample_loss.sum()) / block.total

        ctx.tiles, ctx.block, ctx.world_size = tiles, block, gather.world_size
        ctx.save_for_backward(x, scale, row_lse, column_lse, text_means)
        ctx.mark_non_differentiable(sample_loss)
        return loss, sample_loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):
        x, scale, row_lse, column_lse, text_means = ctx.saved_tensors
        block = ctx.block
        grad_x, grad_y = ctx.tiles.backward(row_lse, column_lse)
        grad_x.sub_(text_means[block.row_ids], alpha=2)
        image_means = _class_means(x, block.row_ids, block.counts)
        grad_y.sub_(image_means[block.column_ids], alpha=2)
        # Parameter gradients are averaged over ranks later, hence the world size here.
        factor = gradient * ctx.world_size / (2 * block.total)
        grad_scale = (x * grad_x).sum() * factor
        grad_x.mul_(factor * scale)
        grad_y.mul_(factor * scale)
        return grad_x, grad_y, grad_scale, None, None, None, None, None


def _combine(ranks: Ranks, lse: Tensor, *terms: Tensor) -> tuple[Tensor, ...]:
    """Over ranks that hold parts of the same rows: logsumexp of `lse`, sum of each of `terms`."""
    if ranks.world_size == 1:
        return lse, *terms
    shift = ranks.max_(lse.clone())
    sums = ranks.sum_(torch.stack([(lse - shift).exp(), *terms]))
    return shift + sums[0].log(), *sums[1:]


def _class_means(features: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    """(U, D): sum of the given features of each label over its count in the global batch."""
    sums = features.new_zeros((len(counts), features.shape[1])).index_add_(0, ids, features)
    return sums.div_(counts[:, None])
