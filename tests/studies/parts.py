"""A small study as a file, and a finished cell as folders."""

import hashlib
import json
from pathlib import Path

import yaml
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
TINY = "tests/engine/tiny.yaml"
STUDY = {
    "name": "small",
    "seeds": [3, 5],
    "overrides": ["data.workers=0", "train.steps=20"],
    "arms": {
        "one": {"config": TINY},
        "two": {"config": TINY, "overrides": ["loss.name=clip", "data.image_label=null"]},
    },
    "evaluations": [{"task": "zero_shot", "datasets": ["emoji_twemoji"]}],
}


def study_file(folder: Path, **changes) -> Path:
    """FOLDER/small.yaml: STUDY with other keys."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


def write_cell(cell, values: dict[tuple[str, str, str], float], **facts) -> None:
    """Folders of a finished cell whose rows hold these values, percent, by (set, task, metric).

    `facts`: entries of the rows in place of the usual ones.
    """
    step = cell.steps()
    checkpoint = cell.run / f"checkpoints/step_{step:07d}"
    checkpoint.mkdir(parents=True)
    head = json.dumps(
        {
            "model.a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
            "model.b": {"dtype": "F32", "shape": [5], "data_offsets": [48, 68]},
            "method.head": {"dtype": "F32", "shape": [7], "data_offsets": [68, 96]},
        }
    ).encode()
    weights = len(head).to_bytes(8, "little") + head + cell.name.encode().ljust(96, b"\0")
    (checkpoint / "model.safetensors").write_bytes(weights)
    (cell.run / "checkpoints/LAST_GOOD").write_text(checkpoint.name)
    (cell.run / "environment.json").write_text(json.dumps({"starts": [{"steps": step}]}))
    (cell.run / "config.yaml").write_text(OmegaConf.to_yaml(cell.cfg, resolve=True))
    lines = [{"step": s, "samples_per_second": 40.0} for s in (10, step)]
    (cell.run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    cell.results.mkdir(exist_ok=True)
    digest = hashlib.sha256(weights).hexdigest()
    for (dataset, task, metric), value in values.items():
        row = {
            "dataset": dataset, "task": task, "metric": metric, "value": value, "n": 100,
            "classes": 4, "ci95": [value - 3, value + 5], "run": cell.name, "protocol": "p",
            "checkpoint_hash": digest, "prompt_digest": "d", **facts,
        }  # fmt: skip
        with open(cell.results / f"{cell.name}_{task}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
