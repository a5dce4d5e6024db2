"""Training on one GPU: whole steps of the paper's towers, ours and open_clip's, and of ViT-B/16.

    python -m benchmarks.gpu_step [--budget SECONDS] [--only SECTION]

Synthetic images and captions of 10 to 30 tokens lie on the device: no data loading. A step is the
whole update: forward, loss, backward, AdamW, under DeepSpeed ZeRO-1 in bfloat16; the peer's is its
own (`gpu_step_peer`). Sections: `peer` and `compiled`, Swin-T at 224 pixels and the text
transformer of 12 layers and width 512 on both sides, one micro-batch a step; `cached` and `large`,
ours with gradient caching, over the rate of `towers`, forward and backward alone; `vit` and
`vit_compiled`, the same passes of ViT-B/16 and that text tower. Model FLOP utilisation counts the
FLOPs of one plain forward and backward pass (torch.utils.flop_counter) per sample, whatever is
computed again, over the device's dense bfloat16 rate.
"""

import functools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import losses
import models
from benchmarks import gpu, gpu_step_peer, harness
from benchmarks.gpu import Job, Row
from engine import compilation, deepspeed_engine, dist, optim
from engine.config import OptimConfig
from engine.step import Batch, Stepper
from losses._gather import Gather

SWIN = {
    "image": {"name": "swin_tiny", "size": 224, "kwargs": {"drop_path_rate": 0.0}},
    "text": {"width": 512, "layers": 12, "heads": 8},
    "embed_dim": 512,
}
VIT = {**SWIN, "image": {"name": "vit_base_patch16_224", "size": 224}}
CONTEXT, END_TOKEN, LENGTHS = 77, 49407, (10, 30)
MICRO_BATCHES = (512, 1024)
STEPS_AT, MICRO_BATCH, GRAPH_GB = (4096, 16384), 512, 60
# Samples per second over the peer's, model FLOP utilisation of ViT-B/16, cached steps over towers.
OVER_PEER, UTILISATION, OF_TOWERS = 1.3, 0.40, 0.70
COMPILING = 60  # seconds that a first compilation of both towers takes, roughly


def make_module(
    settings: dict[str, Any], device: torch.device, compiled: bool = False
) -> deepspeed_engine.TrainModule:
    """Model and UniCL method in float32."""
    torch.manual_seed(0)
    model = models.build(settings)
    if compiled:
        compilation.compile_towers(model, zero_stage=1, device=device)
    dims = {"embed_dim": model.embed_dim, "image_width": model.image_width,
            "text_width": model.text_width, "num_classes": 1000}  # fmt: skip
    method = losses.build("unicl", {}, dims)
    return deepspeed_engine.TrainModule(model, method).to(device).train()


def make_batch(settings: dict[str, Any], size: int, device: torch.device, seed: int = 0) -> Batch:
    """Noise images, captions of LENGTHS tokens, half of the samples with labels."""
    generator = torch.Generator().manual_seed(seed)
    context = settings["text"].get("context_length", CONTEXT)
    low, high = (min(length, context) for length in LENGTHS)
    text = torch.randint(1, END_TOKEN - 1, (size, 1, context), generator=generator)
    ends = torch.randint(min(low, high - 1), high, (size, 1, 1), generator=generator)
    ends[0] = high - 1  # equal lengths of all batches, so that their FLOPs are equal
    place = torch.arange(context)
    text = torch.where(place < ends, text, torch.where(place == ends, END_TOKEN, 0))
    labels = torch.randint(1000, (size,), generator=generator)
    labels[::2] = -1
    side = settings["image"]["size"]
    images = torch.randn(size, 1, 3, side, side, device=device, dtype=torch.bfloat16)
    return {"image": images, "text": text.to(device), "label": labels.to(device)}


@functools.cache
def _flops(settings: str, device: torch.device) -> float:
    values = json.loads(settings)
    module = make_module(values, device).bfloat16()
    batch = make_batch(values, 8, device)
    with FlopCounterMode(display=False) as counter:
        features = module(batch)
        (features["image"].sum() + features["text"].sum()).backward()
    return counter.get_total_flops() / 8


def utilisation(settings: dict[str, Any], device: torch.device, rate: float) -> Row:
    """`gflop` of a sample, forward and backward, and `utilisation` where the card's rate is known.

    Args:
        rate: samples per second.
    """
    flops, peak = _flops(json.dumps(settings), device), gpu.peak_flops()
    facts: Row = {"gflop": round(flops / 1e9, 2)}
    return facts | ({"utilisation": round(rate * flops / peak, 4)} if peak else {})


