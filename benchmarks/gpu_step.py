"""Training on one GPU: UniCL's towers at growing micro-batches, then whole steps under ZeRO-1.

    python -m benchmarks.gpu_step

Swin-T at 224 pixels and the text transformer of 12 layers and width 512, bfloat16, synthetic
images and captions of 10 to 30 tokens that lie on the device: no data loading. Model FLOP
utilisation counts the FLOPs of one plain forward and backward pass (torch.utils.flop_counter) per
sample, whatever is computed again, over the device's dense bfloat16 rate.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import losses
import models
from benchmarks import gpu, harness
from engine import compilation, deepspeed_engine, dist, optim
from engine.config import OptimConfig
from engine.step import Batch, Stepper
from losses._gather import Gather

MODEL = {"image": {"name": "swin_tiny", "size": 224}, "text": {}, "embed_dim": 512}
CONTEXT, END_TOKEN, LENGTHS = 77, 49407, (10, 30)
MICRO_BATCHES = (128, 256, 512, 1024, 2048)
STEPS_AT = (4096, 16384)
MICRO_BATCH, GRAPH_GB = 512, 60  # of the whole steps
BUDGET = 540  # seconds; what has not begun by then is left out and said


def make_module(
    device: torch.device, compiled: bool, checkpointing: bool
) -> deepspeed_engine.TrainModule:
    """Model and UniCL method in float32."""
    torch.manual_seed(0)
    model = models.build(MODEL)
    model.set_grad_checkpointing(checkpointing)
    if compiled:
        compilation.compile_towers(model, zero_stage=1, device=device)
    dims = {"embed_dim": model.embed_dim, "image_width": model.image_width,
            "text_width": model.text_width, "num_classes": 1000}  # fmt: skip
    method = losses.build("unicl", {}, dims)
    method.precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    return deepspeed_engine.TrainModule(model, method).to(device).train()


def make_batch(size: int, device: torch.device, seed: int = 0) -> Batch:
    """Noise images, captions of LENGTHS tokens, half of the samples with labels."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, END_TOKEN - 1, (size, 1, CONTEXT), generator=generator)
    ends = torch.randint(*LENGTHS, (size, 1, 1), generator=generator)
    ends[0] = LENGTHS[1] - 1  # equal lengths of all batches, so that their FLOPs are equal
    place = torch.arange(CONTEXT)
    text = torch.where(place < ends, text, torch.where(place == ends, END_TOKEN, 0))
    labels = torch.randint(1000, (size,), generator=generator)
    labels[::2] = -1
    side = MODEL["image"]["size"]
    images = torch.randn(size, 1, 3, side, side, device=device, dtype=torch.bfloat16)
    return {"image": images, "text": text.to(device), "label": labels.to(device)}


def flops_per_sample(device: torch.device) -> float:
    """Of one forward and backward pass of both towers."""
    module, batch = make_module(device, False, False).bfloat16(), make_batch(8, device)
    with FlopCounterMode(display=False) as counter:
        features = module(batch)
        (features["image"].sum() + features["text"].sum()).backward()
    return counter.get_total_flops() / 8


def towers(device: torch.device, flops: float, deadline: float) -> Iterator[dict]:
    """Rows of forward and backward passes of one micro-batch."""
    peak = gpu.peak_flops()
    # Compiling takes a minute or two a size, so it is done at one.
    plain = [(False, checkpointing, size) for checkpointing in (False, True)
             for size in MICRO_BATCHES]  # fmt: skip
    compiled = [(True, checkpointing, MICRO_BATCH) for checkpointing in (False, True)]
    for compiling, checkpointing, size in plain + compiled:
        facts = {"micro_batch": size, "compile": compiling, "checkpointing": checkpointing}
        if time.monotonic() > deadline:
            yield {"name": "towers: no time left", **facts}
            continue
        module = make_module(device, compiling, checkpointing).bfloat16()
        batch = make_batch(size, device)

        def once(module=module, batch=batch) -> None:
            module.zero_grad(set_to_none=True)
            module(batch, Gather())["contrastive_loss"].backward()

        measured = gpu.fits(lambda once=once: gpu.measure(once))
        del module, batch, once
        if measured is None:
            yield {"name": "towers: out of memory", **facts}
            continue
        rate = size / measured[0]
        facts |= {"samples_per_second": round(rate), "peak_gib": round(measured[1], 2)}
        if peak:
            name = "towers, model FLOP utilisation"
            yield harness.row(name, rate * flops / peak, 0.5, at_most=False, **facts)
        else:
            yield harness.row("towers, model TFLOP/s", rate * flops / 1e12, **facts)


def whole_steps(device: torch.device, flops: float, deadline: float) -> Iterator[dict]:
    """Rows of optimizer steps with gradient caching under ZeRO-1."""
    peak = gpu.peak_flops()
    for compiled in (False, True):
        for batch in STEPS_AT:
            facts = {"B": batch, "micro_batch": MICRO_BATCH, "compile": compiled}
            if time.monotonic() > deadline:
                yield {"name": "whole step: no time left", **facts}
                continue
            seconds, gib, kept = _steps(device, batch, MICRO_BATCH, compiled)
            rate = batch / seconds
            facts |= {"samples_per_second": round(rate), "peak_gib": round(gib, 2)}
            facts |= {"graphs_kept": kept, "graph_gb": GRAPH_GB, "zero": 1}
            if peak:
                facts["utilisation"] = round(rate * flops / peak, 3)
            yield harness.row("whole step, seconds", seconds, **facts)


def _steps(
    device: torch.device, batch: int, micro: int, compiled: bool
) -> tuple[float, float, int | None]:
    """(seconds of the fastest of 3 steps after one, peak GiB of the process, graphs kept)."""
    pieces = batch // micro
    config = json.loads(Path("ds_configs/zero1_bf16.json").read_text())
    config |= {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": pieces,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    module = make_module(device, compiled, False)
    optimizer = optim.build(module.model, module.method, OptimConfig())
    engine = deepspeed_engine.initialise(module, optimizer, config, device)
    stepper = Stepper(engine, Gather(), seed=0, graph_bytes=int(GRAPH_GB * 1e9))
    batches = [make_batch(micro, device, seed) for seed in range(pieces)]
    times = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(4):
        _wait(device)
        start = time.perf_counter()
        stepper(step, batches)
        _wait(device)
        times.append(time.perf_counter() - start)
    gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    engine.destroy()
    return min(times[1:]), gib, stepper.kept


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def rows() -> Iterator[dict]:
    """FLOPs of a sample, towers, whole steps."""
    deadline = time.monotonic() + BUDGET
    device = dist.initialise()
    flops = flops_per_sample(device)
    yield {"name": "GFLOP of a sample, forward and backward", "value": round(flops / 1e9, 2)}
    yield from towers(device, flops, deadline - 240)
    yield from whole_steps(device, flops, deadline)
    dist.finish()


if __name__ == "__main__":
    gpu.main("gpu_step", rows)
