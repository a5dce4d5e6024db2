"""Any method and its towers on a device in float32, against itself on the CPU in float64."""

import contextlib
from collections.abc import Iterator

import torch

import losses
from engine.step import total_loss
from losses._gather import Gather
from tests.engine import tiny

SIZE = 24


def batch(method: type) -> dict[str, torch.Tensor]:
    """As many views as the method wants, half of the samples labelled where it takes both."""
    made = tiny.make_batch(0, SIZE)
    images, texts = len(method.images), len(method.texts)
    generator = torch.Generator().manual_seed(7)
    made["image"] = torch.randn(SIZE, images, 3, 32, 32, generator=generator)
    made["text"] = torch.randint(1, 49000, (SIZE, texts, 12), generator=generator)
    made["text"][..., -1] = 49407
    made["augmentation"] = torch.rand(SIZE, images, 13, generator=generator)
    made["label"] = torch.arange(SIZE) % 5
    if not method.needs_labels:
        made["label"][::2] = -1
    return made


def passes(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """`loss` and the gradient of every parameter, on the CPU in float64."""
    module = tiny.build(name).to(device, dtype)
    values = batch(losses.find(name))
    values["image"] = values["image"].to(dtype)
    values = {key: value.to(device) for key, value in values.items()}
    with exact_products():
        with torch.no_grad():  # queues are empty before the first step
            module(values, Gather())
            module.method.step_end()
        out = module(values, Gather())
        loss = total_loss(out)
        loss.backward()
    found = {"loss": loss.detach()}
    found |= {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
    return {key: value.double().cpu() for key, value in found.items()}


def worst(name: str, device: torch.device) -> tuple[float, float]:
    """Relative error of the loss, and the largest error of a gradient over the largest gradient of
    its parameter or, for a parameter with hardly any, a thousandth of the largest of all."""
    exact = passes(name, torch.float64, torch.device("cpu"))
    found = passes(name, torch.float32, device)
    assert found.keys() == exact.keys()
    scale = max(float(value.abs().max()) for key, value in exact.items() if key != "loss")
    errors = [
        float((found[key] - value).abs().max()) / max(float(value.abs().max()), 1e-3 * scale)
        for key, value in exact.items()
        if key != "loss"
    ]
    return float((found["loss"] - exact["loss"]).abs() / exact["loss"].abs()), max(errors)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products in float32, not in TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