def steps(
    settings: dict[str, Any], batch: int, micro: int, compiled: bool, device: torch.device
) -> tuple[float, float, int | None]:
    """(seconds of a step, the fastest of 3 after two; peak GiB of the process; graphs kept)."""
    pieces = batch // micro
    file = json.loads(Path("ds_configs/zero1_bf16.json").read_text())
    config = file | {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": pieces,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    module = make_module(settings, device, compiled)
    optimizer = optim.build(module.model, module.method, OptimConfig())
    engine = deepspeed_engine.initialise(module, optimizer, config, device)
    stepper = Stepper(engine, Gather(), seed=0, graph_bytes=int(GRAPH_GB * 1e9))
    batches = [make_batch(settings, micro, device, seed) for seed in range(pieces)]
    times = []
    try:
        for step in range(5):
            if step == 2 and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            gpu.wait(device)
            start = time.perf_counter()
            stepper(step, batches)
            gpu.wait(device)
            times.append(time.perf_counter() - start)
    finally:
        engine.destroy()
    gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return min(times[2:]), gib, stepper.kept


def beside_peer(
    settings: dict[str, Any], size: int, compiled: bool, device: torch.device
) -> Iterator[Row]:
    """Samples per second and memory of a step of one micro-batch, ours and open_clip's."""
    found = {}
    for side in ("ours", "open_clip"):
        if side == "ours":
            seconds, gib, _ = steps(settings, size, size, compiled, device)
        else:
            with tempfile.TemporaryDirectory() as folder:
                model = gpu_step_peer.build(settings, Path(folder), device)
            batch = make_batch(settings, size, device)
            pairs = [(batch["image"][:, 0], batch["text"][:, 0])]
            seconds, gib = gpu_step_peer.steps(model, pairs, compiled, device)
            del model, batch, pairs
        rate = size / seconds
        found[side] = (rate, gib)
        facts = {"peak_gib": round(gib, 2), **utilisation(settings, device, rate)}
        yield harness.row(f"{side}, samples per second", rate, **facts)
    ours, peer = found["ours"], found["open_clip"]
    yield harness.row(
        "samples per second, ours / open_clip", ours[0] / peer[0], OVER_PEER, at_most=False
    )
    if peer[1]:
        yield harness.row("peak memory, ours / open_clip", ours[1] / peer[1], 1.0)


@functools.cache
def _towers(settings: str, size: int, compiled: bool, device: torch.device) -> float:
    values = json.loads(settings)
    module = make_module(values, device, compiled).bfloat16()
    batch = make_batch(values, size, device)

    def once() -> None:
        module.zero_grad(set_to_none=True)
        module(batch, Gather())["contrastive_loss"].backward()

    return size / gpu.measure(once, device)[0]


def towers(
    settings: dict[str, Any], size: int, compiled: bool, device: torch.device, target: float | None
) -> Iterator[Row]:
    """Samples per second of a forward and backward pass, without an update."""
    rate = _towers(json.dumps(settings), size, compiled, device)
    facts = utilisation(settings, device, rate)
    yield harness.row("towers, samples per second", rate, **facts)
    if "utilisation" in facts:
        used = facts["utilisation"]
        yield harness.row("towers, model FLOP utilisation", used, target, at_most=False)


def cached(settings: dict[str, Any], batch: int, micro: int, device: torch.device) -> Iterator[Row]:
    """Whole steps with gradient caching, and their rate over that of the towers."""
    seconds, gib, kept = steps(settings, batch, micro, False, device)
    rate = batch / seconds
    facts = {"peak_gib": round(gib, 2), "graphs_kept": kept, "graph_gb": GRAPH_GB}
    facts |= utilisation(settings, device, rate)
    yield harness.row("cached step, samples per second", rate, **facts)
    alone = _towers(json.dumps(settings), micro, False, device)
    yield harness.row(
        "samples per second, cached step / towers", rate / alone, OF_TOWERS, at_most=False
    )


def sections(
    device: torch.device,
    swin: dict[str, Any] = SWIN,
    vit: dict[str, Any] = VIT,
    sizes: tuple[int, ...] = MICRO_BATCHES,
    large: tuple[int, ...] = STEPS_AT,
    micro: int = MICRO_BATCH,
) -> gpu.Sections:
    """The jobs of each section, the most telling first."""

    def job(name, function, needs, *arguments, **facts) -> Job:
        return Job(name, lambda: function(*arguments), needs, facts)

    def peer(compiled: bool) -> Iterator[Job]:
        for size in sizes if not compiled else sizes[:1]:
            needs = 2 * COMPILING if compiled else 25
            yield job("beside open_clip", beside_peer, needs, swin, size, compiled, device,
                      micro_batch=size, compile=compiled)  # fmt: skip

    def steps_cached(batches: tuple[int, ...]) -> Iterator[Job]:
        for batch in batches:
            yield job("cached step", cached, 40, swin, batch, micro, device,
                      B=batch, micro_batch=micro)  # fmt: skip

    def alone(settings, name, target, compiled=False) -> Iterator[Job]:
        for size in sizes if not compiled else sizes[:1]:
            needs = COMPILING if compiled else 10
            yield job("towers", towers, needs, settings, size, compiled, device, target,
                      towers=name, micro_batch=size, compile=compiled)  # fmt: skip

    return {
        "peer": lambda: peer(False),
        "cached": lambda: steps_cached(large[:1]),
        "vit": lambda: alone(vit, "ViT-B/16 and text", UTILISATION),
        "compiled": lambda: peer(True),
        "large": lambda: steps_cached(large[1:]),
        "towers": lambda: alone(swin, "Swin-T and text", None),
        "vit_compiled": lambda: alone(vit, "ViT-B/16 and text", UTILISATION, compiled=True),
    }


if __name__ == "__main__":
    import sys

    if torch.cuda.is_available() and not {"-h", "--help"} & set(sys.argv):
        dist.initialise()
    gpu.main("gpu_step", sections(torch.device("cuda", 0)))
    dist.finish()
