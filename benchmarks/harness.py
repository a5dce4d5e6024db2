"""What the benchmarks share: paired timing, peak memory, the machine's facts, one JSON line a row.

    python -m benchmarks.NAME [--quick]

Peers are timed in the same process, in turns, and compared round by round, because absolute times
move with whatever else the machine does. `--quick` shrinks a run to seconds; its rows say so.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BUDGET = 220.0  # seconds of one on a GPU, which takes less than four minutes with its start


def machine() -> dict[str, Any]:
    """Facts beside every row: processor, cores this process may use, memory, versions."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def paired(
    contenders: dict[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round; the order within a round rotates.

    `clock`: CPU seconds of the process by default, which other jobs disturb least.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            start = clock()
            contenders[name]()
            if number:  # the first round warms up
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], ours: str, peer: str) -> float:
    """Median over rounds of ours / peer."""
    return statistics.median(a / b for a, b in zip(seconds[ours], seconds[peer], strict=True))


def peak_mib(function: Callable[[], Any]) -> float:
    """Rise of the resident set's high mark during a call, in MiB (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high mark
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 1024


def parser(
    name: str, about: str | None = None, sections: Iterable[str] | None = None
) -> argparse.ArgumentParser:
    """The command line of a benchmark.

    Args:
        name: of its module; those of a GPU begin with `gpu_`. about: what it is, for --help.
        sections: of one of a GPU, where they are known.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    if name.startswith("gpu_"):
        made.add_argument(
            "--budget", type=float, default=BUDGET, help="seconds to begin jobs in (%(default)s)"
        )
        made.add_argument("--only", choices=sections, metavar="SECTION", help="one section")
    else:
        made.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    return made


def main(name: str, rows: Callable[[bool], Iterable[dict[str, Any]]]) -> None:
    """Command line of a benchmark: print each row as it comes, keep all in results/NAME.jsonl.

    A row has `name`, `value`, and where there is one `target` and `met`. Quick rows are printed
    only: they say that the benchmark works, not how fast anything is.
    """
    quick = parser(name).parse_args().quick
    facts = {"machine": machine(), "date": datetime.now(UTC).date().isoformat()}
    lines = []
    for row in rows(quick):
        line = json.dumps({"benchmark": name, **row, "quick": quick, **facts}, ensure_ascii=False)
        print(line, flush=True)
        lines.append(line)
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def row(
    name: str, value: float, target: float | None = None, at_most: bool = True, **facts
) -> dict:
    """One result; `met` compares with the target (at most, or at least)."""
    result: dict[str, Any] = {"name": name, "value": round(value, 4), **facts}
    if target is not None:
        met = value <= target if at_most else value >= target
        result |= {"target": f"{'<=' if at_most else '>='} {target}", "met": met}
    return result


def _status(key: str) -> int:
    """A figure of /proc/self/status in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")
