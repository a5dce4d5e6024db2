"""What a table of results is made of: `eval.tables` makes one of rows, `render` shows it."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Column(NamedTuple):
    """What a number is; results on another n or k, or by another protocol, never share one."""

    dataset: str
    task: str
    metric: str
    n: int | None
    classes: int | None
    protocol: str | None = None  # where the data set has several


@dataclass
class Line:
    """One model: a label, the name of its configuration, and its result rows by column."""

    label: str
    config_name: str
    cells: dict[Column, dict] = field(default_factory=dict)


@dataclass
class Table:
    """Lines x columns, with the notes that belong under it."""

    title: str
    columns: list[Column]
    lines: list[Line]
    notes: list[str]
    commands: list[str]
