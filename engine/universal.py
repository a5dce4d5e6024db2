"""Continue at another number of ranks or ZeRO stage, through DeepSpeed's universal layout.

    step_0001000.universal/zero/PARAMETER/{fp32,exp_avg,exp_avg_sq,step}.pt
    step_0001000.universal/zero/optimizer_state.pt

DeepSpeed 0.19.8 converts its ZeRO 1, 2 and 3 checkpoints (`ds_to_universal`), but loads the
result only into the same family of stages: stage 3 names its files and states otherwise than 1 and
2, and stage 0 has neither a converter nor a loader. So the converted files are brought to one form
here, which the optimizers of stages 1, 2 and 3 read themselves, and stage 0 is done by hand.
Weights, moments, step count, buffers and what a method keeps (queues, temperatures) all survive.
"""

import contextlib
import io
import math
import os
import shutil
from argparse import Namespace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from engine import disk, dist
from loaders.errors import DataError

ENDING = ".universal"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def convert(checkpoint: Path, stage: int, device: torch.device) -> Path:
    """The universal form of a checkpoint that was written at ZeRO `stage`; collective.

    Rank 0 makes it once, under another name, flushes it and renames it, so that a kill leaves
    nothing half-done under its final name.

    Raises:
        DataError: on all ranks, if rank 0 cannot write, say on a full disk.
    """
    target = checkpoint.with_name(checkpoint.name + ENDING)
    scratch = target.with_name(f".{target.name}.tmp")
    attempt = disk.Attempt(device)
    with attempt.noted():
        if dist.rank() == 0 and not target.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
            (scratch / "zero").mkdir(parents=True)
            if stage == 0:
                _convert_unsharded(checkpoint, scratch)
            else:
                _convert_sharded(checkpoint, scratch)
            for path in (*scratch.rglob("*"), scratch):
                disk.flush(path)
            os.replace(scratch, target)
    failure = attempt.agree()
    if failure:
        if dist.rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
        dist.barrier()
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        raise DataError(
            f"{checkpoint} could not be converted for another number of ranks or ZeRO stage "
            f"({failure}). That needs up to {disk.gigabytes(2 * size)}; "
            f"{disk.gigabytes(disk.free(checkpoint))} are free. The checkpoint itself is not "
            "touched: make room and run the same command again"
        )
    return target


def load(engine, checkpoint: Path, universal: Path) -> None:
    """Put weights, buffers and optimizer state of a universal checkpoint into any engine.

    Args:
        engine: a DeepSpeed engine at any ZeRO stage and number of ranks.
        checkpoint: the original, whose `model.safetensors` holds weights and buffers.
        universal: what `convert` returned.
    """
    stage = engine.zero_optimization_stage()
    _load_module(engine, load_file(checkpoint / "model.safetensors"), sharded=stage == 3)
    if hasattr(engine.optimizer, "load_hp_checkpoint_state_from_checkpoint_dir"):
        engine.optimizer.load_state_dict(None, checkpoint_folder=str(universal))
        if stage < 3:
            engine.optimizer.update_lp_params()
        else:
            # DeepSpeed hands one step tensor to all groups, and each would count it up.
            for state in engine.optimizer.optimizer.state.values():
                state["step"] = torch.as_tensor(state["step"]).clone()
    else:
        _load_unsharded(engine, universal)


def _load_module(engine, state: dict[str, torch.Tensor], sharded: bool) -> None:
    if not sharded:
        engine.module.load_state_dict(state)
        return
    import deepspeed

    # Sharded parameters come from the optimizer's copies. It has no copies of frozen ones, so these
    # are read here, and so are buffers, which are whole on every rank.
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if dist.rank() == 0:
                        parameter.copy_(state[name])
    for name, buffer in engine.module.named_buffers():
        if name in state:
            buffer.copy_(state[name])


