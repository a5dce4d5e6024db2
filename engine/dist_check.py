"""Try how the processes of a job find each other, before a long run depends on it.

    srun --kill-on-bad-exit=1 python -m engine.dist_check
    torchrun --nproc_per_node 8 -m engine.dist_check

shows ranks, nodes, devices and versions, and tries one all-reduce.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a file: Python put engine/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from loaders.errors import CommandParser, DataError, run_cli

if TYPE_CHECKING:
    import torch


def check(timeout_minutes: float) -> str | None:
    """Meet, try one all-reduce, and describe the job; the table on rank 0, None on the others.

    Raises:
        DataError: ranks that did not arrive or stopped on the way, by name; an all-reduce that
            does not finish or has a wrong result; different versions on different ranks.
    """
    # Late, as below: torch takes seconds, and --help should not.
    import torch
    import torch.distributed

    from engine import dist

    device = dist.initialise(timeout_minutes)
    ranks = range(dist.world_size())
    store = dist.connect(timedelta(minutes=timeout_minutes))
    store.set(f"facts/{dist.rank()}", json.dumps(_facts(device)))
    number = torch.tensor([float(dist.rank() + 1)], device=device)
    start = time.perf_counter()
    work = torch.distributed.all_reduce(number, async_op=True)
    # Polled, because nccl ends the process at its own time-out before anything can be said.
    while not work.is_completed():
        if time.perf_counter() - start > 0.9 * 60 * timeout_minutes:
            raise DataError(_unfinished(store, ranks, timeout_minutes))
        time.sleep(0.001)
    try:
        work.wait()
    except RuntimeError as error:
        raise DataError(f"the all-reduce failed: {dist.first_line(error)}") from None
    total, expected = int(number.item()), len(ranks) * (len(ranks) + 1) // 2
    seconds = time.perf_counter() - start
    if total != expected:
        raise DataError(f"rank {dist.rank()}: the all-reduce gave {total} instead of {expected}")
    if dist.rank():
        return None
    return _table([json.loads(store.get(f"facts/{r}")) for r in ranks], total, seconds)


def _unfinished(
    store: torch.distributed.Store, ranks: Sequence[int], timeout_minutes: float
) -> str:
    from engine import dist

    if not all(store.check([f"facts/{r}"]) for r in ranks):
        return dist.absent(store, "facts", ranks, "at the all-reduce", timeout_minutes)
    return (
        f"all {len(ranks)} ranks arrived, but an all-reduce did not finish within "
        f"{timeout_minutes:g} minutes: a rank stopped, or the network between the nodes is not the "
        "one that is used. NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names the interface; "
        "NCCL_DEBUG=INFO shows what is tried"
    )


def _facts(device: torch.device) -> dict[str, Any]:
    import torch

    from engine import dist

    cuda = device.type == "cuda"
    versions = {name: metadata.version(name) for name in ("torch", "deepspeed")}
    versions["CUDA"] = torch.version.cuda or "none"
    nccl = torch.cuda.nccl.version() if cuda else ("none",)
    versions["NCCL"] = ".".join(str(part) for part in nccl)
    versions["Python"] = platform.python_version()
    name = f" {torch.cuda.get_device_name(device)}" if cuda else ""
    return {
        "rank": str(dist.rank()),
        "local rank": os.environ["LOCAL_RANK"],
        "node": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        "process": str(os.getpid()),
        "device": f"{device}{name}",
        "backend": torch.distributed.get_backend(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _table(facts: list[dict[str, Any]], total: int, seconds: float) -> str:
    """One line per rank, then what is common to all."""
    from engine import dist

    by_version: dict[str, list[int]] = {}
    for number, row in enumerate(facts):
        by_version.setdefault(row.pop("versions"), []).append(number)
    if len(by_version) > 1:
        found = "; ".join(f"{dist.spans(ranks)}: {words}" for words, ranks in by_version.items())
        raise DataError(f"ranks run different versions, use one environment for all: {found}")
    rows = [list(facts[0]), *(list(row.values()) for row in facts)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    nodes = len({row["node"] for row in facts})
    return "\n".join(
        [
            *lines,
            f"ranks {len(facts)}, nodes {nodes}, rank 0 at {os.environ['MASTER_ADDR']} port "
            f"{os.environ['MASTER_PORT']}",
            next(iter(by_version)),
            f"all-reduce over {len(facts)} ranks: {total}, as expected, {1000 * seconds:.1f} ms",
        ]
    )


def main() -> None:
    """Command line of this file."""
    parser = CommandParser(
        prog="python -m engine.dist_check",
        description="Try how the processes of a job find each other.",
    )
    parser.add_argument("--timeout-minutes", type=float, default=2, metavar="M")
    arguments = parser.parse_args()
    from engine import dist

    table = check(arguments.timeout_minutes)
    if table:
        print(table, flush=True)
    dist.finish()


if __name__ == "__main__":
    run_cli(main)
