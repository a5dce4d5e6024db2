"""Batches on their way to the device: while a step runs, the batch of the next one moves.

On a GPU a stream of its own copies from pinned memory and normalises, so the step before it is not
disturbed and nobody waits. On a CPU there is nothing to move, and a batch is prepared when its step
is due.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from engine.step import Batch

Prepare = Callable[[Batch], Batch]


def on_device(
    steps: Iterator[list[Batch]], device: torch.device, prepare: Prepare
) -> Iterator[list[Batch]]:
    """The micro-batches of each step, on the device and prepared.

    Args:
        steps: micro-batches of each step, in pinned memory if the device is a GPU. They are asked
            for a step ahead of it there: the step waits for the data of the next one, which it
            would have to wait for afterwards.
        prepare: called once with each micro-batch whose tensors are on the device.
    """
    if device.type == "cpu":
        for raw in steps:
            yield [prepare(_to_device(batch, device)) for batch in raw]
        return
    stream, ahead = torch.cuda.Stream(device), None
    for raw in steps:
        coming = _started(raw, device, prepare, stream)
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = coming
    if ahead is not None:
        yield _arrived(*ahead)


def _started(
    raw: list[Batch], device: torch.device, prepare: Prepare, stream: "torch.cuda.Stream"
) -> tuple[list[Batch], "torch.cuda.Event"]:
    """Batches that are being moved, and the event of their arrival."""
    with torch.cuda.stream(stream):
        moved = [prepare(_to_device(batch, device)) for batch in raw]
        event = torch.cuda.Event()
        event.record(stream)
    return moved, event


def _arrived(moved: list[Batch], event: "torch.cuda.Event") -> list[Batch]:
    """The batches, for the stream of the step, which waits for them; the host does not."""
    current = torch.cuda.current_stream()
    current.wait_event(event)
    for batch in moved:
        for value in batch.values():
            if isinstance(value, Tensor):  # else its memory is given away when the step drops it
                value.record_stream(current)
    return moved


def _to_device(batch: Batch, device: torch.device) -> Batch:
    """The tensors of a batch on the device, its step, and its list of bad samples."""
    moved = {
        key: value.to(device, non_blocking=True)
        for key, value in batch.items()
        if isinstance(value, Tensor)
    }
    return {**moved, "step": batch["step"], "bad": batch["bad"]}