def _convert_sharded(checkpoint: Path, target: Path) -> None:
    """Run DeepSpeed's converter, then bring its files to one form for all stages."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = Namespace(
        input_folder=str(checkpoint),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # stages 1 and 2 lack it
    )
    latest = checkpoint.parent / "latest_universal"
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(arguments)
    latest.unlink(missing_ok=True)  # a second pointer, to a name that no longer exists
    optimizer = torch.load(target / "zero" / "optimizer_state.pt", weights_only=False)
    inner = optimizer.get("optimizer_state_dict", {}).get("state", {})
    step = inner[0]["step"] if inner else None  # stage 3 keeps it in one place
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        for folder in sorted((target / "zero").iterdir()):
            if folder.is_dir():
                shape = weights.get_slice(folder.name).get_shape()
                _one_form(folder, step, shape)
                if step is None and (folder / "step.pt").exists():  # buffers have none
                    step = torch.load(folder / "step.pt", weights_only=False)
    _write_global_state(target, optimizer, step)


def _one_form(folder: Path, step, shape: list[int]) -> None:
    """Make dictionaries with a tensor of the weight's shape; stage 3 leaves bare flat tensors."""
    for path in folder.glob("*.pt"):
        content = torch.load(path, weights_only=False)
        if path.stem != "step":
            tensor = content["param"] if isinstance(content, dict) else content
            tensor = tensor.detach().reshape(-1)[: math.prod(shape)].reshape(shape)
            torch.save({"param": tensor.clone(), "cat_dim": 0}, path)
    if not (folder / "step.pt").exists() and (folder / "exp_avg.pt").exists():
        torch.save(step, folder / "step.pt")


def _write_global_state(target: Path, state: dict, step) -> None:
    """What the optimizers of stages 1 and 2 and of stage 3 look for, in one file."""
    import deepspeed

    kept = {k: state[k] for k in ("loss_scaler", "dynamic_loss_scale") if k in state}
    state = {
        **kept,
        "overflow": False,
        "ds_version": deepspeed.__version__,
        # Hyper-parameters are left out: the configuration that continues gives them.
        "param_groups": [{}] * 64,
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [{}]},
    }
    torch.save(state, target / "zero" / "optimizer_state.pt")


def _convert_unsharded(checkpoint: Path, target: Path) -> None:
    """Stage 0: the whole optimizer lies in the model file, its states in the order of groups."""
    file = torch.load(
        checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False
    )
    names, optimizer = file["unicl_parameter_order"], file["optimizer"]
    if "fp32_groups" in optimizer:  # of 16-bit weights it keeps float32 copies
        copies = [copy for group in optimizer["fp32_groups"] for copy in group]
        states = optimizer["optimizer_state_dict"]["state"]
    else:
        copies, states = [file["module"][name] for name in names], optimizer["state"]
    step = None
    for number, name in enumerate(names):
        folder = target / "zero" / name
        folder.mkdir()
        weight = copies[number].detach().float()
        torch.save({"param": weight, "cat_dim": 0}, folder / "fp32.pt")
        for key in _MOMENTS:
            torch.save({"param": states[number][key], "cat_dim": 0}, folder / f"{key}.pt")
        step = states[number]["step"]
        torch.save(step, folder / "step.pt")
    _write_global_state(target, {}, step)


def _load_unsharded(engine, universal: Path) -> None:
    trained = [p for group in engine.optimizer.param_groups for p in group["params"]]
    weights = dict(engine.module.named_parameters())
    with torch.no_grad():
        # The same tensors, or float32 copies of 16-bit weights.
        for name, parameter in zip(parameter_order(engine), trained, strict=True):
            folder = universal / "zero" / name
            read = {
                key: torch.load(folder / f"{key}.pt", weights_only=False)
                for key in ("fp32", *_MOMENTS, "step")
            }
            parameter.copy_(read["fp32"]["param"])
            weights[name].copy_(parameter)
            state = {
                key: read[key]["param"].to(parameter.device, torch.float32) for key in _MOMENTS
            }
            step = torch.as_tensor(read["step"], dtype=torch.float32)
            engine.optimizer.state[parameter] = {"step": step, **state}


def parameter_order(engine) -> list[str]:
    """Names of the parameters in the order in which stage 0's optimizer numbers its states."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    groups = getattr(engine.optimizer, "fp16_groups", None)  # bfloat16 as well
    groups = groups or [group["params"] for group in engine.optimizer.param_groups]
    return [names[parameter] for group in groups for parameter in group]
