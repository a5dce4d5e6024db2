"""What the GPU benchmarks share: is there one, its name and rate, time and memory of a call."""

import gc
import json
import statistics
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from benchmarks import harness

# Dense bfloat16 FLOP/s by what the name of the device holds (NVIDIA's data sheets, SXM).
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def main(name: str, rows: Callable[[], Iterable[dict[str, Any]]]) -> None:
    """Print each row as it comes and keep all in results/NAME.jsonl; without a GPU say so."""
    if not torch.cuda.is_available():
        print(f"no GPU: {name} measures nothing")
        return
    torch.backends.cuda.matmul.allow_tf32 = True
    facts = {
        "gpu": torch.cuda.get_device_name(),
        "torch": version("torch"),
        "date": datetime.now(UTC).date().isoformat(),
    }
    harness.RESULTS.mkdir(exist_ok=True)
    with (harness.RESULTS / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for row in rows():
            line = json.dumps({"benchmark": name, **row, **facts})
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()


def peak_flops() -> float | None:
    """Of the present device; None if it is not in PEAKS."""
    name = torch.cuda.get_device_name()
    return next((rate for part, rate in PEAKS.items() if part in name), None)


def measure(function: Callable[[], Any], rounds: int = 5) -> tuple[float, float]:
    """(median seconds, peak GiB above what was allocated before) of a call, warmed up once."""
    gc.collect()
    torch.cuda.empty_cache()
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return statistics.median(seconds), (torch.cuda.max_memory_allocated() - before) / 2**30


def fits(function: Callable[[], Any]) -> Any | None:
    """What the function returns, or None if the device's memory is too small."""
    try:
        return function()
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()
