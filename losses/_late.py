"""Late interaction over ranks: scores of images and texts by their tokens, tile by tile.

With tokens f_ik (k of N) of image i, g_jr (r of the m_j valid ones of M) of text j, and scale s,

    sI_ij = 1/N   sum_k max_r f_ik . g_jr        r_i = log sum_j exp(s sI_ij)
    sT_ij = 1/m_j sum_r max_k f_ik . g_jr        c_j = log sum_i exp(s sT_ij)

(FILIP, arXiv 2111.07783). Both scores of a pair come out of the same products, so one
walk over the tiles of a rank's block (`losses._block.Place`) serves both directions. A gradient
goes through the places of the maxima alone; of equal ones the one that torch.max names gets it.
With g_i = dL/dr_i and h_j = dL/dc_j the gradient of the products of a pair is s g_i exp(s sI_ij -
r_i) / N where r is the best token for k, plus s h_j exp(s sT_ij - c_j) / m_j where k is the best
for r; two matrix products with the tokens make of it the gradients of these.

Products exist for one tile at a time. What is kept for the backward pass, up to a budget, is one or
two bytes a token and pair, the place of its maximum, and the two scores; tiles beyond the budget
are computed again. Nothing here makes the host wait for the device.

On a GPU tokens travel and are multiplied in the precision of the run: in a run in bfloat16 they are
rounded to it. All sums, those of gradients over ranks among them, are float32.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from losses._block import WALK, Place, Walk, combine
from losses._gather import Gather

# Products of a tile: 32 MiB in float32 on a CPU, and 256 MiB on a GPU, which wants larger ones.
PRODUCTS = {"cpu": 2**23, "cuda": 2**26}


class _Tile(NamedTuple):
    """Scores (a, c) of both directions, and the places of the maxima: (a, N, c) of the best text
    token of each image token, (a, c, M) of the best image token of each text token."""

    of_image: Tensor
    of_text: Tensor
    text_at: Tensor
    image_at: Tensor


class LateTiles:
    """Walks the tiles of a block of pairs and holds the kept ones between the two passes.

    Args:
        x, y: (n, N, D), (m, M, D) tokens of one type. mask: (m, M) bool, the valid ones of y.
        scale: () multiplier of the scores.
        keep: bytes for what is kept; the result does not depend on it.
    """

    def __init__(self, x: Tensor, y: Tensor, mask: Tensor, scale: Tensor, keep: int):
        self.x, self.y, self.scale, self.keep_bytes = x, y, scale, keep
        self.sums = torch.promote_types(x.dtype, torch.float32)
        self.valid = mask.to(self.sums)
        self.bias = torch.zeros_like(self.valid).masked_fill_(~mask, -math.inf)
        self.empty = ~mask.any(1)
        self.counts = self.valid.sum(1).clamp_(min=1)
        pair = x.shape[1] * y.shape[1]
        side = max(1, math.isqrt(PRODUCTS.get(x.device.type, PRODUCTS["cuda"]) // pair))
        self.height = side
        self.width = max(1, side * side // max(1, min(len(x), side)))  # of few images more texts
        self.small = torch.uint8 if max(x.shape[1], y.shape[1]) <= 256 else torch.int16
        self.kept: dict[tuple[int, int], _Tile] = {}

    def forward(self) -> tuple[Tensor, Tensor]:
        """r over the texts of the block (n,) and c over its images (m,); see the module."""
        row_lse = self.bias.new_full((len(self.x),), -math.inf)
        column_lse = self.bias.new_full((len(self.y),), -math.inf)
        budget = self.keep_bytes
        for rows, columns in self._grid():
            tile = self._tile(rows, columns)
            over_texts = (self.scale * tile.of_image).logsumexp(1)
            over_images = (self.scale * tile.of_text).logsumexp(0)
            row_lse[rows] = torch.logaddexp(row_lse[rows], over_texts)
            column_lse[columns] = torch.logaddexp(column_lse[columns], over_images)
            budget -= sum(part.nbytes for part in tile)
            if budget >= 0:
                self.kept[rows.start, columns.start] = tile
        return row_lse, column_lse

    def backward(
        self, row_lse: Tensor, column_lse: Tensor, row_weights: Tensor, column_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the tokens over the scale: (n, N, D) of x and (m, M, D) of y.

        Args:
            row_lse, column_lse: r (n,), c (m,), of these or of more columns and rows.
            row_weights, column_weights: g (n,), h (m,) of any sign.
        """
        grad_x = torch.zeros_like(self.x, dtype=self.sums)
        grad_y = torch.zeros_like(self.y, dtype=self.sums)
        for rows, columns in self._grid():
            tile = self.kept.pop((rows.start, columns.start), None) or self._tile(rows, columns)
            of_image = (self.scale * tile.of_image - row_lse[rows, None]).exp_()
            of_image.mul_(row_weights[rows, None] / self.x.shape[1])
            of_image.masked_fill_(self.empty[columns], 0)
            of_text = (self.scale * tile.of_text - column_lse[columns]).exp_()
            of_text.mul_(column_weights[columns] / self.counts[columns])
            products = self._scattered(tile, of_image, of_text, self.valid[columns])
            x, y = self.x[rows].flatten(0, 1), self.y[columns].flatten(0, 1)
            grad_x[rows].flatten(0, 1).add_(_product(products, y))
            grad_y[columns].flatten(0, 1).add_(_product(products.t(), x))
        return grad_x, grad_y

    def _grid(self) -> Iterator[tuple[slice, slice]]:
        for i in range(0, len(self.x), self.height):
            for j in range(0, len(self.y), self.width):
                yield slice(i, i + self.height), slice(j, j + self.width)

    def _tile(self, rows: slice, columns: slice) -> _Tile:
        x, y = self.x[rows], self.y[columns]
        products = _product(x.flatten(0, 1), y.flatten(0, 1).t())
        products = products.view(*x.shape[:2], *y.shape[:2]).add_(self.bias[columns])
        best_text, text_at = products.max(3)
        best_image, image_at = products.max(1)
        of_image = best_text.mean(1).masked_fill_(self.empty[columns], 0)
        of_text = best_image.masked_fill_(self.bias[columns] < 0, 0).sum(2) / self.counts[columns]
        return _Tile(of_image, of_text, text_at.to(self.small), image_at.to(self.small))

    @staticmethod
    def _scattered(tile: _Tile, of_image: Tensor, of_text: Tensor, valid: Tensor) -> Tensor:
        """Gradient of the products (a N, c M) of those of the scores (a, c), over counts."""
        (a, n, c), m = tile.text_at.shape, valid.shape[1]
        gradient = of_image.new_zeros(a, n, c, m)
        spread = of_image[:, None, :, None].expand(a, n, c, 1)
        gradient.scatter_(3, tile.text_at.long()[..., None], spread)
        spread = (of_text[..., None] * valid)[:, None]
        gradient.scatter_add_(1, tile.image_at.long()[:, None], spread)
        return gradient.view(a * n, c * m)


