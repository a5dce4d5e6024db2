"""Runs a function in N real processes joined by a gloo group, and returns their results."""

import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What most tests and train.py import anyway. A fork server has it loaded already, so that a process
# starts in a tenth of a second, not in the ten seconds that these take.
HEAVY = (
    "engine.run", "eval.tasks.checkpoint", "losses.unicl", "omegaconf._impl",
    "deepspeed", "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops", "deepspeed.ops.triton_ops",
    "deepspeed.runtime.zero.stage_1_and_2",
    "setuptools", "tests.warmed",
)  # fmt: skip


def fork_server():
    """A `multiprocessing` context whose processes are forked from a server with HEAVY loaded."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(HEAVY))
    return context


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`function(rank, world_size, *args)` in `world_size` processes; results in rank order.

    The function must be importable (top level of a test module). Raises with the traceback of
    the first process that failed.
    """
    context = fork_server()
    queue = context.Queue()
    shared = free_port(), queue, args, dict(os.environ)
    processes = [
        context.Process(target=_child, args=(function, rank, world_size, *shared))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, value, error = queue.get(timeout=300)
            assert error is None, f"rank {rank}:\n{error}"
            results[rank] = value
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return [results[rank] for rank in range(world_size)]


def _child(function, rank, world_size, port, queue, args, environment):
    os.environ.clear()  # of the moment when the server started
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        value = function(rank, world_size, *args)
        # Plain data only: a tensor in shared memory would die with this process.
        queue.put((rank, _to_numpy(value), None))
        dist.barrier()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        queue.close()
        queue.join_thread()
        os._exit(0)


def _to_numpy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, dict):
        return {key: _to_numpy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_numpy(item) for item in value]
    return value


def wait_for_lines(path, count, process):
    """Until a file that `process` writes has so many lines."""
    deadline = time.monotonic() + 200
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
