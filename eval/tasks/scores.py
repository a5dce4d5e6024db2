"""How well candidates fit queries, a few queries at a time: by cosine, or token by token.

Which of the two a model was trained for is its `similarity`, and shows in its features.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from loaders.errors import DataError

# Products of tokens that exist at once: 64 MiB in float64 on a CPU, 512 MiB on a GPU.
PRODUCTS = {"cpu": 2**23, "cuda": 2**26}


class Scores:
    """Base: scores of n queries against m candidates, `shape` = (n, m), in float64 on the CPU."""

    shape: tuple[int, int]

    def fill(self, start: int, stop: int, out: Tensor) -> None:
        """Write the scores of the queries `start` to `stop` into `out` (stop - start, m)."""
        raise NotImplementedError

    def row(self, query: int) -> Tensor:
        """The scores of one query (m,)."""
        out = torch.empty(1, self.shape[1], dtype=torch.float64)
        self.fill(query, query + 1, out)
        return out[0]

    def whole(self) -> Tensor:
        """All scores (n, m), for few candidates."""
        out = torch.empty(self.shape, dtype=torch.float64)
        self.fill(0, self.shape[0], out)
        return out


class Products(Scores):
    """Products of features: queries (n, D) and candidates (m, D), float.

    Raises DataError for features that are not finite, naming the data set `name`.
    """

    def __init__(self, queries: Tensor, candidates: Tensor, name: str = ""):
        _check_finite(queries, candidates, name)
        self.queries, self.transposed = queries, candidates.double().T
        self.shape = len(queries), len(candidates)

    def fill(self, start: int, stop: int, out: Tensor) -> None:
        torch.mm(self.queries[start:stop].double(), self.transposed, out=out)


class LateScores(Scores):
    """FILIP's late interaction (arXiv 2111.07783): the mean over the tokens of a query of its best
    product with a token of the candidate. Swapping the sides gives another score.

    Args:
        queries, candidates: (n, N, d), (m, M, d) tokens of unit length.
        query_mask, candidate_mask: (n, N), (m, M) bool, the valid tokens; None: all of them.
        name: the data set, for messages. device: where products are taken, in float64.
        each: candidates that belong together (the prompts of a class): their mean is one score.

    Raises:
        DataError: tokens that are not finite, or a text without any, of the data set `name`.
    """

    def __init__(
        self,
        queries: Tensor,
        candidates: Tensor,
        query_mask: Tensor | None,
        candidate_mask: Tensor | None,
        name: str = "",
        device: torch.device | str = "cpu",
        each: int = 1,
    ):
        _check_finite(queries, candidates, name)
        self.queries, self.query_mask = _cut(queries, query_mask, name)
        self.candidates, self.candidate_mask = _cut(candidates, candidate_mask, name)
        self.device, self.each = torch.device(device), each
        self.shape = len(queries), len(candidates) // each
        pair = self.queries.shape[1] * self.candidates.shape[1]
        self.side = max(
            1, math.isqrt(PRODUCTS.get(self.device.type, PRODUCTS["cuda"]) // max(1, pair))
        )

    def fill(self, start: int, stop: int, out: Tensor) -> None:
        for rows in _pieces(start, stop, self.side):
            parts = [self._tile(rows, columns) for columns in self._columns()]
            scores = torch.cat(parts, 1).unflatten(1, (-1, self.each)).mean(2)
            out[rows.start - start : rows.stop - start] = scores.cpu()

    def _columns(self) -> Iterator[slice]:
        return _pieces(0, len(self.candidates), self.side)

    def _tile(self, rows: slice, columns: slice) -> Tensor:
        x, y = (
            tokens[part].to(self.device).double()
            for tokens, part in ((self.queries, rows), (self.candidates, columns))
        )
        valid, other = (
            mask[part].to(self.device)
            for mask, part in ((self.query_mask, rows), (self.candidate_mask, columns))
        )
        products = torch.mm(x.flatten(0, 1), y.flatten(0, 1).T).view(*x.shape[:2], *y.shape[:2])
        products.masked_fill_(~other, -math.inf)
        best = products.amax(3).masked_fill_(~valid[..., None], 0)
        return best.sum(1) / valid.sum(1)[:, None]


def compare(
    queries: dict[str, Tensor],
    candidates: dict[str, Tensor],
    name: str,
    device: torch.device | str = "cpu",
    each: int = 1,
) -> Scores:
    """Scores of two sets of features by the similarity of the model that made them.

    Args:
        queries, candidates: what `eval.tasks.features.Extractor` returned, images or texts.
        name, device, each: as for `LateScores`; `each` is 1 where features are compared, which are
            averaged before.
    """
    if "token_features" not in queries:
        return Products(queries["feature"], candidates["feature"], name)
    sides = (queries, candidates)
    masks = [side["token_mask"].bool() if "token_mask" in side else None for side in sides]
    return LateScores(*(side["token_features"] for side in sides), *masks, name, device, each)


def _check_finite(queries: Tensor, candidates: Tensor, name: str) -> None:
    for side, features in (("query", queries), ("candidate", candidates)):
        if not torch.isfinite(features).all():
            raise DataError(
                f"{name + ': ' if name else ''}the {side} features hold NaN or infinite values: "
                "this checkpoint has diverged, evaluate an earlier one (RUN/checkpoints/step_*)"
            )


def _cut(tokens: Tensor, mask: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """Tokens and mask, without what is padding everywhere."""
    if mask is None:
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool)
    empty = (~mask.any(1)).nonzero()
    if len(empty):
        raise DataError(
            f"{name + ': ' if name else ''}{len(empty)} texts have no token to compare, the first "
            f"is number {int(empty[0])}"
        )
    used = int(mask.any(0).nonzero().max()) + 1 if len(mask) else mask.shape[1]
    return tokens[:, :used], mask[:, :used]


def _pieces(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))
