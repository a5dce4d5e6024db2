"""The UniCL loss on one process against open_clip's ClipLoss and the dense form of the paper.

Forward and backward, D 512, float32, half of the batch with labels of 1000 classes.
"""

import multiprocessing
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import harness
from losses._core import contrast
from losses._gather import Gather

DIMENSION = 512
CLASSES = 1000
SCALE = 1 / 0.07
KEEP = 64 * 2**20
KEEP_ALL = 2**62


def inputs(batch: int, scale: float = SCALE, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Unit features (B, D) that want a gradient, labels (B,), the multiplier (1,)."""
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(batch, DIMENSION), dim=-1).to(device) for _ in range(2))
    labels = torch.where(torch.arange(batch) % 2 == 0, torch.randint(CLASSES, (batch,)), -1)
    multiplier = torch.tensor([scale], device=device, requires_grad=True)
    return x.requires_grad_(), y.requires_grad_(), labels.to(device), multiplier


def ours(batch: int, keep_bytes: int, data=None) -> None:
    """One forward and backward of ours."""
    x, y, labels, scale = data or inputs(batch)
    contrast(x, y, labels, scale, Gather(), keep_bytes).loss.backward()


def dense(batch: int, data=None) -> torch.Tensor:
    """The pseudo-code of UniCL (Algorithm 1) with whole matrices; both directions share logits.

    Returns the loss, with gradients in the inputs; all in the type of the features.
    """
    x, y, labels, scale = data or inputs(batch)
    unique = labels.max() + 1 + torch.arange(batch, device=labels.device)
    own = torch.where(labels == -1, unique, labels)
    targets = (own[:, None] == own[None]).to(x.dtype)
    targets /= targets.sum(1, keepdim=True)
    logits = scale * x @ y.t()
    loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2
    loss.backward()
    return loss


def open_clip(batch: int, data=None) -> None:
    """open_clip's ClipLoss (labels play no part)."""
    from open_clip.loss import ClipLoss

    x, y, _, scale = data or inputs(batch)
    ClipLoss()(x, y, scale).backward()


def peak(function, batch: int) -> float:
    """Peak MiB of one call in a fresh process, inputs included in none."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, function, batch))
    process.start()
    value = receiver.recv()
    process.join()
    return value


def _measure(sender, function, batch: int) -> None:
    function(64)
    data = inputs(batch)
    sender.send(harness.peak_mib(partial(function, batch, data=data)))


def rows(quick: bool) -> Iterator[dict]:
    """Ratios of CPU time, and peaks of memory above the inputs."""
    sizes = {256: 2, 512: 2} if quick else {1024: 9, 2048: 9, 4096: 7, 8192: 5}
    for batch, rounds in sizes.items():
        data = inputs(batch)
        forms = {
            "ours": partial(ours, batch, KEEP, data),
            "ours, logits kept": partial(ours, batch, KEEP_ALL, data),
            "dense UniCL": partial(dense, batch, data),
            "open_clip ClipLoss": partial(open_clip, batch, data),
        }
        seconds = harness.paired(forms, rounds)
        for form, limit in (("ours", 0.62), ("ours, logits kept", 0.50)):
            target = 0.8 if batch <= 2048 else limit
            for peer in ("open_clip ClipLoss", "dense UniCL"):
                value = harness.ratio(seconds, form, peer)
                yield harness.row(
                    f"CPU time, {form} / {peer}", value, target, B=batch, rounds=rounds
                )
    memory = [(512, True)] if quick else [(4096, True), (16384, True), (131072, False)]
    for batch, peers in memory:
        target = {16384: 200, 131072: 2048}.get(batch)
        value = peak(partial(ours, keep_bytes=KEEP), batch)
        yield harness.row("peak MiB, ours", value, target, B=batch)
        if peers:
            for name, peer in (("dense UniCL", dense), ("open_clip ClipLoss", open_clip)):
                yield harness.row(f"peak MiB, {name}", peak(peer, batch), B=batch)


if __name__ == "__main__":
    harness.main("loss", rows)
