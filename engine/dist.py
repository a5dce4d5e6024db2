"""The group that joins the processes: how they meet, what they agree on, and words about ranks.

What a process knows before it meets the others is in `engine.launch`. Nothing here imports
deepspeed. `python -m engine.dist_check` tries all of it.
"""

import os
import socket
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put engine/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.distributed as dist

from engine.launch import map_environment
from loaders.errors import DataError


def initialise(timeout_minutes: float = 30) -> torch.device:
    """Join the process group and choose this rank's device.

    Args:
        timeout_minutes: for the ranks to arrive, and for every collective operation after that.

    Returns:
        `cuda:LOCAL_RANK` where CUDA is available (nccl), else `cpu` (gloo). Under `srun` with
        one visible device per task that device is taken.

    Raises:
        DataError: names the ranks that did not arrive in time; or no network between them.
    """
    map_environment(os.environ)
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        local = int(os.environ["LOCAL_RANK"])
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
        # cuDNN's attention, which torch prefers on Hopper, builds a plan for every new shape, which
        # takes the host tens of milliseconds, and batches of texts have many. Flash attention has
        # no plans.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Products of float32 weights in TF32, as open_clip and timm train; convolutions are by
        # torch's default. Sums stay float32.
        torch.set_float32_matmul_precision("high")
    if not dist.is_initialized():
        store = _meet(timeout_minutes)
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=store,
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                timeout=timedelta(minutes=timeout_minutes),
                # Else nccl connects at the first collective, and guesses the device of a barrier.
                device_id=device if cuda else None,
            )
        except RuntimeError as error:
            raise DataError(
                f"rank {os.environ['RANK']} on {socket.gethostname()}: all ranks arrived, but no "
                f"connection between them: {first_line(error)}. NCCL_SOCKET_IFNAME or "
                "GLOO_SOCKET_IFNAME names the network interface to use"
            ) from None
    return device


def connect(timeout: timedelta, serve: bool = False) -> dist.Store:
    """A connection of its own to the key-value store through which the ranks meet.

    Args:
        timeout: of waiting for the store and for keys. serve: keep the store in this process,
            unless torchrun's agent already keeps it at this address.
    """
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=serve and not agent,
        timeout=timeout,
        wait_for_workers=False,
    )
    # The agent's store outlives a restart of its ranks; old keys must not greet new ranks.
    return dist.PrefixStore(f"unicl/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _meet(timeout_minutes: float) -> dist.Store:
    """The store, once all ranks have written their names; raises DataError with those missing."""
    own, ranks = int(os.environ["RANK"]), range(int(os.environ["WORLD_SIZE"]))
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    limit = timedelta(minutes=timeout_minutes)
    here = f"rank {own} on {socket.gethostname()}"
    try:
        store = connect(limit, serve=own == 0)
    except dist.DistError as error:
        trouble = "cannot listen" if own == 0 else f"rank 0 of {len(ranks)} did not arrive"
        raise DataError(
            f"{here}: {trouble} at {place} ({first_line(error)}). Is the port free on the node of "
            "rank 0, and open to the other nodes? MASTER_ADDR and MASTER_PORT choose another place"
        ) from None
    try:
        store.set(f"here/{own}", socket.gethostname())
        store.wait([f"here/{r}" for r in ranks], limit)
    except dist.DistNetworkError as error:
        raise DataError(
            f"{here}: rank 0 at {place} left while this rank waited for the others; its own "
            f"message says why ({first_line(error)})"
        ) from None
    except dist.DistStoreError:
        raise DataError(absent(store, "here", ranks, f"at {place}", timeout_minutes)) from None
    return store


def absent(
    store: dist.Store, key: str, ranks: Sequence[int], where: str, timeout_minutes: float
) -> str:
    """Words that name the ranks without `key`/RANK in the store; `where`: "at the all-reduce"."""
    missing = [r for r in ranks if not store.check([f"{key}/{r}"])]
    return (
        f"{spans(missing)} of {len(ranks)} did not arrive {where} within {timeout_minutes:g} "
        "minutes; look for their own messages and at their nodes, and check that the launcher "
        "started as many processes as WORLD_SIZE says"
    )


def spans(ranks: Sequence[int]) -> str:
    """`rank 3` or `ranks 0-2, 5` for a sorted list of ranks."""
    runs: list[list[int]] = []
    for number in ranks:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {words}"


def first_line(error: BaseException) -> str:
    """What an error says, without the lines after the first; its type where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def rank() -> int:
    """Rank of this process; 0 where no group was joined."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 where no group was joined."""
    return dist.get_world_size() if dist.is_initialized() else 1


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest of the ranks' numbers: how they agree to stop at the same step, and why."""
    number = torch.tensor([value], device=device)
    if dist.is_initialized():
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number.item())


class LateMaximum:
    """`max_over_ranks` in every step, for which no host waits until its device is idle.

    On GPUs a call starts the reduction and the copy of its result, and returns the result of the
    call before, on all ranks alike: the device is then at most a step behind, and has work. On
    CPUs, or with one rank, there is nothing to wait for and the result is that of this call.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.late = device.type == "cuda" and world_size() > 1
        self.before: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def __call__(self, value: int) -> int:
        """The largest of the ranks' numbers, of this call or of the one before (0: none)."""
        if world_size() == 1:
            return value
        if not self.late:
            return max_over_ranks(value, self.device)
        number = torch.full((1,), value, device=self.device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        result = torch.empty(1, dtype=number.dtype, pin_memory=True)
        result.copy_(number, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        before, self.before = self.before, (result, event)
        if before is None:
            return 0
        before[1].synchronize()
        return int(before[0])


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of a float64 vector over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def finish() -> None:
    """Leave the process group in an orderly way."""
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    import runpy
    import sys

    from loaders.errors import launched_rank

    if launched_rank() == 0:
        print(
            "`python -m engine.dist --check` is now `python -m engine.dist_check`; the old name "
            "works for one release more",
            file=sys.stderr,
        )
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--check"]
    runpy.run_module("engine.dist_check", run_name="__main__", alter_sys=True)
