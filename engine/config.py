"""The configuration of a run: one YAML file, a chain of parents, `key.sub=value` overrides.

A file may name a parent with `base: other.yaml` (relative to itself); later values win. Every key
is checked: an unknown one is an error that names the nearest. `model:` and `loss:` are checked by
`models.config` and by the method's own `Config`, and what values may be is in
`engine.config_rules`. A null in a key of its `DECISIONS` means that nobody has decided yet; such a
configuration is refused with the list of all its open keys.

A text is taken as it was typed (`engine/config_text.py`). A relative path in a file is looked for
in the current folder, then beside the file, then in the root of this repository; one that was typed
in the current folder alone. `~` at the start of a path is the home folder
(`engine/config_paths.py`).
"""

import difflib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from engine import config_layers, config_paths, config_rules
from loaders.errors import ConfigError


@dataclass
class DataConfig:
    """What is read. `image_label` and `image_text` are shard specifications (a folder, a brace
    range, a glob, several joined by `::`), one or a list; each entry is one source."""

    image_label: Any = None
    image_text: Any = None
    sampler: str = "balanced"  # balanced | proportional | ratio | one_source
    ratios: dict[str, int] | None = None  # share of each source by name: `ratio`, `one_source`
    block_shards: int = 16  # shards whose samples are shuffled together
    label_merge: str = "disjoint"  # disjoint | synset
    caption_labels: str = "unique"  # unique | by_text (equal captions are positives)
    caption: Any = "txt"  # txt | json.KEY, or text view -> loaders/caption_recipes.py
    templates: str | None = "unicl_81"  # preset of prompts/templates.json, or a file
    augmentation: Any = "paper"  # recipe of loaders/views.py, or image view -> recipe
    workers: int = 4  # per rank
    max_bad_fraction: float = 0.01  # more unreadable samples than this end the run


@dataclass
class TrainConfig:
    """How much, and in what pieces. Exactly one of `epochs`, `samples`, `steps`."""

    global_batch: int | None = 4096
    accumulation: int = 1  # micro-batches per rank and step; the update does not depend on it
    epochs: float | None = None
    samples: int | None = None
    steps: int | None = None
    epoch_samples: int | None = None  # samples of an epoch; null: all samples of all sources
    grad_checkpointing: bool = False
    compile: bool = False  # torch.compile of the towers; not with ZeRO-3
    # With accumulation, memory of a rank (GB) for micro-batches that are not encoded twice; one
    # never is. Not with ZeRO-3.
    graph_memory_gb: float = 0.0
    # Logged windows in a row with a loss or gradient that is NaN or infinite before the run ends.
    # One may be a single batch whose update DeepSpeed skipped; three in a row do not pass by
    # themselves. Weights that are not finite end the run at once.
    max_nonfinite_windows: int = 3


@dataclass
class OptimConfig:
    """AdamW. The three rates are multiplied by global_batch / lr_batch when lr_batch is set.
    Exactly one of `warmup_epochs` and `warmup_steps`; 0 is none."""

    lr: float | None = 5e-4
    warmup_lr: float | None = 5e-7
    min_lr: float | None = 5e-6
    lr_batch: int | None = None
    betas: tuple[float, float] | None = (0.9, 0.999)
    eps: float | None = 1e-8
    weight_decay: float | None = 0.1
    grad_clip_norm: float | None = 0.0  # 0: none. DeepSpeed never decides this.
    schedule: str | None = "cosine"  # cosine | constant
    warmup_epochs: float | None = None
    warmup_steps: int | None = None


@dataclass
class LogConfig:
    """Console line, metrics.jsonl and checkpoints, in optimizer steps; where else to log."""

    every_steps: int = 10
    save_every_steps: int = 1000
    keep_last: int = 2
    report_to: Any = None  # wandb,tensorboard or one of them: mirrors of metrics.jsonl
    wandb_project: str = "unicl"


