"""Checkpoints: DeepSpeed's own parts, plain weights beside them, and a pointer that never lies.

    RUN/checkpoints/step_0001000/{mp_rank_00_model_states.pt, …}   as DeepSpeed writes them
    RUN/checkpoints/step_0001000/model.safetensors                 whole weights, any ZeRO stage
    RUN/checkpoints/step_0001000/run.json                          step, ranks, what must not change
    RUN/checkpoints/step_0001000.universal/                        see engine/universal.py
    RUN/checkpoints/LAST_GOOD                                      name of the last complete one

`LAST_GOOD` is replaced atomically after all ranks have finished, so a run that is cut off while
saving continues from the one before.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from engine import dist, ds, universal
from loaders.errors import DataError
from models import weight_files

POINTER = "LAST_GOOD"


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


def save(engine, folder: Path, step: int, identity: dict[str, Any], keep_last: int) -> Path:
    """Save after `step` steps; collective over all ranks.

    Args:
        engine: the DeepSpeed engine. folder: the run folder.
        identity: what a continuation must have in common with this run.
        keep_last: complete checkpoints to keep.

    Returns:
        The checkpoint's folder.
    """
    root = folder / "checkpoints"
    target = root / f"step_{step:07d}"
    facts: dict[str, Any] = {"step": step}
    if engine.zero_optimization_stage() == 0:  # which state is whose, to continue elsewhere
        facts["unicl_parameter_order"] = universal.parameter_order(engine)
    engine.save_checkpoint(str(root), tag=target.name, client_state=facts)
    weights = dict(ds.full_state(engine))
    if dist.rank() == 0:
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        facts = {
            "step": step,
            "samples": step * identity["train.global_batch"],
            "world_size": dist.world_size(),
            "zero_stage": engine.zero_optimization_stage(),
            "identity": identity,
        }
        (target / "run.json").write_text(json.dumps(facts, indent=1) + "\n")
    dist.barrier()
    if dist.rank() == 0:
        scratch = root / f".{POINTER}.tmp"
        with scratch.open("w") as file:
            file.write(target.name + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, root / POINTER)
        _prune(root, target, keep_last)
    dist.barrier()
    return target


def load(engine, checkpoint: Path, identity: dict[str, Any]) -> int:
    """Restore weights, optimizer and step; returns the number of steps done. Collective.

    A checkpoint of another number of ranks or ZeRO stage is converted first.

    Raises:
        DataError: the checkpoint belongs to another configuration (every difference is named),
            or DeepSpeed cannot read it.
    """
    facts = json.loads((checkpoint / "run.json").read_text())
    check_identity(facts, identity, checkpoint)
    here = (dist.world_size(), engine.zero_optimization_stage())
    # DeepSpeed's own torch.load would run whatever a pickle asks for.
    with weight_files.plain_data_only(checkpoint, ds.checkpoint_classes()):
        if (facts["world_size"], facts["zero_stage"]) != here:
            converted = universal.convert(checkpoint, facts["zero_stage"])
            universal.load(engine, checkpoint, converted)
            return int(facts["step"])
        path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise DataError(f"DeepSpeed could not read {checkpoint}; see its message above")
    return int(facts["step"])


def check_identity(facts: dict[str, Any], identity: dict[str, Any], checkpoint: Path) -> None:
    """Refuse to continue a checkpoint under another configuration.

    Raises:
        DataError: names each key that differs, with both values.
    """
    before = facts["identity"]
    different = [
        f"{key}: checkpoint {before.get(key)!r}, now {identity.get(key)!r}"
        for key in sorted({*before, *identity})
        if before.get(key) != identity.get(key)
    ]
    if different:
        raise DataError(
            f"{checkpoint} belongs to another configuration; restore it or choose another "
            "--output-dir. Different: " + "; ".join(different)
        )


def _prune(root: Path, newest: Path, keep_last: int) -> None:
    """Delete the oldest complete checkpoints; never the one that LAST_GOOD names."""
    complete = sorted(p.parent for p in root.glob("step_*/run.json"))
    for old in complete[:-keep_last]:
        if old != newest:
            shutil.rmtree(old)
    for converted in root.glob(f"*{universal.ENDING}"):
        shutil.rmtree(converted)  # it has served: a newer checkpoint is complete
