"""What the values of a configuration may be, beyond the types in `engine.config`.

Nothing here needs data or devices. Words that a key may have come from the code that acts on them.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

import losses
from engine import mirrors
from engine.schedule import SCHEDULES
from loaders import caption_recipes, choices
from loaders.errors import ConfigError
from models.config import ModelConfig

RECIPES = ("paper", "release_defaults", "ours")  # whose values a configuration has

# Keys that may not stay null, with what they decide. Of several alternatives one is needed.
DECISIONS: dict[tuple[str, ...], str] = {
    ("recipe",): "whose values these are: paper (read in the paper), release_defaults or ours",
    ("model.image.size",): "side of the square training images in pixels",
    ("model.image.kwargs",): "arguments of the image tower, e.g. another stem for small images; "
    "{} is timm's own",
    ("model.logit_scale_init",): "logarithm of the first temperature multiplier: 1.0 in the "
    "released model, ln(1/0.07) = 2.659 in CLIP",
    ("data.templates",): "texts made from class names: a preset of prompts/templates.json",
    ("data.augmentation",): "image views: a recipe of loaders/views.py",
    ("train.global_batch",): "samples per optimizer step over all ranks",
    ("train.epochs", "train.samples", "train.steps"): "length of the training",
    ("optim.lr",): "peak learning rate of AdamW",
    ("optim.warmup_lr",): "learning rate at the first step",
    ("optim.min_lr",): "learning rate at the last step",
    ("optim.betas",): "decay rates of AdamW's two averages",
    ("optim.eps",): "AdamW's epsilon",
    ("optim.weight_decay",): "AdamW's weight decay",
    ("optim.grad_clip_norm",): "largest gradient norm; 0 is no clipping",
    ("optim.schedule",): " or ".join(SCHEDULES),
    ("optim.warmup_epochs", "optim.warmup_steps"): "length of the warm-up; 0 is none",
}

# The words of a key.
CHOICES: dict[str, tuple[str, ...]] = {
    "recipe": RECIPES,
    "data.sampler": choices.SAMPLERS,
    "data.caption_labels": choices.CAPTION_LABELS,
    "data.label_merge": choices.MERGES,
    "optim.schedule": SCHEDULES,
}

# The range of a number, and the range in words; null is left to DECISIONS.
_COUNT = (lambda value: value >= 1, "at least 1")
_POSITIVE = (lambda value: value > 0, "positive")
_NOT_NEGATIVE = (lambda value: value >= 0, "at least 0")
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "seed": (lambda value: 0 <= value < 2**63, "at least 0 and less than 2^63"),
    "timeout_minutes": _POSITIVE,
    "data.block_shards": _COUNT,
    "data.max_bad_fraction": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "data.workers": (lambda value: 0 <= value <= 512, "in [0, 512], per rank"),
    "train.global_batch": _COUNT,
    "train.accumulation": _COUNT,
    "train.epochs": _POSITIVE,
    "train.samples": _POSITIVE,
    "train.steps": _POSITIVE,
    "train.epoch_samples": _COUNT,
    "train.graph_memory_gb": _NOT_NEGATIVE,
    "train.max_nonfinite_windows": _COUNT,
    "optim.warmup_epochs": _NOT_NEGATIVE,
    "optim.warmup_steps": _NOT_NEGATIVE,
    "log.every_steps": _COUNT,
    "log.save_every_steps": _COUNT,
    "log.keep_last": _COUNT,
}


def check(cfg: DictConfig) -> None:
    """Refuse contradictions that need neither data nor devices to be seen.

    Args:
        cfg: an `engine.config.RunConfig`.

    Raises:
        ConfigError: names the key and what it may be.
    """
    _refuse_undecided(cfg)
    values = OmegaConf.to_container(cfg, resolve=True)
    _refuse_infinite(values)
    model = ModelConfig.from_dict(values["model"])
    loss = dict(values["loss"])
    try:
        method = losses.find(loss.pop("name", "unicl"))
        losses.read_config(method.Config, loss, "loss")
        method.check_model(model)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _exactly_one(cfg.train, "train", ("epochs", "samples", "steps"))
    _exactly_one(cfg.optim, "optim", ("warmup_epochs", "warmup_steps"))
    for key, (holds, words) in RANGES.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and not holds(value):
            raise ConfigError(f"{key}={value} must be {words}")
    if cfg.train.global_batch < method.smallest_batch:
        raise ConfigError(
            f"train.global_batch={cfg.train.global_batch}: this method compares the samples of a "
            f"global batch with each other and needs at least {method.smallest_batch}"
        )
    mirrors.chosen(cfg.log.report_to)
    for key, words in CHOICES.items():
        if OmegaConf.select(cfg, key) not in words:
            raise ConfigError(f"{key}={OmegaConf.select(cfg, key)!r}; one of {', '.join(words)}")
    mixes = vars(method).get("mixes", False)  # a method's own, see losses/_method.py
    augmentation = values["data"]["augmentation"]
    choices.check_augmentation(augmentation, method.images, mixes, method.needs_parameters)
    caption = values["data"]["caption"]
    caption_recipes.read(caption, method.texts)
    if method.texts_differ and not isinstance(caption, dict):
        each = ", ".join(f"{view}: {{from: SOURCE}}" for view in method.texts)
        raise ConfigError(
            f"data.caption={caption}: loss.name={cfg.loss.name} has texts of different kinds; give "
            f"each its source, data.caption={{{each}}}. python data_prep/annotate.py joins a table "
            "of texts into the samples of a set"
        )


def _refuse_undecided(cfg: DictConfig) -> None:
    """Raise ConfigError with every key that a preset left open."""
    unset = object()  # a key of `model` that is absent has a default; null is an open question
    lines = []
    for keys, meaning in DECISIONS.items():
        values = [OmegaConf.select(cfg, key, default=unset, throw_on_missing=False) for key in keys]
        if all(value is None for value in values):
            lines.append(f"  {' or '.join(keys)}: {meaning}")
    if lines:
        raise ConfigError(
            f"{cfg.name}: these keys are not decided:\n" + "\n".join(lines) + "\nDecide them in "
            "the file or as key=value (recipe=ours, unless you read the values in the paper), or "
            "take the released code's values with base: _base/release_defaults.yaml"
        )


def _refuse_infinite(values: dict[str, Any]) -> None:
    for key, value in _leaves(values, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value}: a number must be finite; null may mean 'none'")


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping or list."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in pairs:
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _exactly_one(section: DictConfig, where: str, keys: tuple[str, ...]) -> None:
    given = [key for key in keys if section[key] is not None]
    if len(given) != 1:
        raise ConfigError(
            f"{where}: give exactly one of {', '.join(keys)}; given: {', '.join(given)}"
        )