@dataclass
class EvalsConfig:
    """Evaluation of the checkpoint every so many steps: task -> data sets or collections of
    `eval/datasets.yaml`. Each evaluated step is saved."""

    every_steps: int | None = None  # null: never
    tasks: dict[str, list[str]] = field(default_factory=dict)  # zero_shot | retrieval | knn


@dataclass
class RunConfig:
    """Everything that decides a run; saved as `config.yaml` in the run folder."""

    name: str = "run"
    output_dir: str = "runs/${name}"
    recipe: str | None = "ours"  # whose training values these are: paper | release_defaults | ours
    seed: int = 0
    deepspeed: str = "ds_configs/zero1_bf16.json"
    loss: dict[str, Any] = field(default_factory=lambda: {"name": "unicl"})
    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    evals: EvalsConfig = field(default_factory=EvalsConfig)
    timeout_minutes: float = 30  # of a collective operation; half of it for a batch of data


# A list where the model expects a number, say; sections without types come as they are.
_WRONG_KINDS = OmegaConfBaseException, OverflowError, TypeError, ValueError, RecursionError


def load(path: str | Path, overrides: Sequence[str] = (), need_data: bool = False) -> DictConfig:
    """Read a configuration file with its parents and apply overrides.

    Args:
        path: a YAML file. overrides: `key.sub=value` strings, read by `engine.config_text`.
        need_data: refuse data that is not there, before what is long to load.

    Returns:
        A `RunConfig` as a checked `DictConfig`, its paths as `engine.config_paths` finds them.

    Raises:
        ConfigError: unreadable file, circular `base`, unknown key, value of a wrong type, or a file
            that is nowhere; names the configuration. DataError: see `need_data`.
    """
    path = Path(os.path.expanduser(path))
    layers = config_layers.read(path, overrides, RunConfig)
    cfg = OmegaConf.structured(RunConfig)
    for layer in layers:
        try:
            cfg = OmegaConf.merge(cfg, layer.values)
        except ConfigKeyError as error:
            raise ConfigError(_unknown_key(error, path)) from None
        except (OmegaConfBaseException, OverflowError) as error:
            key = getattr(error, "full_key", None) or "the whole file"
            raise ConfigError(f"{path}: {key}: {str(error).splitlines()[0]}") from None
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        if need_data:  # first, because a method comes with torch
            config_paths.require_data(values, layers)
        config_rules.check(cfg)
        config_paths.settle(cfg, layers)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except _WRONG_KINDS as error:
        raise ConfigError(f"{path}: a value of a wrong kind: {error}") from None
    return cfg


def specs(value: Any, key: str) -> list[str]:
    """A shard specification or a list of them, as a list of strings."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    items = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ConfigError(f"{key} must be a path specification or a list of them, got {value!r}")
    return items


def learning_rates(cfg: DictConfig) -> dict[str, float]:
    """`lr`, `warmup_lr`, `min_lr` after the linear scaling rule, if one is asked for."""
    factor = cfg.train.global_batch / cfg.optim.lr_batch if cfg.optim.lr_batch else 1.0
    return {key: cfg.optim[key] * factor for key in ("lr", "warmup_lr", "min_lr")}


def count_steps(cfg: DictConfig, epoch_samples: int) -> tuple[int, int]:
    """(all steps, warm-up steps) of the run.

    Args:
        epoch_samples: samples of an epoch, unless the configuration states its own number.
    """
    train, batch = cfg.train, cfg.train.global_batch
    epoch = train.epoch_samples or epoch_samples
    samples = train.samples or (train.epochs or 0) * epoch
    steps = train.steps or math.ceil(samples / batch)
    warmup = cfg.optim.warmup_steps or math.ceil((cfg.optim.warmup_epochs or 0) * epoch / batch)
    return steps, warmup


def _unknown_key(error: ConfigKeyError, path: str | Path) -> str:
    full, key = str(error.full_key), str(error.key)  # a key may have dots of its own
    parent = full.removesuffix(key)
    names = list(error.object_type.__dataclass_fields__)
    nearest = parent + difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
    return f"{path}: unknown key {full!r}; the nearest is {nearest!r} (known: {', '.join(names)})"
