"""The outcome of the checks as a table that can be pasted into a report."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata

import torch

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "timm")


@dataclass
class Row:
    """One check: its name, `passed`, `FAILED` or `skipped`, figures by name, and why."""

    name: str
    outcome: str
    figures: dict[str, object] = field(default_factory=dict)
    reason: str = ""


def machine() -> list[tuple[str, str]]:
    """Card, driver and versions, (name, value)."""
    facts = []
    if torch.cuda.is_available():
        facts.append(("card", torch.cuda.get_device_name()))
        facts.append(("driver", driver()))
        facts.append(("CUDA", str(torch.version.cuda)))
    for name in PACKAGES:
        try:
            facts.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            facts.append((name, "not installed"))
    return facts


def driver() -> str:
    """Version of the kernel module, as the driver tells it."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
    except OSError:
        return "unknown"
    return next((w for w in words if w[0].isdigit() and "." in w), "unknown")


def render(rows: Sequence[Row]) -> str:
    """Markdown: the machine in one line, then a row each check, then the counts."""
    lines = [", ".join(f"{name} {value}" for name, value in machine()), ""]
    lines += ["| check | outcome | figures |", "|---|---|---|"]
    for row in rows:
        figures = ", ".join(f"{name} {_short(value)}" for name, value in row.figures.items())
        words = "; ".join(part for part in (figures, row.reason) if part).replace("|", "\\|")
        lines.append(f"| {row.name} | {row.outcome} | {words[:300]} |")
    counts = {name: sum(row.outcome == name for row in rows) for name in ("passed", "FAILED",
              "skipped")}  # fmt: skip
    return "\n".join([*lines, "", ", ".join(f"{n} {name}" for name, n in counts.items())])


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
