"""Entropic optimal transport between the samples of the global batch, in the logarithm, by stripes.

With a log-kernel K (B, B) of which every rank holds its own rows, Sinkhorn's algorithm scales rows
and columns of exp(K) in turns (Cuturi, arXiv 1306.0895). In the logarithm it moves two potentials,

    r_i = -log sum_j exp(K_ij + c_j)        c_j = -log sum_i exp(K_ij + r_i)

where nothing over- or underflows however small the regularisation. Both masses are equal, so they
only shift the potentials, which the last normalisation takes back. Rows are complete on a rank; the
sums over columns are those of all ranks, two all-reduces of B numbers each time.

Two problems are solved at once, that of K and that of its transpose, which differ only in which
side is scaled first: with 0 as first potentials, n iterations and a last normalisation,

    rows of K first:     log plan_ij = K_ij + c_j + r_i   ends with rows that sum to 1
    columns of K first:  log plan_ij = K_ij + r_i + c_j   ends with columns that sum to 1

The kernel is a product of features and is made again in each of the n + 2 passes over it, except
for the stripes that fit a budget. Without a budget a rank holds, besides B rows of features, a few
stripes of `ELEMENTS` numbers: nothing grows with the square of the batch.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from losses._gather import Ranks

ELEMENTS = 2**20  # of one stripe of the kernel, if that is a row or more


class Kernel:
    """K = x y^T, -inf where a sample would meet itself, stripe by stripe of rows.

    Args:
        x: (b, D) rows of this rank. y: (B, D) columns, those of all ranks in rank order.
        first: the column of this rank's first sample.
        keep_bytes: memory for stripes that are kept; the result does not depend on it.
    """

    def __init__(self, x: Tensor, y: Tensor, first: int, keep_bytes: int):
        self.x, self.y, self.first, self.budget = x, y, first, keep_bytes
        self.height = max(1, ELEMENTS // max(1, len(y)))  # does not change the result
        self.kept: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Which rows, and K of these (h, B), which must not be changed."""
        for start in range(0, len(self.x), self.height):
            rows = slice(start, start + self.height)
            stripe = self.kept.get(start)
            if stripe is None:
                stripe = self.x[rows] @ self.y.T
                stripe.diagonal(self.first + start).fill_(-math.inf)
                if stripe.nbytes <= self.budget:
                    self.budget -= stripe.nbytes
                    self.kept[start] = stripe
            yield rows, stripe


@torch.no_grad()
def potentials(kernel: Kernel, iterations: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """r (2, b) of this rank's rows and c (2, B), the same on every rank; collective.

    Args:
        kernel: of at least two samples in all.
        iterations: n, each a scaling of both sides, before the last normalisation.
        ranks: those that share the batch.

    Returns:
        First of the problem that scales the rows of K first, then of its transpose.
    """
    columns = kernel.y.new_zeros(2, len(kernel.y))
    for number in range(iterations + 1):
        before = columns
        rows, columns = _sweep(kernel, before, ranks, start=number == 0)
    # The first problem ends with the rows, and the columns' potentials that they were made from.
    return rows, torch.stack([before[0], columns[1]])


def _sweep(kernel: Kernel, columns: Tensor, ranks: Ranks, start: bool) -> tuple[Tensor, Tensor]:
    """Both rows and columns once; in the `start` the second problem has no rows to begin with."""
    rows = columns.new_zeros(2, len(kernel.x))
    total = torch.full_like(columns, -math.inf)
    for part, stripe in kernel:
        over_columns = (stripe + columns[:, None]).logsumexp(2)
        if start:
            over_columns[1].zero_()
        rows[:, part] = -over_columns
        over_rows = (stripe + rows[:, part, None]).logsumexp(1)
        total = torch.logaddexp(total, over_rows)
    # At least one rank has another sample for a column, so that the maximum is finite.
    highest = ranks.max_(total.clone())
    return rows, -(highest + ranks.sum_((total - highest).exp_()).log_())


@torch.no_grad()
def transported(
    kernel: Kernel, rows: Tensor, columns: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """W y, W^T x and the entropy of each row, with W the sum of both plans on this rank's rows.

    Args:
        kernel, rows, columns: as `potentials` takes and returns them.
        x: (b, D') of this rank. y: (B, D') of all ranks.

    Returns:
        (b, D'); (B, D'), this rank's share of a sum over ranks; (b,) in nats, of which the sum over
        all ranks is that of both plans.
    """
    to_x, to_y = torch.empty_like(x), torch.zeros_like(y)
    entropy = x.new_empty(len(x))
    for part, stripe in kernel:
        plans = (stripe + rows[:, part, None] + columns[:, None]).exp_()
        entropy[part] = torch.special.entr(plans).sum((0, 2))
        both = plans.sum(0)
        to_x[part] = both @ y
        to_y.addmm_(both.T, x[part])
    return to_x, to_y, entropy
