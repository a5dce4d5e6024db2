"""What the GPU benchmarks share: the command line, a budget, time and memory of a call.

    python -m benchmarks.gpu_NAME [--budget SECONDS] [--only SECTION]

Rows are made by jobs, the most telling first. Each row goes to `results/gpu_NAME.jsonl` as soon as
it is measured, with the card's name. A job that would not be done within the budget is left out,
and its row says so; one that needs more memory than the card has says that. With `--only` the rows
of other sections stay in the file.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness

# Dense bfloat16 FLOP/s by what the name of the device holds (NVIDIA's data sheets, SXM).
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
Row = dict[str, Any]


@dataclass
class Job:
    """A measurement that gives some rows.

    Attributes:
        name: of the row that says why there is none. run: gives the rows, one by one.
        needs: seconds that it takes at most, roughly. facts: what tells it from others of its name.
    """

    name: str
    run: Callable[[], Iterable[Row]]
    needs: float = 5.0
    facts: Row = field(default_factory=dict)


Sections = dict[str, Callable[[], Iterable[Job]]]


def main(name: str, sections: Sections) -> None:
    """Command line of a benchmark; without a GPU it says so and measures nothing."""
    arguments = harness.parser(name, sections=list(sections)).parse_args()
    if not torch.cuda.is_available():
        print(f"no GPU: {name} measures nothing")
        return
    torch.backends.cuda.matmul.allow_tf32 = True
    facts = {
        "gpu": torch.cuda.get_device_name(),
        "torch": version("torch"),
        "date": datetime.now(UTC).date().isoformat(),
    }
    chosen = {arguments.only: sections[arguments.only]} if arguments.only else sections
    rows = execute(chosen, arguments.budget)
    harness.RESULTS.mkdir(exist_ok=True)
    write(harness.RESULTS / f"{name}.jsonl", ({"benchmark": name, **r, **facts} for r in rows),
          set(chosen))  # fmt: skip


def execute(sections: Sections, budget: float) -> Iterator[Row]:
    """The rows of all jobs that fit into `budget` seconds, each with its `section`."""
    deadline = time.monotonic() + budget
    for section, jobs in sections.items():
        for job in jobs():
            shared = {"section": section, **job.facts}
            if time.monotonic() + job.needs > deadline:
                yield {"name": f"{job.name}: no time left", **shared}
                continue
            try:
                for row in job.run():
                    yield {**row, **shared}
            except torch.cuda.OutOfMemoryError:
                yield {"name": f"{job.name}: out of memory", **shared}
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def write(path: Path, rows: Iterable[Row], sections: set[str]) -> None:
    """Rows into a file of results and onto the screen, at once; earlier rows of other sections
    stay."""
    kept = []
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [
            line for line in lines if json.loads(line).get("section", "") not in sections | {""}
        ]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in kept)
        for row in rows:
            line = json.dumps(row)
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()


def peak_flops() -> float | None:
    """Of the present device; None if it is not in PEAKS."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((rate for part, rate in PEAKS.items() if part in name), None)


def measure(
    function: Callable[[], Any], device: torch.device, rounds: int = 5
) -> tuple[float, float]:
    """(median seconds, peak GiB above what was allocated before) of a call, warmed up once.

    On a CPU, where only the logic is tried, the second is 0.
    """
    cuda = device.type == "cuda"
    gc.collect()
    function()
    wait(device)
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    return statistics.median(seconds), peak / 2**30


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
