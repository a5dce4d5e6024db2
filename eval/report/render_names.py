"""Names of tasks and metrics for people, and the commands behind them."""

import re
import shlex
from pathlib import Path

from eval.sources.registry import REPOSITORY, Registry

TASKS = {
    "zero_shot": "zero-shot",
    "linear_probe": "linear probe",
    "linear_probe_clip": "linear probe (CLIP)",
    "linear_probe_elevater": "linear probe (ELEVATER)",
    "retrieval": "retrieval",
    "knn": "k-NN",
    "finetune": "fine-tuning",
    "detection": "detection",
}
METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "mean_top1_top5": "mean of top-1 and top-5",
    "map_11_point": "11-point mAP",
    "roc_auc": "ROC AUC",
    "mean_recall": "mean R@1,5,10",
    "rsum": "sum of R@1,5,10",
    "box_map": "box mAP",
    "mask_map": "mask mAP",
}
METRICS |= {f"image_to_text_r{k}": f"image→text R@{k}" for k in (1, 5, 10)}
METRICS |= {f"text_to_image_r{k}": f"text→image R@{k}" for k in (1, 5, 10)}


def _shots(task: str) -> tuple[str, str | None]:
    """('linear_probe', '5') for linear_probe_5shot; None as number for all training samples."""
    name, _, shots = task.rpartition("_")
    return (
        (name, shots[: -len("shot")]) if shots.endswith("shot") and name in TASKS else (task, None)
    )


def task_name(task: str) -> str:
    """'linear probe, 5-shot' for linear_probe_5shot."""
    name, shots = _shots(task)
    return f"{TASKS[name]}, {shots}-shot" if shots else TASKS[name]


def metric_name(metric: str) -> str:
    """'top-1 (best epoch)' for top1_best_epoch: a metric with what tells its variants apart."""
    if metric in METRICS:
        return METRICS[metric]
    stem = max((name for name in METRICS if metric.startswith(f"{name}_")), key=len)
    return f"{METRICS[stem]} ({metric[len(stem) + 1 :].replace('_', ' ')})"


def protocol_name(row: dict) -> str | None:
    """Name of a result row's protocol, where its data set has several ("protocol unicl: …")."""
    found = re.search(r"\bprotocol (\w+):", row["protocol"])
    return found.group(1) if found else None


def _short(path: Path) -> Path:
    """A path inside the repository from there, as commands are typed."""
    inside = path.is_relative_to(REPOSITORY)
    return path.relative_to(REPOSITORY) if inside else path


def command(
    task: str,
    checkpoint: str,
    names: list[str],
    output: Path,
    registry: Registry,
    typed: list[str] | None = None,
) -> str:
    """What makes the result rows of `task` on the sets or collections `names`; `typed` are the
    arguments that name a set of none of the registry's."""
    name, shots = _shots(task)
    where = shlex.join(typed or ["--datasets", *names])
    if name == "detection":
        row = registry.datasets[names[0]]
        where = f"--train {_short(row.folder('train'))} --val {_short(row.folder('test'))}"
    module, _, protocol = name.partition("linear_probe_")
    options = f" --protocol {protocol}" if protocol else ""
    options += f" --shots {shots}" if shots else ""
    module = "linear_probe" if protocol else module
    return f"python -m eval.{module} --checkpoint {checkpoint} {where}{options} --output {output}"