class _Normalisers(torch.autograd.Function):
    """From the tokens of every rank the normalisers of its own rows and columns."""

    @staticmethod
    def forward(ctx, x, y, mask, scale, place, walk):
        dtype = factors(x, walk.precision)  # `rounded` has made that exact
        tokens = place.rows(x.to(dtype)), place.columns(y.to(dtype))
        tiles = LateTiles(*tokens, place.columns(mask), scale, walk.keep_bytes)
        row_lse, column_lse = tiles.forward()
        (row_lse,) = combine(place.gather.row, row_lse)
        (column_lse,) = combine(place.gather.column, column_lse)
        ctx.tiles, ctx.place = tiles, place
        ctx.save_for_backward(row_lse, column_lse)
        return row_lse[place.own_rows].clone(), column_lse[place.own_columns].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_rows, of_columns):
        (row_lse, column_lse), tiles, place = ctx.saved_tensors, ctx.tiles, ctx.place
        of_rows, of_columns = place.rows(of_rows), place.columns(of_columns)
        grad_x, grad_y = tiles.backward(row_lse, column_lse, of_rows, of_columns)
        grad_scale = (tiles.x * grad_x).sum()  # a score is linear in x while its maxima stay
        grads = []
        for ranks, gradient, sizes in (
            (place.gather.row, grad_x, place.row_sizes),
            (place.gather.column, grad_y, place.column_sizes),
        ):
            mine = [sizes[rank] for rank in ranks.members]
            grads.append(ranks.own_rows(gradient.mul_(tiles.scale), mine))
        return *grads, None, grad_scale, None, None


def late_normalisers(
    x: Tensor, y: Tensor, mask: Tensor, scale: Tensor, gather: Gather, walk: Walk = WALK
) -> tuple[Tensor, Tensor]:
    """Logarithms of the softmax denominators of the late scores of the global batch; collective.

    Args:
        x: (b, N, D) tokens of the images of this rank, float32 or wider; of unit length, as all
            tokens, or of any.
        y: (b, M, D) tokens of the texts. N, M and D are the same on all ranks, b may differ.
        mask: (b, M) bool, which of them are text. A text without any has score 0 with every image.
        scale: (1,) or scalar multiplier of the scores, positive.
        gather: the ranks that share the batch.
        walk: memory and precision.

    Returns:
        r (b,) of the images over all texts, c (b,) of the texts over all images. Any gradient is
        right, and follows the convention of `losses._gather`.
    """
    place = Place(x, y, gather, paired=True)
    return _Normalisers.apply(x, y, mask, scale.to(x.dtype).reshape(()), place, walk)


def paired_scores(x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """sI_ii and sT_ii, (b,) each, where row i of both is one sample; else as `late_normalisers`."""
    products = torch.bmm(x, y.transpose(1, 2))
    of_image = products.masked_fill(~mask[:, None], -math.inf).max(2).values.mean(1)
    of_text = (products.max(1).values * mask).sum(1) / mask.sum(1).clamp(min=1)
    return of_image.masked_fill(~mask.any(1), 0), of_text


def factors(tokens: Tensor, precision: torch.dtype) -> torch.dtype:
    """Type in which tokens travel and are multiplied in a run of this precision; as everywhere it
    changes nothing on a CPU."""
    return torch.bfloat16 if tokens.is_cuda and precision == torch.bfloat16 else tokens.dtype


def rounded(tokens: Tensor, precision: torch.dtype) -> Tensor:
    """Tokens as `factors` has them, in their own type; the gradient passes."""
    dtype = factors(tokens, precision)
    if dtype == tokens.dtype:
        return tokens
    return tokens + (tokens.to(dtype).to(tokens.dtype) - tokens).detach()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product in float32 sums, of 16-bit factors where one of them has 16 bits."""
    if torch.bfloat16 not in (a.dtype, b.dtype):
        return torch.mm(a, b)
    a, b = a.bfloat16(), b.bfloat16()
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
