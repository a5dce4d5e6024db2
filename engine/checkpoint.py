"""Checkpoints: DeepSpeed's own parts, plain weights beside them, and a pointer that never lies.

    RUN/checkpoints/step_0001000/{mp_rank_00_model_states.pt, …}   as DeepSpeed writes them
    RUN/checkpoints/step_0001000/model.safetensors                 whole weights, any ZeRO stage
    RUN/checkpoints/step_0001000/run.json                          step, ranks, what must not change
    RUN/checkpoints/step_0001000.universal/                        see engine/universal.py
    RUN/checkpoints/LAST_GOOD                                      name of the last complete one
    RUN/checkpoints/latest                                         the same, for DeepSpeed's tools

A checkpoint is written as `.step_0001000.tmp`, flushed to disk by all ranks, renamed, and only then
named by `LAST_GOOD`; an old one is renamed to `.step_0000500.old` before it is deleted. So whatever
is called `step_*` is complete at any moment, and a run that is cut off while saving continues from
the checkpoint before. What was left half-way is deleted by the next start or save.

`LAST_GOOD` may be set back by hand to an older checkpoint. Later ones then belong to an abandoned
attempt: the keep policy does not count them, they are overwritten when their step is reached, and
they are deleted when it is passed.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from engine import deepspeed_engine, disk, dist, universal
from loaders.errors import DataError
from models import unpickling

POINTER = "LAST_GOOD"
LEFT = ".step_*"  # what saves and deletions that were cut off leave behind


def last_good(folder: Path) -> Path | None:
    """Folder of the last complete checkpoint of a run, or None.

    Raises:
        DataError: the pointer names a folder that is not there.
    """
    pointer = folder / "checkpoints" / POINTER
    if not pointer.exists():
        return None
    target = pointer.parent / pointer.read_text().strip()
    if not (target / "run.json").exists():
        raise DataError(
            f"{pointer} names {target.name}, which is missing or incomplete; write the name of a "
            "complete step_* folder into it, or choose another --output-dir"
        )
    return target


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """What `run.json` of a checkpoint states.

    Raises:
        DataError: there is no such file, or it is not that of a checkpoint.
    """
    path = checkpoint / "run.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(facts["identity"], dict) and isinstance(facts["step"], int):
            return facts
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise DataError(f"{path} is not that of a checkpoint of this program")


def check_space(engine, folder: Path) -> None:
    """Clear what killed saves left, and refuse a disk without room for a checkpoint; collective.

    Raises:
        DataError: there is too little room; it states the bytes needed and free. Quotas are not
            seen.
    """
    root = folder / "checkpoints"
    if dist.rank() == 0:
        disk.clear(root, LEFT)
    dist.barrier()
    needed, free = size(engine), disk.free(root)
    if dist.max_over_ranks(int(free < needed), engine.device):
        raise DataError(
            f"{root}: a checkpoint needs about {disk.gigabytes(needed)}, but only "
            f"{disk.gigabytes(free)} are free; make room, or choose another --output-dir"
        )


def size(engine) -> int:
    """Roughly the bytes that all ranks write for a checkpoint (measured with DeepSpeed 0.19.8).

    The weights are written twice, as `model.safetensors` and, except at stage 3, in DeepSpeed's
    parts. A trained parameter takes 12 bytes more: a float32 copy, which float32 weights of stage 0
    do not have, and the moments of AdamW.
    """
    stage = engine.zero_optimization_stage()
    total = 0
    for parameter in engine.module.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())  # stage 3 keeps a slice
        copied = stage > 0 or parameter.element_size() < 4
        states = (12 if copied else 8) if parameter.requires_grad else 0
        total += count * ((1 if stage == 3 else 2) * parameter.element_size() + states)
    return total + 2 * sum(b.numel() * b.element_size() for b in engine.module.buffers())


def save(engine, folder: Path, step: int, identity: dict[str, Any], keep_last: int) -> Path:
    """Save after `step` steps; collective over all ranks.

    Args:
        engine: the DeepSpeed engine. folder: the run folder.
        step: must be more than that of `LAST_GOOD`.
        identity: what a continuation must have in common with this run.
        keep_last: how many complete checkpoints to keep.

    Returns:
        The checkpoint's folder.

    Raises:
        DataError: on all ranks if any of them cannot write, say on a full disk. `LAST_GOOD`
            stays as it was, and half-written files are removed.
    """
    root = folder / "checkpoints"
    target = root / f"step_{step:07d}"
    scratch = root / f".{target.name}.tmp"
    attempt = disk.Attempt(engine.device)
    with attempt.noted():
        if dist.rank() == 0:
            disk.clear(root, LEFT)
            scratch.mkdir(parents=True)
    _refuse(engine, attempt, target)
    facts: dict[str, Any] = {"step": step}
    if engine.zero_optimization_stage() == 0:  # says whose state is which, for other stages
        facts["unicl_parameter_order"] = universal.parameter_order(engine)
    with disk.flushing(engine, attempt):
        engine.save_checkpoint(str(root), tag=scratch.name, client_state=facts, save_latest=False)
    weights = {
        name: whole for name, whole in deepspeed_engine.full_state(engine) if dist.rank() == 0
    }
    with attempt.noted():
        if dist.rank() == 0:
            save_file(weights, scratch / "model.safetensors", metadata={"format": "pt"})
            _write_facts(engine, scratch / "run.json", step, identity)
            for path in (scratch / "model.safetensors", scratch / "run.json", scratch):
                disk.flush(path)
    _refuse(engine, attempt, target)  # at this point all ranks have finished, too
    with attempt.noted():
        if dist.rank() == 0:
            _publish(scratch, target, keep_last)
    _refuse(engine, attempt, target)
    return target


def load(engine, checkpoint: Path, identity: dict[str, Any]) -> int:
    """Restore weights, optimizer and step; returns the number of steps done. Collective.

    A checkpoint of another number of ranks or ZeRO stage is converted first, and so is one whose
    parameters lie back to back in the flat buffers of stages 1 and 2, as earlier versions wrote it.

    Raises:
        DataError: the checkpoint belongs to another configuration (every difference is named),
            or DeepSpeed cannot read it.
    """
    facts = read_facts(checkpoint)
    check_identity(facts, identity, checkpoint)
    written = (facts["zero_stage"], facts.get("parameter_alignment", False))
    same = (facts["world_size"], written) == (dist.world_size(), deepspeed_engine.layout(engine))
    # DeepSpeed restores the checkpoint's decay and betas, but those of this configuration hold.
    asked = [{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.param_groups]
    # DeepSpeed's own torch.load would run whatever a pickle asks for.
    with unpickling.plain_data_only(checkpoint, deepspeed_engine.checkpoint_classes()):
        if not same:
            converted = universal.convert(checkpoint, facts["zero_stage"], engine.device)
            universal.load(engine, checkpoint, converted)
            return int(facts["step"])
        path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise DataError(f"DeepSpeed could not read {checkpoint}; see its message above")
    for group, options in zip(engine.optimizer.param_groups, asked, strict=True):
        group.update(options)
    return int(facts["step"])


def check_identity(facts: dict[str, Any], identity: dict[str, Any], checkpoint: Path) -> None:
    """Refuse to continue a checkpoint under another configuration.

    Only keys that both have are compared, because versions of this program differ in their keys.

    Raises:
        DataError: names each key that differs, with both values.
    """
    before = facts["identity"]
    different = [
        f"{key}: checkpoint {before[key]!r}, now {identity[key]!r}"
        for key in sorted(before.keys() & identity.keys())
        if before[key] != identity[key]
    ]
    if different:
        raise DataError(
            f"{checkpoint} belongs to another configuration; restore it or choose another "
            "--output-dir. Different: " + "; ".join(different)
        )


def _write_facts(engine, path: Path, step: int, identity: dict[str, Any]) -> None:
    stage, aligned = deepspeed_engine.layout(engine)
    facts = {
        "step": step,
        "samples": step * identity["train.global_batch"],
        "world_size": dist.world_size(),
        "zero_stage": stage,
        "parameter_alignment": aligned,
        "identity": identity,
    }
    path.write_text(json.dumps(facts, indent=1) + "\n")


def _refuse(engine, attempt: disk.Attempt, target: Path) -> None:
    """Raise on all ranks what any of them noted; collective."""
    failure = attempt.agree()
    if failure is None:
        return
    root = target.parent
    if dist.rank() == 0:
        disk.clear(root, LEFT)
    dist.barrier()
    pointer = root / POINTER
    kept = (
        f"{POINTER} is kept and names {pointer.read_text().strip()}"
        if pointer.exists()
        else "there is no earlier checkpoint"
    )
    raise DataError(
        f"checkpoint {target} could not be written ({failure}). A checkpoint needs about "
        f"{disk.gigabytes(size(engine))}; {disk.gigabytes(disk.free(root))} are free now that its "
        f"half-written files are removed. {kept}. Make room and run the same command again"
    )


def _publish(scratch: Path, target: Path, keep_last: int) -> None:
    """Give a finished checkpoint its name, point to it, and delete what is no longer needed."""
    root, before = target.parent, None
    if (root / POINTER).exists():
        last = root / (root / POINTER).read_text().strip()
        before = json.loads((last / "run.json").read_text())["step"]
    if target.exists():
        disk.discard(target)
    os.replace(scratch, target)
    disk.flush(root)
    for pointer in (POINTER, "latest"):
        disk.write_line(root / pointer, target.name)
    _prune(target, before, keep_last)


def _prune(newest: Path, before: int | None, keep_last: int) -> None:
    """Delete the oldest checkpoints up to `newest`, which `LAST_GOOD` names.

    Args:
        before: the step that `LAST_GOOD` named until now. Between the two lies only what an
            abandoned attempt left.
    """
    steps = {}
    for path in newest.parent.glob("step_*/run.json"):
        number = path.parent.name.removeprefix("step_")
        if number.isdigit():  # a copy made by hand under another name is not ours
            steps[int(number)] = path.parent
    now = int(newest.name.removeprefix("step_"))
    line = [now]
    if before is not None:
        line = sorted(step for step in steps if step <= before and step != now) + line
        for step in steps:
            if before < step < now:
                disk.discard(steps[step])
    for step in line[:-keep_last]:
        disk.discard(steps[step])
    for converted in newest.parent.glob(f"step_*{universal.ENDING}"):
        disk.discard(converted)  # nobody needs it: a newer checkpoint is complete
