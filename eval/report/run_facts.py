"""When, how, with which code and at what cost a run was trained, from what its folder holds."""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from models.provenance import ENVIRONMENT, starts_up_to

UNKNOWN = "not recorded"


@dataclass(frozen=True)
class RunFacts:
    """Facts of a training up to the checkpoint that was evaluated; None where the folder does not
    tell. A run may have been started several times.

    Args:
        begun, ended: of the steps that count. seconds: of these starts, from each start to the
            last line of its log that counts; steps that were lost with a killed start and made
            again count once. rank_seconds: the same, times the number of processes.
        devices: kinds. ranks: of the last start. commits, commands: of the starts, in order.
    """

    step: int
    samples: int | None = None
    begun: datetime | None = None
    ended: datetime | None = None
    seconds: float | None = None
    rank_seconds: float | None = None
    devices: tuple[str, ...] = ()
    ranks: int | None = None
    commits: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


def read(folder: Path, step: int, log: list[dict]) -> RunFacts:
    """Facts of the run in `folder` up to `step`; `log` are the lines of its metrics.jsonl."""
    log = [line for line in log if line["step"] <= step]
    samples = next((line["samples"] for line in reversed(log) if "samples" in line), None)
    path = folder / ENVIRONMENT
    starts = json.loads(path.read_text(encoding="utf-8"))["starts"] if path.is_file() else []
    made = starts_up_to(starts, step)
    if not made or not all({"time", "ranks"} <= start.keys() for start in made):
        return RunFacts(step, samples)
    lives = [_life(start, nxt, log) for start, nxt in zip(made, [*made[1:], None], strict=True)]
    known = all(life is not None for life in lives)
    devices = [m["device"] for start in made for m in start.get("machines", [])]
    return RunFacts(
        step,
        samples,
        begun=datetime.fromisoformat(made[0]["time"]),
        ended=lives[-1] and lives[-1][1],
        seconds=sum(_seconds(life) for life in lives) if known else None,
        rank_seconds=(
            sum(_seconds(life) * start["ranks"] for life, start in zip(lives, made, strict=True))
            if known
            else None
        ),
        devices=tuple(dict.fromkeys(devices)),
        ranks=made[-1]["ranks"],
        commits=tuple(dict.fromkeys(_commit(start) for start in made)),
        commands=tuple(dict.fromkeys(start["command"] for start in made if "command" in start)),
    )


def _life(start: dict, following: dict | None, log: list[dict]) -> tuple[datetime, datetime] | None:
    """Begin of a start, and time of its last line that the log has; None where it has none."""
    last = following["after_step"] if following else float("inf")
    times = [line.get("time") for line in log if start["after_step"] < line["step"] <= last]
    if not times or times[-1] is None:
        return None
    return datetime.fromisoformat(start["time"]), datetime.fromisoformat(times[-1])


def _seconds(life: tuple[datetime, datetime]) -> float:
    return (life[1] - life[0]).total_seconds()


def _commit(start: dict) -> str:
    git = start.get("git")
    return git["commit"][:12] + ("-dirty" if git["changed"] else "") if git else "unknown"


def duration(seconds: float) -> str:
    """'2 h 05 min', '5 min 08 s', '8 s'."""
    whole = round(seconds)
    if whole >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def table(facts: list[RunFacts], found: list[list[dict]]) -> dict[str, list[str]]:
    """Name of a fact -> its text for each run; `found` are the result rows of each run."""
    lines: dict[str, list[str]] = {
        "step": [f"{f.step:,}" for f in facts],
        "samples seen": [f"{f.samples:,}" if f.samples else UNKNOWN for f in facts],
        "trained": [_span(f.begun, f.ended) for f in facts],
        "time": [UNKNOWN if f.seconds is None else duration(f.seconds) for f in facts],
        "cost": [_cost(f) for f in facts],
        "commit": [", ".join(f.commits) or UNKNOWN for f in facts],
        "evaluated": [_span(*_ends(rows)) for rows in found],
        "evaluated with": [
            ", ".join(dict.fromkeys(_short(r["git_hash"]) for r in rows if "git_hash" in r))
            or UNKNOWN
            for rows in found
        ],
    }
    return lines


def _cost(facts: RunFacts) -> str:
    """'0.17 process hours (2 × cpu)', '12.3 GPU hours (8 × NVIDIA H100)'."""
    if facts.rank_seconds is None:
        return UNKNOWN
    unit = "process hours" if set(facts.devices) <= {"cpu"} else "GPU hours"
    on = f"{facts.ranks} × {', '.join(facts.devices)}" if facts.devices else f"{facts.ranks}"
    hours = facts.rank_seconds / 3600
    return f"{hours:.2f} {unit} ({on})" if hours < 10 else f"{hours:,.0f} {unit} ({on})"


def _ends(rows: list[dict]) -> tuple[datetime | None, datetime | None]:
    dates = sorted(datetime.fromisoformat(row["date"]) for row in rows if "date" in row)
    return (dates[0], dates[-1]) if dates else (None, None)


def _span(first: datetime | None, last: datetime | None) -> str:
    """'2026-11-28 01:26 to 01:31 UTC', in the time zone that was recorded."""
    if first is None:
        return UNKNOWN
    zone = f" {first.tzname()}"
    text = f"{first:%Y-%m-%d %H:%M}"
    if last is None or f"{last:%Y-%m-%d %H:%M}" == text:
        return text + zone
    same = first.date() == last.date()
    return f"{text} to {last:{'%H:%M' if same else '%Y-%m-%d %H:%M'}}{zone}"


def _short(commit: str) -> str:
    return re.sub(r"([0-9a-f]{12})[0-9a-f]+", r"\1", commit)
