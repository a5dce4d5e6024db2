"""What makes two starts the same run: everything that decides a sample or an update.

A key of the configuration that is named in neither table below may not change between a checkpoint
and its continuation, so a key that is new, or that somebody forgets here, is compared.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from engine.config import RunConfig

# Decide neither a sample nor an update.
FREE = {
    "name": "what the run is called",
    "output_dir": "where it lies",
    "recipe": "whose values these are; the values themselves are compared",
    "deepspeed": "the name of a file, whose content is compared key by key",
    "data.image_label": "the tars are compared by names, sizes and counts, wherever they lie",
    "data.image_text": "as data.image_label",
    "model.reference.folder": "compared by its checksum, wherever it lies",
    "data.workers": "all randomness of a sample follows from seed, step and position",
    "data.max_bad_fraction": "when to give up",
    "train.accumulation": "the update is that of the whole batch",
    "train.grad_checkpointing": "the same activations, computed again",
    "train.compile": "the same step by other kernels",
    "train.graph_memory_gb": "the same gradient, encoded once or twice",
    "train.max_nonfinite_windows": "when to give up",
    "log": "what is written about the run",
    "evals": "read a checkpoint and change nothing in the run",
    "timeout_minutes": "when to give up",
}
# Decide updates, and may change from some step on; RUN/environment.json keeps from which.
CHANGEABLE = {
    "train.epochs": "a run may be made longer",
    "train.samples": "as train.epochs",
    "train.steps": "as train.epochs",
    "train.epoch_samples": "a unit of length",
    "optim": "rates and decay are given anew at each step; the averages of AdamW go on",
}
# Of a DeepSpeed configuration: how the same update is computed.
FREE_DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "follows from ranks and train.accumulation",
    "gradient_accumulation_steps": "as train.accumulation",
    "zero_optimization": "where states lie",
    "zero_force_ds_cpu_optimizer": "where states lie",
    "zero_allow_untested_optimizer": "a check",
    "steps_per_print": "what is printed",
    "wall_clock_breakdown": "what is printed",
}


def facts(cfg: dict[str, Any], data: dict[str, str]) -> dict[str, Any]:
    """What a continuation must have in common with its checkpoint, as JSON keeps it.

    Args:
        cfg: the resolved configuration. data: fingerprint of each source by name.
    """
    kept = {
        key: value
        for key, value in _keys(cfg)
        if not _named(key, FREE) and not _named(key, CHANGEABLE)
    }
    return json.loads(json.dumps({**kept, "data": data}))


def is_free(key: str) -> bool:
    """Whether a key of `flat` decides neither a sample nor an update."""
    if key == "ranks":
        return True
    if key.startswith("ds_config.json: "):
        return _named(key.removeprefix("ds_config.json: "), FREE_DEEPSPEED)
    return _named(key, FREE)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of everything that is no mapping, or an empty one."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _keys(cfg: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys of the sections whose keys are known, and whole `model` and `loss`."""
    sections = {f.name for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(f.type)}
    for name, value in cfg.items():
        if name in sections:
            yield from ((f"{name}.{key}", item) for key, item in value.items())
        else:
            yield name, value


def _named(key: str, table: dict[str, str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in table)
