"""open_clip 3.3.0 training given towers on one device: its model, its loss, its own loop.

`open_clip_train.train.train_one_epoch` runs as its users run it (`--precision amp_bf16`, AdamW,
optionally `--torchcompile` and `--accum-freq`), on batches that lie on the device.
"""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import gpu
from benchmarks.step_data import write_weights

WARM_UP, TIMED = 2, 4  # steps


class Batches:
    """What its loop takes for a data loader: the same (images, texts) pairs again and again."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]], steps: int):
        self.batches, self.num_batches = batches, steps * len(batches)
        self.num_samples = self.num_batches * len(batches[0][0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(self.num_batches):
            yield self.batches[number % len(self.batches)]


def build(model: dict[str, Any], folder: Path, device: torch.device) -> nn.Module:
    """Its model of a `model:` section, with the weights that ours starts from."""
    import open_clip

    weights = write_weights(folder, model, seed=0)
    made = open_clip.create_model(f"local-dir:{weights}", device=device, output_dict=True)
    return made.train()


def steps(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], compiled: bool, device: torch.device
) -> tuple[float, float]:
    """(seconds of a step, peak GiB of the process) on micro-batches of one global batch."""
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    settings = SimpleNamespace(
        device=str(device), precision="amp_bf16", accum_freq=len(batches), distill=False,
        skip_scheduler=True, horovod=False, grad_clip_norm=None, log_every_n_steps=math.inf,
        world_size=1, rank=0, local_rank=0, log_local=False, batch_size=len(batches[0][0]),
        wandb=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6)
    trained = torch.compile(model) if compiled else model

    def run(count: int) -> float:
        source = SimpleNamespace(dataloader=Batches(batches, count), set_epoch=lambda epoch: None)
        rest = (ClipLoss(), 0, optimizer, None, None, None, settings)
        gpu.wait(device)
        start = time.perf_counter()
        train_one_epoch(trained, {"train": source}, *rest)
        gpu.wait(device)
        return (time.perf_counter() - start) / count

    run(WARM_UP)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = run(TIMED)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return seconds, peak / 2**30
