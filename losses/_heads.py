"""Projection and prediction heads, with batch norms over the global batch.

A head with batch norms runs in `Method.loss`, where all features of the global batch are at hand,
and not in `encode`, which sees a micro-batch. So its statistics do not depend on ranks or
accumulation, and gradient caching stays exact. (torch's SyncBatchNorm joins ranks, but not
micro-batches, and works on accelerators only.)
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses._gather import Gather


class BatchNormOverRanks(nn.Module):
    """`nn.BatchNorm1d` whose batch is that of all ranks, of equal or unequal shares.

    Args:
        width: D, the number of channels. eps, momentum: as in `nn.BatchNorm1d`.
        affine: whether it has a weight and a bias.

    Attributes:
        running_mean, running_var: (D,) float32 buffers that evaluation mode uses.
    """

    def __init__(
        self, width: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True
    ) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor, gather: Gather | None = None) -> Tensor:
        """Normalise over the rows of all ranks; collective in training mode.

        Args:
            x: (b, D), computed with in float32 at least.
            gather: the ranks that share the batch; not used in evaluation mode.

        Returns:
            (b, D) float32, or wider if `x` is.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training:
            mean, variance = self._of_batch(x, gather)
        else:
            mean, variance = self.running_mean, self.running_var
        out = (x - mean) * (variance + self.eps).rsqrt()
        return out if self.weight is None else out * self.weight + self.bias

    def _of_batch(self, x: Tensor, gather: Gather) -> tuple[Tensor, Tensor]:
        """Mean and variance (D,) of the global batch; also moves the running ones.

        Each rank adds its count, mean and squared deviations from that mean, combined as Chan,
        Golub and LeVeque do (1979): the difference of two large sums would lose the variance of
        channels that are far from 0.
        """
        own = x.sum(0) / max(len(x), 1)
        deviations = (x - own).square().sum(0)
        count = torch.full_like(own, len(x))
        every = gather.rows(torch.stack([count, own, deviations])[None], [1] * gather.world_size)
        counts, means, deviations = every.unbind(1)  # each (ranks, D)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        deviations = (deviations + counts * (means - mean).square()).sum(0)
        with torch.no_grad():
            unbiased = deviations / (total - 1).clamp(min=1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean, deviations / total


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
        last = len(self.layers) - 1
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = layer(x.to(layer.weight.dtype))
            x = norm(x, gather) if isinstance(norm, BatchNormOverRanks) else norm(x)
            x = F.relu(x) if number < last else x
        return x.to(torch.promote_types(x.dtype, torch.float32))
