"""The contrastive core: normalisers in both directions over the global batch, by tiles.

With S = scale * x y^T, x (B, D) the rows (images) and y (B', D) the columns (texts) of all ranks,

    r_i = log sum_j exp(S_ij)        c_j = log sum_i exp(S_ij)

are all that a contrastive loss needs of S as a whole: `normalisers` gives them, and their gradients
for any g_i = dL/dr_i and h_j = dL/dc_j, with G_ij = g_i exp(S_ij - r_i) + h_j exp(S_ij - c_j):

    dL/dx = scale * G y        dL/dy = scale * G^T x        dL/dscale = sum_i <x_i, (G y)_i>

`contrast` is UniCL's loss (arXiv 2204.03610, Algorithm 1: mean over rows, halved sum of both
directions): with B samples, n_c of class c, and class sums X_c, Y_c,

    L = (sum_i r_i + sum_j c_j) / (2B) - (scale / B) sum_c <X_c, Y_c> / n_c

Neither the target matrix nor the logits exist as a whole: the positive term is a product of class
sums, the normalisers are accumulated tile by tile (`losses._tiles`), and tiles are computed again
in the backward pass, except those that fit a budget. `losses._block` does it over ranks.
Nothing here makes the host wait for the device, provided that the ranks know each other's numbers
of rows (`losses._gather.Gather.equal_rows`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses import _replay
from losses._block import WALK, Block, Classes, Walk, of_classes
from losses._gather import Gather
from losses._tiles import TILE, Ids


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
        ids (B,) and counts (B,), see `losses._classes.numbered`. The argument is not changed.
    """
    return of_classes(labels).numbered(labels)


def normalisers(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    gather: Gather,
    exclude: Ids | None = None,
    walk: Walk = WALK,
) -> tuple[Tensor, Tensor]:
    """Logarithms of the softmax denominators of the global logits, in both directions.

    Args:
        x, y: (b, D), (b', D) rows and columns of this rank, of any length.
        scale: (1,) or scalar multiplier of the products (not its logarithm), positive.
        gather: the ranks that share the batch; b and b' may differ between them.
        exclude: ids of the rows (b,) and of the columns (b',), int64, with one meaning on all
            ranks: pairs of equal ids are left out of both sums; an id < 0 excludes nothing.
        walk: memory, tiles and precision.

    Returns:
        r (b,) over all columns and c (b',) over all rows, float32 or wider; -inf where all pairs
        are excluded, from where no gradient comes, whatever its own is. Any gradient per row and
        per column is right, and follows the convention of `losses._gather`: the loss of a rank
        is one whose mean over ranks is the global loss.
    """
    row_lse, column_lse, _ = Block(x, y, gather, walk).normalisers(scale, exclude)
    return row_lse, column_lse


def pair_losses(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    gather: Gather,
    target: Tensor | None = None,
    exclude: Ids | None = None,
    walk: Walk = WALK,
) -> Tensor:
    """Half the sum of both directions of CLIP's loss, of each sample (arXiv 2103.00020, figure 3).

    Args:
        image, text: (b, D) features of this rank, row i of both the same sample.
        scale: (1,) multiplier of the cosines.
        target: (b, D) what stands for the text of a sample in its positive; None: its text.
        gather, exclude, walk: as for `normalisers`.

    Returns:
        (b,), float32 or wider; the mean over all ranks (`gather.mean`) is the loss of CLIP.
    """
    rows, columns = normalisers(image, text, scale, gather, exclude, walk)
    target = text if target is None else target
    cosines = (image.to(rows.dtype) * target.to(rows.dtype)).sum(1)
    return 0.5 * (rows + columns) - scale.to(rows.dtype) * cosines


def sigmoid_sum(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, gather: Gather, walk: Walk = WALK
) -> Tensor:
    """sum_ij log(1 + exp(S_ij + bias)) over all rows and columns of the global batch.

    Args:
        x, y, scale, gather, walk: as for `normalisers`.
        bias: (1,) or scalar added to every logit.

    Returns:
        Scalar, equal on every rank. Gradients follow the convention of `losses._gather`.
    """
    share, _ = Block(x, y, gather, walk).sigmoid_share(scale, bias)
    return gather.total(share)


def contrast(
    image_features: Tensor,
    text_features: Tensor,
    labels: Tensor,
    scale: Tensor,
    gather: Gather,
    keep_bytes: int = WALK.keep_bytes,
    tile: tuple[int, int] = TILE,
    precision: torch.dtype = torch.float32,
) -> Contrast:
    """UniCL's bidirectional loss over the global batch (equations 1 to 3, code form).

    Args:
        image_features, text_features: (b, D) features of this rank, l2-normalised in the paper.
        labels: (b,) int64, see `global_labels`.
        scale: (1,) or scalar multiplier of the cosines (not its logarithm), positive.
        gather: the ranks that share the batch.
        keep_bytes, tile, precision: see `losses._block.Walk`.

    Returns:
        `Contrast`. Gradients follow the convention of `losses._gather`.
    """
    walk = Walk(keep_bytes, tile, precision)
    if _replay.fits(image_features, gather):
        features = image_features, text_features
        return Contrast(*_replay.contrast(*features, labels, scale, gather, walk))
    block = Block(image_features, text_features, gather, walk, paired=True)
    ids, counts = global_labels(gather.rows(labels, block.row_sizes))
    if len(ids) == 0:  # no rank has a row: a zero that keeps the graph alive
        return Contrast((block.x.sum() + block.y.sum()) * 0, block.x.new_zeros(0), labels[:0])
    classes = Classes(block, ids, counts)
    row_lse, column_lse, positive = block.normalisers(scale, classes=classes)
    # A class has as many images as texts, so both directions have the same positive term.
    sample_loss = 0.5 * (row_lse + column_lse) - positive
    loss = gather.total(sample_loss.sum()) / len(ids)
    return Contrast(loss, sample_loss.detach(), counts[ids.split(block.row_sizes)[gather.rank]])
