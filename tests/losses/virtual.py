"""Many ranks in one process, as threads joined by PyTorch's in-process group."""

import threading
import traceback

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg


def run(function, world_size, *args):
    """`function(rank, *args)` on every rank; results in rank order.

    The collectives move real data between the threads; only the wire is missing. Raises with
    the traceback of the first rank that failed.
    """
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    multi_threaded_pg._install_threaded_pg()
    store, results, errors = dist.HashStore(), [None] * world_size, []

    def rank_main(rank):
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            results[rank] = function(rank, *args)
            dist.destroy_process_group()
        except Exception as error:
            errors.append(f"rank {rank}: {traceback.format_exc()}")
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)

    threads = [threading.Thread(target=rank_main, args=(r,)) for r in range(world_size)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    finally:
        multi_threaded_pg._uninstall_threaded_pg()
        multi_threaded_pg.ProcessLocalGroup.reset()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    assert not errors, errors[0]
    return results
