"""The rows of `datasets.yaml`: which sets there are, where they lie, and under which protocol."""

import difflib
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from loaders import specs, texts
from loaders.errors import ConfigError, DataError

REPOSITORY = Path(__file__).resolve().parents[2]
REGISTRY = Path(__file__).resolve().parents[1] / "datasets.yaml"
DATA_ROOT = "UNICL_EVAL_DATA"  # environment variable, as --data-root
KINDS = ("auto", "shards", "webdataset", "huggingface", "folder")


def default_root() -> Path:
    """Where benchmark sets lie: $UNICL_EVAL_DATA, else data/eval of the repository."""
    given = os.environ.get(DATA_ROOT)
    return Path(specs.local(given)) if given else REPOSITORY / "data" / "eval"


@dataclass(frozen=True, kw_only=True)
class EvalDataset:
    """One row of the registry; the keys are explained at the head of `datasets.yaml`."""

    name: str
    source: str
    splits: dict[str, dict]
    tasks: dict[str, list[str]]
    classes: int | None
    templates: str | list[str] | None
    labelled_only: bool
    resize_ratio: float
    optional: bool
    obtain: str
    prompts: str | None = None
    subset: str | None = None
    multilabel: bool = False
    squash: bool = False
    integer_labels: bool = False
    captions_per_image: int | str | None = None
    protocol: str | None = None
    protocols: Mapping[str, dict] = field(default_factory=dict)
    note: str | None = None
    root: Path = field(default_factory=default_root)
    obtain_split: str = ""

    def folder(self, split: str) -> Path:
        """Where `split` lies: its `path` from the repository root, else its `folder` (default:
        NAME/SPLIT) from the data root."""
        entry = self.splits[split]
        if "path" in entry:
            return REPOSITORY / specs.local(entry["path"])
        return self.root / specs.local(entry.get("folder", f"{self.name}/{split}"))

    def split_name(self, split: str) -> str:
        """The published name of `split`: ImageNet is tested on its `val`."""
        return self.splits[split].get("folder", split).rpartition("/")[2]

    def command(self, split: str) -> str:
        """What makes `split` appear in its folder."""
        text = self.splits[split].get("obtain", self.obtain_split) or self.obtain
        # Not str.format: a command may hold braces of the shell.
        text = text.replace("{name}", self.name)
        text = text.replace("{split}", self.split_name(split))
        return text.replace("{folder}", _short(self.folder(split)))

    def with_protocol(self, protocol: str | None) -> "EvalDataset":
        """The row under another of its protocols; ConfigError if it has no such one."""
        if protocol in (None, self.protocol):
            return self
        if protocol not in self.protocols:
            has = ", ".join(self.protocols) or "its own only"
            raise ConfigError(f"data set {self.name} has no protocol {protocol}; it has {has}")
        return replace(self, protocol=protocol, **self.protocols[protocol])

    def class_texts(self, names: list[str]) -> list[str]:
        """Class names as they go into templates.

        ELEVATER's are scored as published. All others pass through the function that makes the
        training prompts (commas removed, `+` to a space), so that both see the same text.
        """
        if self.protocol == "elevater":
            return list(names)
        return [texts.label_text([name], ["{}"], random.Random(0)) for name in names]


class Registry:
    """The rows and collections of a registry file."""

    def __init__(self, path: Path | str = REGISTRY, data_root: Path | str | None = None):
        """Read the YAML at `path`; a row with a missing or unknown key raises DataError.

        `data_root`: folder of the benchmark sets, default `default_root()`.
        """
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        self.collections: dict[str, list[str]] = content["collections"]
        self.notes: dict[str, str] = content.get("collection_notes", {})
        self.datasets: dict[str, EvalDataset] = {}
        root = Path(data_root) if data_root else default_root()
        for name, row in content["datasets"].items():
            try:
                self.datasets[name] = _parse_row(name, row, root)
            except (TypeError, KeyError, ConfigError) as error:
                raise DataError(f"{path}: row {name}: {error}") from None

    def select(self, names: list[str], task: str, protocol: str | None = None) -> list[EvalDataset]:
        """Rows of the named sets and collections that have `task`, in the registry's order.

        Raises ConfigError for an unknown name, a collection whose members are not known, a set
        named directly that lacks the task, and one without `protocol`.
        """
        wanted: set[str] = set()
        for name in names:
            if name in self.collections:
                if not self.collections[name]:
                    why = self.notes.get(name, "it is empty in eval/datasets.yaml")
                    raise ConfigError(f"collection {name} cannot be evaluated: {why}")
                wanted.update(d for d in self.collections[name] if task in self.datasets[d].tasks)
            elif name not in self.datasets:
                known = [*self.collections, *self.datasets]
                near = difflib.get_close_matches(name, known, n=1) or [", ".join(known)]
                raise ConfigError(f"unknown data set {name!r}; did you mean {near[0]}?")
            elif task not in self.datasets[name].tasks:
                has = ", ".join(self.datasets[name].tasks)
                raise ConfigError(f"data set {name} has no task {task}; it has {has}")
            else:
                wanted.add(name)
        found = [row for name, row in self.datasets.items() if name in wanted]
        return [row.with_protocol(protocol) for row in found]


def _parse_row(name: str, row: dict, root: Path) -> EvalDataset:
    kind = row["source"]
    if kind not in KINDS and not kind.startswith("torchvision:"):
        raise ConfigError(f"unknown source {kind!r}; known: {', '.join(KINDS)}, torchvision:CLASS")
    protocols = row.get("protocols", {})
    if protocols:
        first = next(iter(protocols))
        row = {**row, **protocols[first], "protocol": first}
    parsed = EvalDataset(name=name, root=root, **row)
    parsed = replace(parsed, obtain_split=parsed.obtain)
    commands = dict.fromkeys(parsed.command(split) for split in parsed.splits)
    return replace(parsed, obtain=" && ".join(commands))


def _short(path: Path) -> str:
    """A path inside the repository from there, as commands are typed."""
    return str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path)
