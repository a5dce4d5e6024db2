"""Projection and prediction heads, with batch norms over the global batch.

A head with batch norms runs in `Method.loss`, where all features of the global batch are at hand,
and not in `encode`, which sees a micro-batch. So its statistics do not depend on ranks or
accumulation, and gradient caching stays exact. (torch's SyncBatchNorm joins ranks, but not
micro-batches, and works on accelerators only.)

All rows of a rank meet in a head, so what it remembers for the backward pass counts. Of each hidden
layer it is one matrix, what the batch norm is given: what comes out of the norm is computed again
(`Normalised`), and the norm's gradient is formed from pieces of the rows.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses._gather import Gather

PIECE = 2**18  # numbers that are computed with together


@dataclass(frozen=True)
class Normalised:
    """What comes out of a batch norm, as a recipe: (x - mean) * factor + shift, at least 0 if relu.

    Attributes:
        x: (b, D), of any type.
        mean, factor, shift: (D,), float32 or wider, the type that is computed in.
        relu: whether what is below 0 becomes 0.
    """

    x: Tensor
    mean: Tensor
    factor: Tensor
    shift: Tensor
    relu: bool

    def compute(self) -> Tensor:
        """The result (b, D), in the type of the mean."""
        out = torch.sub(self.x, self.mean).mul_(self.factor).add_(self.shift)
        return out.relu_() if self.relu else out

    def gradients(self, of_result: Tensor, rate: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some rows at a time: which, the gradient before the ReLU, and (x - mean) * rate.

        Args:
            of_result: (b, D), the gradient of the result. rate: (D,), 1 / standard deviation.
        """
        for rows in pieces(self.x):
            gradient, unit = of_result[rows], torch.sub(self.x[rows], self.mean)
            if self.relu:
                passed = (unit * self.factor).add_(self.shift) > 0
                gradient = gradient * passed
            yield rows, gradient, unit.mul_(rate)

    def instead_of(self, result: Tensor) -> torch.autograd.graph.saved_tensors_hooks:
        """Within it, graphs remember this recipe where they would remember `result`, which is what
        `compute` returns, in any type."""
        # What the graph remembers are these two functions, too: they must not know the result.
        kind, shape, place = result.dtype, result.shape, result.data_ptr()

        def pack(saved: Tensor) -> Tensor | None:
            return None if saved.shape == shape and saved.data_ptr() == place else saved

        def unpack(kept: Tensor | None) -> Tensor:
            return self.compute().to(kind) if kept is None else kept

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def pieces(x: Tensor) -> Iterator[slice]:
    """Rows of a matrix whose numbers are computed with together."""
    step = max(PIECE // max(x.shape[1], 1), 1)
    for first in range(0, len(x), step):
        yield slice(first, first + step)


class _Normalise(torch.autograd.Function):
    """The result of a recipe, whose mean, factor and shift are those of the rows of all ranks."""

    @staticmethod
    def forward(ctx, x, weight, bias, recipe, rate, count, gather):
        ctx.save_for_backward(x, recipe.mean, recipe.factor, recipe.shift, rate, count)
        ctx.relu, ctx.gather = recipe.relu, gather
        return recipe.compute()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_result):
        x, mean, factor, shift, rate, count = ctx.saved_tensors
        recipe = Normalised(x, mean, factor, shift, ctx.relu)
        of_bias, of_weight = torch.zeros_like(mean), torch.zeros_like(mean)
        for _, gradient, unit in recipe.gradients(of_result, rate):
            of_bias += gradient.sum(0)
            of_weight += unit.mul_(gradient).sum(0)
        # Mean and deviation are those of the rows of all ranks, and pass their gradients to them.
        means = ctx.gather.sum_(torch.stack([of_bias, of_weight])) / count
        of_x = torch.empty_like(x)
        for rows, gradient, unit in recipe.gradients(of_result, rate):
            of_x[rows] = unit.mul_(-means[1]).add_(gradient).sub_(means[0]).mul_(factor)
        return of_x, of_weight, of_bias, None, None, None, None


