"""Published tables, read from `eval/paper/*.yaml`.

What such a file holds is described at the head of `eval/paper/unicl.yaml`. `paper_join` beside this
fills the tables with our numbers.
"""

import difflib
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from loaders.errors import ConfigError, DataError

FOLDER = Path(__file__).resolve().parents[1] / "paper"
FACTS = ("label", "model", "data", "method")


@dataclass(frozen=True)
class Published:
    """One printed number and where it stands; `verified`: it was read there."""

    value: int | float
    source: str
    verified: bool


@dataclass(frozen=True)
class Column:
    """A measure. With `task` it can be filled by result rows: of one `dataset` and `metric` (and
    `protocol`, where the set has several), or as the mean over the members of a `collection`, of
    each its first metric in the registry."""

    id: str
    title: str
    dataset: str | None = None
    collection: str | None = None
    task: str | None = None
    metric: str | None = None
    protocol: str | None = None


@dataclass
class Cell:
    """A measure of a row: what is published, and what our run gives (`ours`, same unit)."""

    column: Column
    published: list[Published]
    config: str | None
    applies: bool = True  # False: the paper says n/a
    note: str = ""
    ours: float | None = None
    recipe: str | None = None  # of the run that gave `ours`
    lacking: list[str] = field(default_factory=list)  # data sets whose result rows are missing

    def differences(self) -> list[float]:
        """Our number minus each published one, in points."""
        return [] if self.ours is None else [self.ours - p.value for p in self.published]


@dataclass
class Row:
    """One line of a table: its facts (label, model, data, method) and its cells."""

    id: str
    facts: dict[str, str]
    cells: list[Cell]
    note: str = ""

    @property
    def name(self) -> str:
        """The facts in one string."""
        return ", ".join(self.facts.values())


@dataclass
class PaperTable:
    """A published table; after `join` with our numbers, notes and commands."""

    paper: str
    id: str
    caption: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Paper, table and caption on one line."""
        name = f"table {self.id}" if self.id[0].isdigit() else self.id
        return f"{self.paper}, {name}: {self.caption}"

    @property
    def joined(self) -> bool:
        """Whether any cell can be filled by a run."""
        return any(cell.config and cell.column.task for row in self.rows for cell in row.cells)

    @property
    def configs(self) -> set[str]:
        """Configurations that reproduce cells."""
        return {cell.config for row in self.rows for cell in row.cells if cell.config}

    @property
    def sources(self) -> list[str]:
        """Where the published numbers stand, each once, in order of appearance."""
        cells = [cell for row in self.rows for cell in row.cells]
        return list(dict.fromkeys(p.source for cell in cells for p in cell.published))


def papers(folder: Path = FOLDER) -> list[str]:
    """Names of the files in `folder`."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def table_ids(paper: str, folder: Path = FOLDER) -> list[str]:
    """Ids of the tables of `paper`."""
    return list(_content(paper, folder)["tables"])


def load(paper: str, table: str, folder: Path = FOLDER) -> PaperTable:
    """Table `table` of `folder/<paper>.yaml`.

    Raises:
        ConfigError: unknown paper or table. DataError: a broken file, with table and row.
    """
    content = _content(paper, folder)
    if table not in content["tables"]:
        reason = content.get("not_available", {}).get(table)
        known = ", ".join(content["tables"])
        raise ConfigError(f"{paper}, table {table}: {reason or 'unknown'}; there are: {known}")
    body, where = content["tables"][table], f"eval/paper/{paper}.yaml, table {table}"
    try:
        columns = [Column(id=key, **spec) for key, spec in body["columns"].items()]
        rows = [_row(entry, columns, body, where) for entry in body["rows"]]
        head = f"{content['title']} ({content['where']})"
        notes = [*body.get("notes", []), *_row_notes(rows)]
        return PaperTable(head, table, body["caption"], columns, rows, notes)
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: missing or unknown key {error}") from None


def _content(paper: str, folder: Path) -> dict:
    path = folder / f"{paper}.yaml"
    if not path.exists():
        known = papers(folder)
        near = difflib.get_close_matches(paper, known, n=1) or [", ".join(known)]
        raise ConfigError(f"no published tables of {paper!r} in {folder}; did you mean {near[0]}?")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: {error}") from None


def _row_notes(rows: list[Row]) -> list[str]:
    notes = []
    for row in rows:
        notes += [f"{row.name}: {row.note}"] if row.note else []
        notes += [f"{row.name}, {c.column.title}: {c.note}" for c in row.cells if c.note]
    return notes


def _row(entry: dict, columns: list[Column], body: dict, where: str) -> Row:
    """A row; `source`, `verified` and `config` are inherited from table to row to cell."""
    entry = dict(entry)
    name, values = entry.pop("id"), entry.pop("cells")
    facts = {key: entry.pop(key) for key in FACTS if key in entry}
    note = entry.pop("note", "")
    defaults = {
        "source": entry.pop("source", body.get("source")),
        "verified": entry.pop("verified", body.get("verified")),
        "config": entry.pop("config", None),
    }
    if entry:
        raise DataError(f"{where}, row {name}: unknown keys {', '.join(entry)}")
    if len(values) != len(columns):
        raise DataError(f"{where}, row {name}: {len(values)} cells for {len(columns)} columns")
    cells = [
        _cell(value, column, defaults, f"{where}, row {name}, column {column.id}")
        for value, column in zip(values, columns, strict=True)
    ]
    return Row(name, facts, cells, note)


def _cell(entry: object, column: Column, defaults: dict, where: str) -> Cell:
    """A cell from a number, null, "n/a", a mapping with overrides, or several published values."""
    if entry == "n/a":
        return Cell(column, [], None, applies=False)
    entries = entry if isinstance(entry, list) else [entry]
    entries = [item if isinstance(item, dict) else {"value": item} for item in entries]
    known = {"value", "source", "verified", "config", "task", "metric", "note"}
    published = []
    for item in entries:
        if set(item) - known or "value" not in item:
            raise DataError(f"{where}: a cell needs value and may have {', '.join(sorted(known))}")
        if item["value"] is None:
            continue
        source = item.get("source", defaults["source"])
        verified = item.get("verified", defaults["verified"])
        if not isinstance(item["value"], int | float):
            raise DataError(f"{where}: {item['value']!r} is no number")
        if not source or not isinstance(verified, bool):
            raise DataError(f"{where}: no source, or verified is not true or false")
        published.append(Published(item["value"], source, verified))
    first = entries[0]
    measured = {key: first[key] for key in ("task", "metric") if key in first}
    config = first.get("config", defaults["config"])
    return Cell(replace(column, **measured), published, config, note=first.get("note", ""))
