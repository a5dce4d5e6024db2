"""The UniCL loss on one GPU against open_clip's ClipLoss: time, peak memory, error.

    python -m benchmarks.gpu_loss

Forward and backward at D 512. Ours in float32, and as in a bfloat16 training: products of bfloat16
inputs and float32 sums. The peer under bfloat16 autocast, as its users train, and in float32.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import gpu, harness
from benchmarks.loss import SCALE, dense, inputs
from losses._core import contrast
from losses._gather import Gather

SIZES = (4096, 8192, 16384, 32768, 65536, 131072)
TARGETS = {65536: (0.045, 1.0)}  # seconds, GiB
Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def ours(data: Data, precision: torch.dtype) -> torch.Tensor:
    """Loss, with gradients in the inputs."""
    x, y, labels, scale = data
    loss = contrast(x, y, labels, scale, Gather(), precision=precision).loss
    loss.backward()
    return loss


def open_clip(data: Data, half: bool) -> torch.Tensor:
    """open_clip's ClipLoss (labels play no part)."""
    from open_clip.loss import ClipLoss

    x, y, _, scale = data
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        loss = ClipLoss()(x, y, scale)
    loss.backward()
    return loss


def errors(batch: int, scale: float, precision: torch.dtype) -> dict[str, float]:
    """Relative error of the loss and of both gradients (norm) against float64."""
    data = inputs(batch, scale, "cuda")
    loss = ours(data, precision)
    exact = tuple(v.detach().double() if v.is_floating_point() else v for v in data)
    for value in (exact[0], exact[1], exact[3]):
        value.requires_grad_()
    expected = dense(batch, exact)
    found = {"loss": float((loss - expected).abs() / expected)}
    for name, a, e in zip(("image", "text"), data, exact, strict=False):
        found[name] = float((a.grad - e.grad).norm() / e.grad.norm())
    return found


def timed(name: str, run: Callable[[Data], object], batch: int, targets: bool) -> Iterator[dict]:
    """Rows of time and memory of one form at one size."""
    data = inputs(batch, device="cuda")

    def clean() -> None:
        for value in data:
            value.grad = None
        run(data)

    measured = gpu.fits(lambda: gpu.measure(clean))
    if measured is None:
        yield {"name": f"{name}: out of memory", "B": batch}
        return
    limits = TARGETS.get(batch, (None, None)) if targets else (None, None)
    yield harness.row(f"{name}, ms", 1000 * measured[0], limits[0] and 1000 * limits[0], B=batch)
    yield harness.row(f"{name}, peak GiB", measured[1], limits[1], B=batch)


def rows() -> Iterator[dict]:
    """Errors, then every form and size."""
    for precision in (torch.bfloat16, torch.float32):
        for scale in (SCALE, 100.0):
            found = errors(4096, scale, precision)
            yield {"name": "relative error to float64", "precision": str(precision), "B": 4096,
                   "scale": round(scale, 2), **found}  # fmt: skip
    forms = {
        "ours, bfloat16": partial(ours, precision=torch.bfloat16),
        "ours, float32": partial(ours, precision=torch.float32),
        "open_clip, bfloat16 autocast": partial(open_clip, half=True),
        "open_clip, float32": partial(open_clip, half=False),
    }
    for batch in SIZES:
        for name, form in forms.items():
            yield from timed(name, form, batch, name == "ours, bfloat16")


if __name__ == "__main__":
    gpu.main("gpu_loss", rows)
