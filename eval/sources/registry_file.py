"""The form of a registry file, `eval/datasets.yaml` or a further one, checked before it is used."""

import difflib
import hashlib
from collections.abc import Collection
from pathlib import Path

import yaml

from loaders.errors import ConfigError

KINDS = ("auto", "shards", "webdataset", "huggingface", "folder")
CLASSIFICATION = {"top1", "top5", "mean_top1_top5", "mean_per_class"}
# What each task can measure; a row names those that it wants.
METRICS = {
    "zero_shot": CLASSIFICATION | {"map_11_point", "roc_auc"},
    "linear_probe": {"top1", "mean_per_class", "map_11_point", "roc_auc"},
    "knn": CLASSIFICATION,
    "retrieval": {"mean_recall", "rsum"}
    | {f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)},
    "detection": {"box_map", "mask_map"},
}


def load(path: Path) -> tuple[dict, str]:
    """Content of a registry file, and the SHA-256 of the file.

    `collections` and `collection_notes` are there in any case. Raises ConfigError for what is not
    the YAML of a registry, its rows aside.
    """
    try:
        data = path.read_bytes()
        content = yaml.safe_load(data.decode("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from None
    keys = ("collections", "collection_notes", "datasets")
    right = isinstance(content, dict) and isinstance(content.get("datasets"), dict)
    right = right and all(key in keys and isinstance(content[key], dict) for key in content)
    if right:
        content = {key: content.get(key, {}) for key in keys}
        right = all(isinstance(members, list) for members in content["collections"].values())
    if not right:
        raise ConfigError(
            f"{path}: not a registry of data sets: `datasets:` with a row for each name, and "
            "perhaps `collections:`, lists of names, and `collection_notes:`, as in "
            "eval/datasets.yaml"
        )
    return content, hashlib.sha256(data).hexdigest()


def check(row: dict, known: Collection[str], needed: Collection[str]) -> None:
    """Raise ConfigError for keys and values that would fail in the middle of an evaluation.

    `known`: keys that a row may have, `needed`: those that it must have.
    """
    if not isinstance(row, dict):
        raise ConfigError("not a mapping; its keys are explained in eval/datasets.yaml")
    for key in row:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ConfigError(f"unknown key {key!r}{hint}")
    if lacking := [key for key in needed if key not in row]:
        raise ConfigError(f"these keys are missing: {', '.join(lacking)}")
    kind, splits, tasks = row["source"], row["splits"], row["tasks"]
    if kind not in KINDS and not str(kind).startswith("torchvision:"):
        raise ConfigError(f"unknown source {kind!r}; known: {', '.join(KINDS)}, torchvision:CLASS")
    if not isinstance(splits, dict) or "test" not in splits:
        raise ConfigError("`splits` is a mapping with `test`, and `train` for probes")
    for name, entry in splits.items():
        if not isinstance(entry, dict) or "samples" not in entry:
            raise ConfigError(f"split {name} lacks `samples`: the exact number, or null")
    if not isinstance(tasks, dict) or not all(isinstance(names, list) for names in tasks.values()):
        raise ConfigError("`tasks` is a mapping from a task to the list of its metrics")
    for task, metrics in tasks.items():
        if task not in METRICS:
            raise ConfigError(f"unknown task {task!r}; known: {', '.join(METRICS)}")
        if wrong := [name for name in metrics if name not in METRICS[task]]:
            has = ", ".join(sorted(METRICS[task]))
            raise ConfigError(f"{task} has no metric {wrong[0]!r}; it has {has}")