class BatchNormOverRanks(nn.Module):
    """`nn.BatchNorm1d` whose batch is that of all ranks, of equal or unequal shares.

    Args:
        width: D, the number of channels. eps, momentum: as in `nn.BatchNorm1d`.

    Attributes:
        running_mean, running_var: (D,) float32 buffers that evaluation mode uses.
    """

    def __init__(self, width: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(
        self,
        x: Tensor,
        gather: Gather | None = None,
        relu: bool = False,
        recipes: list[Normalised] | None = None,
    ) -> Tensor:
        """Normalise over the rows of all ranks; collective in training mode.

        Args:
            x: (b, D), computed with in float32 at least.
            gather: the ranks that share the batch; not used in evaluation mode.
            relu: whether a ReLU follows.
            recipes: gets, in training mode, how the result is computed again.

        Returns:
            (b, D) float32, or wider if `x` is.
        """
        if not self.training:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            out = (x - self.running_mean) * (self.running_var + self.eps).rsqrt()
            out = out * self.weight + self.bias
            return F.relu(out) if relu else out
        with torch.no_grad():
            count, mean, variance = self._of_batch(x, gather)
            rate = (variance + self.eps).rsqrt()
            # Copies: under ZeRO-3 the parameters themselves are empty when a recipe is followed.
            shift = self.bias.to(mean.dtype, copy=True)
            recipe = Normalised(x.detach(), mean, rate * self.weight, shift, relu)
        if recipes is not None:
            recipes.append(recipe)
        return _Normalise.apply(x, self.weight, self.bias, recipe, rate, count, gather)

    def _of_batch(self, x: Tensor, gather: Gather) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, mean and variance (D,) of the global batch; also moves the running ones.

        Each rank adds its count, mean and squared deviations from that mean, combined as Chan,
        Golub and LeVeque do (1979): the difference of two large sums would lose the variance of
        channels that are far from 0.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        own = x.sum(0, dtype=wide) / max(len(x), 1)
        deviations = torch.zeros_like(own)
        for rows in pieces(x):
            deviations += torch.sub(x[rows], own).square_().sum(0)
        count = torch.full_like(own, len(x))
        every = gather.rows(torch.stack([count, own, deviations])[None], [1] * gather.world_size)
        counts, means, deviations = every.unbind(1)  # each (ranks, D)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        deviations = (deviations + counts * (means - mean).square()).sum(0)
        unbiased = deviations / (total - 1).clamp(min=1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return total, mean, deviations / total


class Mlp(nn.Module):
    """Linear layers with ReLU between them, and batch norms over ranks where asked for.

    Args:
        widths: of the input, of each hidden layer, and of the output.
        norm: a batch norm behind every linear layer but the last.
        last_norm: one behind the last, too.
    """

    def __init__(self, widths: Sequence[int], norm: bool = True, last_norm: bool = False) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairs)
        normed = [norm] * (len(pairs) - 1) + [last_norm]
        self.norms = nn.ModuleList(
            BatchNormOverRanks(layer.out_features) if wanted else nn.Identity()
            for layer, wanted in zip(self.layers, normed, strict=True)
        )

    def forward(self, x: Tensor, gather: Gather | None = None) -> Tensor:
        """Project features; collective in training mode if it has batch norms.

        Args:
            x: (b, W), cast to the weights' type before every linear layer.
            gather: the ranks that share the batch; not used without batch norms.

        Returns:
            (b, D) float32, or wider if the weights are, not normalised.
        """
        last, recipes = len(self.layers) - 1, []
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = x.to(layer.weight.dtype)
            with recipes.pop().instead_of(x) if recipes else contextlib.nullcontext():
                x = layer(x)
            if isinstance(norm, BatchNormOverRanks):
                x = norm(x, gather, number < last, recipes)
            elif number < last:
                x = F.relu(x)
        return x.to(torch.promote_types(x.dtype, torch.float32))
