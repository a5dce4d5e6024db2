"""`open_clip_train.main` of open_clip_torch 3.3.0, able to train on more than one CPU process.

It hands `device_ids=[cpu]` to DistributedDataParallel, which refuses them for modules on a CPU.
Nothing else is changed.
"""

import sys

import torch

wrap = torch.nn.parallel.DistributedDataParallel


def on_cpu(module, device_ids=None, **arguments):
    """DistributedDataParallel without `device_ids`."""
    return wrap(module, **arguments)


if __name__ == "__main__":
    torch.nn.parallel.DistributedDataParallel = on_cpu
    from open_clip_train.main import main

    main(sys.argv[1:])
