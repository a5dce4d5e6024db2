"""Folders as a person has them, a small registry, and what a command finds of them."""

from pathlib import Path

import yaml
from PIL import Image

from eval import cli
from eval.sources.registry import EvalDataset

TEMPLATES = ["a {c} in a tree", "the {c}."]


def write_registry(path: Path, name: str = "aviary", collection: str = "mine", **changes) -> Path:
    """A registry of one set, the class folders `birds` beside it, and of one collection."""
    row = {
        "source": "folder",
        "splits": {s: {"path": f"birds/{s}", "samples": None} for s in ("train", "test")},
        "tasks": {task: ["top1"] for task in ("zero_shot", "linear_probe", "knn")},
        "classes": 3,
        "templates": [template.replace("{c}", "{}") for template in TEMPLATES],
        "labelled_only": True,
        "resize_ratio": 1.0,
        "optional": False,
        "obtain": "-",
    } | changes
    content = {"collections": {collection: [name]}, "datasets": {name: row}}
    path.write_text(yaml.safe_dump(content))
    return path


def choose(home: Path, task: str, *words) -> EvalDataset:
    """The row of one set, as a command finds it before anything is loaded; the registry, in `home`,
    has the set `aviary`."""
    registry = home / "datasets.yaml"
    if not registry.exists():
        write_registry(registry)
    parser = cli.parser(task, "", templates=True)
    arguments = ["--checkpoint", str(home), "--output", "out", "--datasets"]
    args = parser.parse_args([*arguments, *map(str, words)])
    listed = "linear_probe" if task == "finetune" else task
    return cli.choose(args, task, registry, listed=listed)[0]


def picture(folder: Path) -> None:
    """One picture in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "0.png")


def pictures(*names: str):
    """A function that puts one picture into each of these folders of a folder."""

    def make(home: Path) -> None:
        for name in names:
            picture(home / name)

    return make
