"""The contrastive loss of a small batch on one GPU: one graph of kernels, not forty launches.

Up to ROWS rows the host takes longer to launch the loss than the device to compute it. So loss and
gradients are computed together, once, while CUDA records the kernels (`torch.cuda.CUDAGraph`), and
from then on all of them start with one call. A graph reads and writes memory of its own: inputs
are copied into it, and results out of it, so calls do not disturb each other. A graph is kept for
each shape and type, at most KEPT of them.
"""

from collections import OrderedDict

import torch
from torch import Tensor

from losses._block import Block, Classes, Walk, backend, of_classes, on_kernels
from losses._gather import Gather

ROWS = 4096
KEPT = 8


def fits(x: Tensor, gather: Gather) -> bool:
    """Whether `contrast` is for a batch like x (B, D): on one GPU, small, and not recorded by
    somebody else."""
    return (
        on_kernels(x)
        and gather.world_size == 1
        and 0 < len(x) <= ROWS
        and not torch.cuda.is_current_stream_capturing()
    )


def contrast(
    x: Tensor, y: Tensor, labels: Tensor, scale: Tensor, gather: Gather, walk: Walk
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, loss per sample (B,), positives (B,)) as `losses._core.contrast` has them."""
    return _Replayed.apply(x, y, scale, labels, gather, walk)


def value_and_gradients(
    x: Tensor, y: Tensor, labels: Tensor, scale: Tensor, gather: Gather, walk: Walk
) -> tuple[Tensor, ...]:
    """Loss, loss per sample and positives, and the gradients of the loss by x, y and scale.

    Args:
        x, y: (B, D) features. labels: (B,) int64. scale: () or (1,). gather: of a single rank.
    """
    block = Block(x, y, gather, walk, paired=True)
    ops, scale = of_classes(block.x), scale.to(block.dtype).reshape(())
    ids, counts = of_classes(labels).numbered(labels)
    classes = Classes(block, ids, counts)
    tiles = backend(block.x, block.y, scale, None, block.walk)
    row_lse, column_lse = tiles.forward()
    text_means = classes.text_means(block.y)
    positive = scale * ops.dots(block.x, text_means, classes.row_ids)
    sample_loss = 0.5 * (row_lse + column_lse) - positive
    half = torch.full_like(sample_loss, 0.5 / len(x))
    grads = tiles.backward(row_lse, column_lse, half, half)
    grads = classes.finish(block.x, text_means, -2 * half, scale, grads)
    return sample_loss.mean(), sample_loss, counts[ids], *grads


class _Recorded:
    """`value_and_gradients` for one shape, as a graph."""

    def __init__(self, values: list[Tensor], gather: Gather, walk: Walk):
        self.inputs = [value.detach().clone() for value in values]
        # Once outside, which compiles kernels and lets libraries take the memory they keep.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            value_and_gradients(*self.inputs, gather, walk)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads pin batches meanwhile, which only concerns them.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = value_and_gradients(*self.inputs, gather, walk)

    def __call__(self, values: list[Tensor]) -> list[Tensor]:
        torch._foreach_copy_(self.inputs, values)
        self.graph.replay()
        return [output.clone() for output in self.outputs]


_recorded: OrderedDict[tuple, _Recorded] = OrderedDict()


def _graph(values: list[Tensor], gather: Gather, walk: Walk) -> _Recorded:
    """The graph for such values; the one that was not used for the longest time makes room."""
    key = (walk.precision, *((value.shape, value.dtype, value.device) for value in values))
    if key not in _recorded:
        while len(_recorded) >= KEPT:
            _recorded.popitem(last=False)
        _recorded[key] = _Recorded(values, gather, walk)
    _recorded.move_to_end(key)
    return _recorded[key]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, labels, gather, walk):
        values = [x, y, labels, scale]
        loss, sample_loss, positives, *grads = _graph(values, gather, walk)(values)
        ctx.save_for_backward(*grads, scale)
        ctx.mark_non_differentiable(sample_loss, positives)
        return loss, sample_loss, positives

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_loss, *_):
        grad_x, grad_y, of_scale, scale = ctx.saved_tensors
        of_scale = (of_scale * of_loss).reshape(scale.shape)
        return grad_x * of_loss, grad_y * of_loss, of_scale, None, None, None
