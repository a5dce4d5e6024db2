"""What is changed of DeepSpeed 0.19.8 from outside, beside `deepspeed_engine._aligning_optimizer`.

**The update under ZeRO 1 and 2** has fewer launches and, on a GPU, no wait. DeepSpeed looks at
every gradient with seven operators for what is not finite and with two for its norm: for Swin-T and
a text transformer that is some thousands of launches in every step, during which a GPU has nothing
to do. Then it asks on the host whether the step counts. Here

* one operator takes the norms of all gradients, and what is not finite shows in their sum, where
  DeepSpeed looks for it as well;
* without a loss scale to be halved, and with torch's fused AdamW, the device itself leaves out a
  step that does not count: `found_inf`, made for torch's own loss scaling. The host learns of it
  from the norm, a step later.

The update is the same, except for the last bits of the norm.

**Whole parameters under ZeRO 3** start on 16-byte lines on a single rank, too.
"""

from collections.abc import Iterable
from unittest import mock

import torch
from torch import Tensor


def shorten(engine) -> None:
    """Change the optimizer of an engine in place, if it is that of stage 1 or 2 on one device."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = engine.optimizer
    if type(optimizer) is not DeepSpeedZeroOptimizer or optimizer.cpu_offload:
        return
    optimizer.check_overflow = lambda partition_gradients=True: None  # the norm tells

    def norm(gradients: Iterable[Tensor], params: list[Tensor], norm_type: float = 2) -> Tensor:
        return _norm(optimizer, gradients, params)

    optimizer.get_grad_norm_direct = norm
    fused = bool(optimizer.optimizer.defaults.get("fused"))
    if fused and optimizer.loss_scale == 1.0 and not optimizer.dynamic_loss_scale:
        _skip_on_device(optimizer)


def _norm(optimizer, gradients: Iterable[Tensor], params: list[Tensor]) -> Tensor:
    """l2 norm of a group's gradients over all ranks, as a scalar; -1 if it is not finite."""
    from deepspeed import comm

    own = [g for g in gradients if not getattr(g, "_zero_padding", False)][: len(params)]
    total = torch.zeros((), dtype=torch.float32, device=optimizer.device)
    if own:
        norms = torch._foreach_norm([g.detach() for g in own], 2, torch.float32)
        total = torch.stack(norms).square().sum()
    comm.all_reduce(total, op=comm.ReduceOp.SUM, group=optimizer.dp_process_group)
    total = total.sqrt()
    return total.masked_fill_(~total.isfinite(), -1.0)


def _skip_on_device(optimizer) -> None:
    """Let the fused update leave out steps whose norm is not finite, and the host not ask."""
    from deepspeed.runtime.zero import stage_1_and_2

    checks = optimizer.dtype != torch.bfloat16 or optimizer.check_grad_overflow
    norm, step = optimizer.scaled_global_norm, optimizer.step

    def measured(norm_type: float = 2) -> Tensor:
        total = norm(norm_type)
        if checks:
            optimizer.optimizer.found_inf = (~total.isfinite()).float()
        return total

    def stepping(closure=None) -> None:
        # Here it would be asked of the host, for the step and again for clipping.
        with mock.patch.object(stage_1_and_2, "is_invalid_grad_norm", return_value=False):
            step(closure)

    optimizer.scaled_global_norm, optimizer.step = measured, stepping


def align_whole_parameters() -> None:
    """Let a single rank's parameters start on 16-byte lines under stage 3, too.

    With several ranks a parameter is put together in memory of its own before its module runs. With
    one, DeepSpeed 0.19.8 takes it from the flat buffer as it lies there.
    """
    from deepspeed.runtime.zero import partition_parameters

    for name in ("NoGatherHandle", "NoGatherCoalescedHandle"):
        handle = getattr(partition_parameters, name)
        if not hasattr(handle, "unaligned"):
            handle.unaligned = handle.__init__
            handle.__init__ = _aligning


def _aligning(handle, found) -> None:
    """Constructor of DeepSpeed's handles of one parameter or a list of them."""
    handle.unaligned(found)
    for parameter in found if isinstance(found, list) else [found]:
        if parameter.data_ptr() % 16:
            parameter.data = parameter.data.clone()
