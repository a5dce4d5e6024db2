"""The UniCL loss over ranks against open_clip's (local_loss, gather_with_grad): traffic and time.

Traffic is what a rank receives in one forward and backward, by the definition of each collective
(a gather or reduce-scatter over n ranks brings n - 1 blocks, an all-reduce is the two in a row),
counted where `torch.distributed` hands it to the backend; how the backend carries it out may cost
more. Real gloo processes at 2 and 4 ranks; above, rank 0 of a fake backend of the full size runs
the same code with collectives that move nothing ("simulated").
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import harness
from benchmarks.loss import KEEP, inputs
from losses._core import contrast
from losses._gather import Gather, grid_shape

# Features and their gradients that a rank receives, over B * D, by number of ranks:
# 2 (p + q - 2) / R for the grids 2x1, 2x2, 4x2, 4x4, 8x8. open_clip: 4 (R - 1) / R.
EXPECTED = {2: 1.0, 4: 1.0, 8: 1.0, 16: 0.75, 64: 0.4375}


class Traffic(TorchDispatchMode):
    """Counts what this rank receives from others in the collectives called inside the context.

    Attributes:
        features: elements of matrices gathered or scattered (features and their gradients).
        bytes: of everything, labels and normalisers included.
    """

    def __init__(self):
        super().__init__()
        self.features = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self._count(function.overloadpacket.__name__, args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        # The first object among the arguments is the group.
        boxed = next(a for a in args if isinstance(a, torch.ScriptObject))
        group = dist.ProcessGroup.unbox(boxed)
        others = group.size() - 1
        if name in ("_allgather_base_", "allgather_"):  # (received, sent, ...)
            block, blocks = _tensor(args[1]), others
        elif name == "_reduce_scatter_base_":
            block, blocks = args[0], others
        elif name == "alltoall_":
            block, blocks = args[0][0], others
        elif name == "scatter_":  # from one rank, named by args[3], to the others
            block, blocks = _tensor(args[0]), int(group.rank() != args[3])
        elif name == "allreduce_":
            block, blocks = _tensor(args[0]), 2 * others / group.size()
        else:
            raise NotImplementedError(f"collective {name} is not counted")
        self.bytes += block.nbytes * blocks
        if block.ndim == 2 and name != "allreduce_":
            self.features += block.numel() * blocks


def _tensor(value: Any) -> torch.Tensor:
    """The tensor in lists of one."""
    return value if isinstance(value, torch.Tensor) else _tensor(value[0])


def ours(data: tuple[torch.Tensor, ...]) -> None:
    """One forward and backward of ours over the default group."""
    x, y, labels, scale = data
    contrast(x, y, labels, scale, Gather(), KEEP).loss.backward()


def open_clip(data: tuple[torch.Tensor, ...]) -> None:
    """open_clip's ClipLoss as its users run it on many ranks (labels play no part)."""
    from open_clip.loss import ClipLoss

    x, y, _, scale = data
    loss = ClipLoss(True, True, rank=dist.get_rank(), world_size=dist.get_world_size())
    loss(x, y, scale).backward()


def traffic(loss: Callable[[tuple], None], data: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """(features over B * D, bytes) that this rank receives in `loss(data)`."""
    with Traffic() as count:
        loss(data)
    return count.features / (data[0].numel() * dist.get_world_size()), count.bytes


def both(batch: int) -> dict[str, tuple[float, float]]:
    """`traffic` of ours and of open_clip at global batch `batch`."""
    data = inputs(batch // dist.get_world_size())
    return {"ours": traffic(ours, data), "open_clip": traffic(open_clip, data)}


def simulated(ranks: int, batch: int) -> dict[str, tuple[float, float]]:
    """`both` on rank 0 of a group whose other ranks do not exist; values are meaningless."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    return both(batch)


def on_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """`function(*args)` in gloo processes of one thread each; results in rank order."""
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(ranks, mp_context=context) as pool,
    ):
        jobs = [
            pool.submit(_rank, function, rank, ranks, f"file://{folder}/store", args)
            for rank in range(ranks)
        ]
        return [job.result() for job in jobs]


def _rank(function, rank: int, ranks: int, store: str, args: tuple) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()


def _count_and_time(batch: int, rounds: dict[int, int]) -> tuple[dict, dict]:
    """`both`, and wall seconds per round of each batch size, until the last rank is done."""
    times = {size: _time(size, number) for size, number in rounds.items()}
    return both(batch), times


def _time(batch: int, rounds: int) -> dict[str, list[float]]:
    data = inputs(batch // dist.get_world_size())

    def together(loss) -> None:
        dist.barrier()
        loss(data)
        dist.barrier()

    forms = {"ours": partial(together, ours), "open_clip": partial(together, open_clip)}
    return harness.paired(forms, rounds, time.perf_counter)


def rows(quick: bool) -> Iterator[dict]:
    """Traffic at 2 to 64 ranks, wall time at 2."""
    batch, rounds = (256, {256: 2}) if quick else (8192, {4096: 5, 8192: 5})
    two, seconds = on_ranks(_count_and_time, 2, batch, rounds)[0]
    yield from _traffic_rows(two, batch, 2, "gloo")
    yield from _traffic_rows(on_ranks(both, 4, batch)[0], batch, 4, "gloo")
    # A process each: open_clip's gather remembers the first default group it saw.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for ranks in [n for n in EXPECTED if n > 4]:
            found = pool.submit(simulated, ranks, batch).result()
            yield from _traffic_rows(found, batch, ranks, "simulated")
    for size, number in rounds.items():
        value = harness.ratio(seconds[size], "ours", "open_clip")
        target = 0.6 if size == 8192 else None
        yield harness.row(
            "wall time, ours / open_clip", value, target, B=size, ranks=2, rounds=number
        )


def _traffic_rows(found: dict, batch: int, ranks: int, how: str) -> Iterator[dict]:
    (features, total), (peer_features, peer_total) = found["ours"], found["open_clip"]
    p, q = grid_shape(ranks)
    facts = {"B": batch, "ranks": ranks, "grid": f"{p}x{q}", "how": how}
    name = "features received / (B D)"
    yield harness.row(f"{name}, ours", features, EXPECTED[ranks], **facts)
    yield harness.row(f"{name}, open_clip", peer_features, **facts)
    target = 0.5 if ranks == 2 else None
    yield harness.row(
        "features received, ours / open_clip", features / peer_features, target, **facts
    )
    yield harness.row("all bytes received, ours / open_clip", total / peer_total, **facts)


if __name__ == "__main__":
    harness.main("loss_ranks", rows)
