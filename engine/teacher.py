"""The teacher of a method: an exponential moving average of the student, without gradient.

It is a copy of model and method whose parameters are registered as **buffers**. Hence they stay
float32 where DeepSpeed casts parameters to 16 bits (there an average that moves by a thousandth
would not move at all), ZeRO neither shards nor updates them, every rank holds them whole, and every
checkpoint has them. As frozen parameters they would be none of this.

It runs in evaluation mode: no dropout, no drop path, batch norms by their running statistics. So it
uses no random numbers, and a key does not depend on the other samples of its micro-batch.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from losses._queue import Queue

GROUP = 2**26  # elements of sharded weights that are whole on a rank at a time


class Teacher(nn.Module):
    """Average of a student's weights; starts as its copy.

    Args:
        model, method: of the student, in float32, before DeepSpeed takes them. They are copied;
            queues of the method are left out.

    Attributes:
        model, method: the copies, for `Method.targets`.
    """

    def __init__(self, model: nn.Module, method: nn.Module):
        super().__init__()
        self.model, self.method = copy.deepcopy(model), copy.deepcopy(method)
        for name, part in list(self.method.named_modules()):
            if isinstance(part, Queue):
                self.method.set_submodule(name, nn.Identity())
        averaged = [name for name, _ in self.named_parameters()]
        # Running statistics are averaged like the weights that they belong to. Masks with -inf are
        # constants.
        averaged += [
            name for name, buffer in self.named_buffers()
            if buffer.is_floating_point() and buffer.isfinite().all()
        ]  # fmt: skip
        _parameters_to_buffers(self)
        self.averaged = averaged
        self.train()

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in evaluation mode, whatever the module around it is switched to."""
        return super().train(False)

    @torch.no_grad()
    def update(self, student: nn.Module, decay: float) -> None:
        """average = decay * average + (1 - decay) * student; collective under ZeRO-3.

        Args:
            student: holds `model` and `method`. Its weights are those of the forward pass: under
                bf16 and fp16 the rounded ones, whose rounding errors the average evens out.
            decay: in [0, 1].
        """
        own = dict(self.named_buffers())
        theirs = {**dict(student.named_buffers()), **dict(student.named_parameters())}
        for names in _groups(self.averaged, theirs):
            sources = [theirs[name] for name in names]
            with whole(sources):
                now = [source.detach().float() for source in sources]
                torch._foreach_lerp_([own[name] for name in names], now, 1.0 - decay)


def _parameters_to_buffers(module: nn.Module) -> None:
    """Register every parameter of `module` as a buffer of the same name; shared ones stay so."""
    found: dict[int, Tensor] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            del part._parameters[name]
            part.register_buffer(name, found.setdefault(id(parameter), parameter.detach()))


def _groups(names: list[str], tensors: dict[str, Tensor]) -> Iterator[list[str]]:
    """`names` in pieces of at most GROUP elements, or of one tensor."""
    group, size = [], 0
    for name in names:
        # At stage 3 a tensor holds this rank's slice, and `ds_numel` says how large it is whole.
        count = getattr(tensors[name], "ds_numel", tensors[name].numel())
        if group and size + count > GROUP:
            yield group
            group, size = [], 0
        group.append(name)
        size += count
    if group:
        yield group


def whole(tensors: list[Tensor]) -> contextlib.AbstractContextManager:
    """Within it, weights that ZeRO-3 shards are whole; collective there."""
    sharded = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)
