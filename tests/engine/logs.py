"""What metrics.jsonl of a run says, and what of it two equal runs share."""

import json
from pathlib import Path

TIMED = {
    "time", "samples_per_second", "data_seconds", "eta_seconds", "data_share", "speed_ratio",
    "memory_gb",
}  # fmt: skip


def records(folder: Path) -> list[dict]:
    """The lines of the file."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder: Path) -> list[dict]:
    """`records` without what a clock or the machine says."""
    return [{k: v for k, v in record.items() if k not in TIMED} for record in records(folder)]
