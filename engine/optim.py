"""AdamW in two groups: no weight decay for 1-d and listed parameters."""

import torch
from omegaconf import DictConfig
from torch import nn


def parameter_groups(model: nn.Module, method: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups, decayed and not.

    Without decay: parameters of at most one dimension (biases, norms, `logit_scale`) and the
    names that `model.no_weight_decay()` lists. Parameters that need no gradient are left out.
    """
    listed = {f"model.{name}" for name in model.no_weight_decay()}
    decayed, kept = [], []
    for prefix, module in (("model", model), ("method", method)):
        for name, parameter in module.named_parameters(prefix=prefix):
            if parameter.requires_grad:
                free = parameter.ndim <= 1 or name in listed
                (kept if free else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build(
    model: nn.Module, method: nn.Module, cfg: DictConfig, fused: bool = False
) -> torch.optim.Optimizer:
    """torch's AdamW; its rate is set before every step by `engine.schedule`.

    Args:
        fused: one kernel for all of an update, instead of a pass over memory for each of its
            operations; for GPUs. Its last bits are not those of the plain form.
    """
    groups = parameter_groups(model, method, cfg.weight_decay)
    options = {"lr": cfg.lr, "betas": tuple(cfg.betas), "eps": cfg.eps}
    return torch.optim.AdamW(groups, **options, fused=fused or None)


def after_loading(optimizer) -> None:
    """Put an optimizer's state where its form of update wants it, once a checkpoint was read.

    A checkpoint may come from another kind of device. Fused updates count their steps beside the
    weights, plain ones on the host, for which a count on a GPU would be waited for.

    Args:
        optimizer: the engine's, around that of `build`.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    fused = inner.defaults.get("fused")
    for group in inner.param_groups:
        group["fused"] = fused
        for parameter in group["params"]:
            state = inner.state.get(parameter, {})
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].to(parameter.device if fused else "cpu")
