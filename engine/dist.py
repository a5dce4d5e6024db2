"""Processes: who am I, who are the others, and a group that joins us.

Works the same under `deepspeed`, `torchrun`, `srun` (one task per device, no launcher between)
and plain `python`. Nothing here imports deepspeed, so evaluation can use it.

    srun python -m engine.dist --check      # or torchrun -m engine.dist --check

shows ranks, nodes, devices and versions, and tries one all-reduce.
"""

import os
import re
import socket
import subprocess
import sys
from collections.abc import MutableMapping, Sequence
from datetime import timedelta
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put engine/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.distributed as dist

from loaders.errors import ConfigError, DataError, run_cli

# torch's name of a variable, and where other launchers put the same number.
_SOURCES = {
    "RANK": ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"),
    "WORLD_SIZE": ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
    "LOCAL_RANK": ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
}


def map_environment(env: MutableMapping[str, str]) -> None:
    """Fill RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT from what the launcher gave.

    Variables that are set already win. SLURM's are used only inside an `srun` step (they are
    present in a batch script too, where they describe no process). The port under SLURM is
    10000 + job id modulo 50000, so that jobs that share a node do not meet.

    Raises:
        ConfigError: several processes but no address of the first one.
    """
    in_step = "SLURM_STEP_ID" in env and env.get("SLURM_STEP_ID") != "4294967291"
    for name, others in _SOURCES.items():
        for other in others:
            if name not in env and other in env and (in_step or not other.startswith("SLURM")):
                env[name] = env[other]
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", "0")
    if "MASTER_ADDR" not in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
        if in_step and nodes:
            env["MASTER_ADDR"] = address(first_host(nodes))
        elif env["WORLD_SIZE"] == "1":
            env["MASTER_ADDR"] = "127.0.0.1"
        else:
            raise ConfigError(
                f"this is rank {env['RANK']} of {env['WORLD_SIZE']}, but MASTER_ADDR is not set: "
                "start with torchrun, deepspeed or srun, or export the address of rank 0"
            )
    if "MASTER_PORT" not in env:
        job = re.match(r"\d+", env.get("SLURM_JOB_ID", ""))
        single = env["WORLD_SIZE"] == "1"
        env["MASTER_PORT"] = str(
            free_port() if single else 10000 + int(job.group()) % 50000 if job else 29500
        )


def first_host(nodes: str) -> str:
    """First host name of a SLURM node list such as `gpu[03-05,07],login1`.

    Asks `scontrol`, which knows every form; without it expands the common bracket form.
    """
    try:
        answer = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        return answer.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        head = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
        return head.group(1) + (head.group(2) or "")


def address(host: str) -> str:
    """What other nodes reach a SLURM node by: its name, or where that does not resolve, as on
    cloud or virtual nodes, the `NodeAddr` that SLURM itself uses.

    The name comes first because asking the controller from every rank of a large job is slow.
    """
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    try:
        answer = subprocess.run(
            ["scontrol", "show", "node", "-o", host], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return host
    found = re.search(r"\bNodeAddr=(\S+)", answer.stdout)
    return found.group(1) if found else host


def free_port() -> int:
    """A TCP port that is free on this host now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


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
    if not dist.is_initialized():
        store = _meet(timeout_minutes)
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=store,
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                timeout=timedelta(minutes=timeout_minutes),
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
    from engine.dist_check import main

    run_cli(main)
