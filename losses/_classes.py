"""Sums of rows by class, and what they add to values and gradients, with torch's operators.

The positives of a contrastive loss are products of class sums (see `losses._block.Classes`).
`losses._kernels_classes` has the same functions for a GPU.

Letters: k rows, D features, C rows of a table of classes; ids (k,) are rows of that table.
"""

import torch
from torch import Tensor


def numbered(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Classes of a batch: ids equal exactly where labels are equal; every -1 is a class of its own.

    Args:
        labels: (k,) int64.

    Returns:
        ids (k,) int64, all of them less than k; counts (k,) int64, samples of each id, else 0.
    """
    if labels.numel() == 0:
        return labels, labels
    own = labels.max().clamp(min=-1) + 1 + torch.arange(len(labels), device=labels.device)
    ids = number(torch.where(labels == -1, own, labels))
    return ids, torch.zeros_like(ids).scatter_add_(0, ids, torch.ones_like(ids))


def number(labels: Tensor) -> Tensor:
    """Numbers from 0 without gaps, equal exactly where labels (k,) int64 are equal; in their order.

    As the inverse of `torch.unique`, for which the host would wait for the device.
    """
    ordered, order = torch.sort(labels, stable=True)
    new = torch.zeros_like(labels)
    new[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(labels).scatter_(0, order, new.cumsum(0))


def means(features: Tensor, ids: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
    """(C, D): the sum of the rows (k, D) of each id, times weights (k,), over counts (C,)."""
    if weights is not None:
        features = features * weights[:, None]
    sums = features.new_zeros((len(counts), features.shape[1])).index_add_(0, ids, features)
    return sums.div_(counts[:, None])


def dots(features: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """(k,): the product of each row (k, D) with its row of the table (C, D)."""
    return (features * table[ids]).sum(1)


def finish(
    grad: Tensor,
    scale: Tensor,
    features: Tensor | None = None,
    table: Tensor | None = None,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The last steps of a gradient by features; `grad` may be changed.

    Args:
        grad: (k, D). scale: (). features: (k, D). table: (C, D). ids, weights: (k,).

    Returns:
        scale * A (k, D) and, with features, the sum of features * A, where
        A = grad + weights * table[ids], with weights of 1 where there are none, or grad without a
        table.
    """
    if weights is not None:
        grad.addcmul_(table[ids], weights[:, None])
    elif table is not None:
        grad.add_(table[ids])
    total = None if features is None else (features * grad).sum()
    return grad.mul_(scale), total
