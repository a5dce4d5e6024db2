"""The UniCL loss on one GPU against open_clip's ClipLoss and inf_cl: time, peak memory, error.

    python -m benchmarks.gpu_loss [--budget SECONDS] [--only SECTION]

Forward and backward at D 512, both directions. Ours with bfloat16 features and with float32 ones
(TF32 products); open_clip 3.3.0 under bfloat16 autocast, as its users train, and in float32 (TF32);
inf_cl 1.2.1 (`pip install inf_cl`, arXiv 2410.17243), whose kernels take float32 and TF32 products
and one direction a call. Labels play no part in the peers.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch

from benchmarks import gpu, harness
from benchmarks.gpu import Job, Row
from benchmarks.loss import SCALE, dense, inputs
from losses._core import contrast
from losses._gather import Gather

SIZES = (16384, 32768, 4096, 65536, 8192, 2048, 1024)  # most telling first
MILLION = 2**20
# ours / open_clip under autocast; ours / inf_cl.
TARGETS = {1024: 1.0, 2048: 1.0, 4096: 1.0, 16384: 0.5, 32768: 0.5}
TARGET_INF_CL = 0.7
LIMITS = {65536: (45.0, 0.6)}  # milliseconds, GiB, of ours in bfloat16
ERRORS_AT = 4096
Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Form = Callable[[Data], torch.Tensor]


def ours(data: Data) -> torch.Tensor:
    """Loss, with gradients in the inputs, which decide the precision."""
    x, y, labels, scale = data
    loss = contrast(x, y, labels, scale, Gather()).loss
    loss.backward()
    return loss


def ours_half(data: Data) -> torch.Tensor:
    """As `ours`, of bfloat16 features; gradients reach the float32 ones of `data`."""
    x, y, labels, scale = data
    loss = contrast(x.bfloat16(), y.bfloat16(), labels, scale, Gather()).loss
    loss.backward()
    return loss


def open_clip(data: Data, half: bool = False) -> torch.Tensor:
    """open_clip's ClipLoss."""
    from open_clip.loss import ClipLoss

    x, y, _, scale = data
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        loss = ClipLoss()(x, y, scale)
    loss.backward()
    return loss


def open_clip_half(data: Data) -> torch.Tensor:
    """As `open_clip`, under bfloat16 autocast."""
    return open_clip(data, half=True)


def inf_cl(data: Data) -> torch.Tensor:
    """inf_cl's flash loss of both directions."""
    from inf_cl import cal_flash_loss

    x, y, _, scale = data
    both = cal_flash_loss(x, y, scale=scale).mean() + cal_flash_loss(y, x, scale=scale).mean()
    (both / 2).backward()
    return both / 2


OURS, PEER, INF_CL = "ours, bfloat16", "open_clip, bfloat16 autocast", "inf_cl"
FORMS: dict[str, Form] = {
    OURS: ours_half,
    PEER: open_clip_half,
    INF_CL: inf_cl,
    "ours, float32": ours,
    "open_clip, float32": open_clip,
}


def compare(batch: int, forms: dict[str, Form], device: torch.device) -> Iterator[Row]:
    """Time and memory of every form at one size, then the ratios."""
    found = {}
    for name, form in forms.items():
        data = inputs(batch, device=device.type)

        def clean(data=data, form=form) -> None:
            for value in data:
                value.grad = None
            form(data)

        try:
            found[name], gib = gpu.measure(clean, device, rounds=2 if batch >= MILLION else 5)
        except torch.cuda.OutOfMemoryError:
            yield {"name": f"{name}: out of memory", "B": batch}
            continue
        finally:
            del data, clean
            if device.type == "cuda":
                torch.cuda.empty_cache()
        limits = LIMITS.get(batch, (None, None)) if name == OURS else (None, None)
        yield harness.row(f"{name}, ms", 1000 * found[name], limits[0], B=batch)
        yield harness.row(f"{name}, peak GiB", gib, limits[1], B=batch)
    for peer, target in ((PEER, TARGETS.get(batch)), (INF_CL, TARGET_INF_CL)):
        if OURS in found and peer in found:
            ratio = found[OURS] / found[peer]
            yield harness.row(f"time, {OURS} / {peer}", ratio, target, B=batch)


def errors(name: str, form: Form, batch: int, scale: float, device: torch.device) -> Iterator[Row]:
    """Relative error of the loss and of both gradients (norm) against float64, of one form.

    For the peers all labels are -1, the only ones they know.
    """
    x, y, labels, multiplier = inputs(batch, scale, device.type)
    data = (x, y, labels if "ours" in name else torch.full_like(labels, -1), multiplier)
    loss = form(data)
    exact = tuple(v.detach().double() if v.is_floating_point() else v for v in data)
    for value in (exact[0], exact[1], exact[3]):
        value.requires_grad_()
    expected = dense(batch, exact)
    found = {"loss": float((loss.detach() - expected.detach()).abs() / expected.detach())}
    for side, a, e in zip(("image", "text"), data, exact, strict=False):
        found[side] = float((a.grad - e.grad).norm() / e.grad.norm())
    facts = {"B": batch, "scale": round(scale, 2), "error_of_loss": found["loss"]}
    worst = max(found["image"], found["text"])
    yield {"name": f"{name}, relative error of the gradient", "value": worst, **facts}


def present() -> tuple[dict[str, Form], list[Row]]:
    """The forms that can run here, and a row for one that cannot."""
    if find_spec("inf_cl"):
        return FORMS, []
    rest = {name: form for name, form in FORMS.items() if name != INF_CL}
    return rest, [{"name": "inf_cl: not installed (pip install inf_cl)"}]


def sections(device: torch.device, sizes=SIZES, million=MILLION, errors_at=ERRORS_AT):
    """`sizes`, `errors` and `million`, the jobs of each."""
    forms, missing = present()

    def by_size() -> Iterator[Job]:
        for number, batch in enumerate(sizes):
            yield Job("time", lambda batch=batch: compare(batch, forms, device), 8, {"B": batch})
            if number == 0 and missing:
                yield Job(INF_CL, lambda: missing, 0)

    def by_scale() -> Iterator[Job]:
        for scale in (100.0, SCALE):
            for name, form in forms.items():
                arguments = (name, form, errors_at, scale, device)
                yield Job(f"{name}, error", lambda a=arguments: errors(*a), 5)

    def largest() -> Iterator[Job]:
        only = {OURS: forms[OURS]}
        yield Job(OURS, lambda: compare(million, only, device), 60, {"B": million})

    return {"sizes": by_size, "errors": by_scale, "million": largest}


if __name__ == "__main__":
    gpu.main("gpu_loss", sections(torch.device("cuda")))
