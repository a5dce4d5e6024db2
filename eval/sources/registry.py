"""The rows of `datasets.yaml`: which sets there are, where they lie, and under which protocol."""

import dataclasses
import difflib
import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eval.sources import registry_file
from eval.sources.class_texts import GivenNames
from loaders import specs, texts
from loaders.errors import ConfigError, DataError

REPOSITORY = Path(__file__).resolve().parents[2]
REGISTRY = Path(__file__).resolve().parents[1] / "datasets.yaml"
DATA_ROOT = "UNICL_EVAL_DATA"  # environment variable, as --data-root
# Fields of a row that no file states.
INTERNAL = {"name", "root", "base", "obtain_split", "origin", "class_names", "templates_from"}


def default_root() -> Path:
    """Where benchmark sets lie: $UNICL_EVAL_DATA, else data/eval of the repository."""
    given = os.environ.get(DATA_ROOT)
    return Path(specs.local(given)) if given else REPOSITORY / "data" / "eval"


@dataclass(frozen=True)
class Origin:
    """Where a row comes from that is none of `eval/datasets.yaml`, as its results say it.

    Attributes:
        facts: the key `set` of its result rows.
        protocol: joined to the protocol of every result.
        prompts: the same where class texts were used, in the place of `protocol`.
    """

    facts: Mapping[str, Any]
    protocol: str
    prompts: str


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
    all_classes: bool = False
    root: Path = field(default_factory=default_root)
    base: Path = REPOSITORY
    obtain_split: str = ""
    origin: Origin | None = None
    class_names: GivenNames | None = None
    templates_from: str = "stated in the registry"

    def folder(self, split: str) -> Path:
        """Where `split` lies: its `path` from the repository root, or from the folder of a
        further registry; else its `folder` (default: NAME/SPLIT) from the data root."""
        entry = self.splits[split]
        if "path" in entry:
            return self.base / specs.local(entry["path"])
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
        self.collections: dict[str, list[str]] = {}
        self.notes: dict[str, str] = {}
        self.datasets: dict[str, EvalDataset] = {}
        self._root = Path(data_root) if data_root else default_root()
        self._read(Path(path), REPOSITORY, further=False)

    def add(self, path: Path) -> None:
        """The rows and collections of a further file of the same form; a relative `path` of a split
        is one from its folder.

        Raises ConfigError for a file that cannot be read, a name that is taken, and a collection
        of unknown sets; DataError as for the first file.
        """
        self._read(path, Path(os.path.abspath(path)).parent, further=True)

    def _read(self, path: Path, base: Path, further: bool) -> None:
        content, digest = registry_file.load(path)
        new = {**content["collections"], **content["datasets"]}
        if taken := sorted(new.keys() & (self.datasets.keys() | self.collections.keys())):
            raise ConfigError(
                f"{path}: {', '.join(taken)}: this name has a set or collection already, whose "
                "results it would be taken for; give yours another name"
            )
        self.collections |= content["collections"]
        self.notes |= content["collection_notes"]
        for name, row in content["datasets"].items():
            try:
                parsed = _parse_row(name, row, self._root, base)
            except (TypeError, KeyError, ConfigError) as error:
                raise DataError(f"{path}: row {name}: {error}") from None
            if further:
                parsed = replace(parsed, origin=_origin(path, digest, name, row))
            self.datasets[name] = parsed
        for name, members in self.collections.items():
            if unknown := [member for member in members if member not in self.datasets]:
                raise ConfigError(
                    f"{path}: collection {name} has unknown sets: {', '.join(unknown)}"
                )

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
                raise ConfigError(
                    f"unknown data set {name!r}; did you mean {near[0]}? There is no such folder "
                    "either; a set of your own is named by the path of its folder"
                )
            elif task not in self.datasets[name].tasks:
                has = ", ".join(self.datasets[name].tasks)
                raise ConfigError(f"data set {name} has no task {task}; it has {has}")
            else:
                wanted.add(name)
        found = [row for name, row in self.datasets.items() if name in wanted]
        return [row.with_protocol(protocol) for row in found]


def _origin(path: Path, digest: str, name: str, row: dict) -> Origin:
    words = f"; row {name} of {path.name} (sha256 {digest[:8]})"
    place = os.path.abspath(path)
    facts = {
        "registry": place,
        "registry_digest": digest,
        "row": json.loads(json.dumps(row, default=str)),
        "arguments": ["--datasets", name, "--registry", place],
    }
    return Origin(facts, words, words)


def _parse_row(name: str, row: dict, root: Path, base: Path) -> EvalDataset:
    fields = {entry.name: entry for entry in dataclasses.fields(EvalDataset)}
    known = fields.keys() - INTERNAL
    missing = dataclasses.MISSING
    needed = [
        key
        for key in fields
        if key in known and fields[key].default is fields[key].default_factory is missing
    ]
    protocols = row.get("protocols", {}) if isinstance(row, dict) else {}
    if protocols:
        first = next(iter(protocols))
        row = {**row, **protocols[first], "protocol": first}
    registry_file.check(row, known, needed)
    parsed = EvalDataset(name=name, root=root, base=base, **row)
    parsed = replace(parsed, obtain_split=parsed.obtain)
    commands = dict.fromkeys(parsed.command(split) for split in parsed.splits)
    return replace(parsed, obtain=" && ".join(commands))


def _short(path: Path) -> str:
    """A path inside the repository from there, as commands are typed."""
    return str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path)
