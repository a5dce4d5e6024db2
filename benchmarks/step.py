"""Training end to end against open_clip: same towers, weights, shards, batch, optimizer and rates.

Ours is `train.py` under DeepSpeed ZeRO-1, the peer `open_clip_train.main` (DDP, `--local-loss
--gather-with-grad`), each on 2 gloo processes of one thread with one loader process. Captions have
8 to 20 words. The loads: towers made small, a Swin and a causal transformer of 77 tokens that cost
about 2 to 1; the same with a larger batch in 4 micro-batches, both sides with exact gradient
caching (`train.accumulation`, `--accum-freq`); and the paper's own towers, Swin-T at 224 pixels and
12 layers of width 512, a few steps of a small batch.

Speed and memory come from runs on random crops, in turns; their loss curves must agree within
noise, which is the spread over seeds. A stricter check repeats one fixed global batch: there the
order of samples does not matter, and both sides must reach the same weights but for rounding.
"""

import shutil
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import pyplot
from safetensors.torch import save_file

from benchmarks import harness
from benchmarks.step_data import write_shards, write_weights
from benchmarks.step_sides import RANKS, WORKERS, Run, Task, open_clip, ours
from loaders import manifest, tokenizers, views
from loaders.texts import read_caption
from losses.unicl import unicl_loss
from models import weights
from models.formats.open_clip import WEIGHTS_FILE

SIDES = {"ours": ours, "open_clip": open_clip}
SMALL = {
    "image": {
        "name": "swin_tiny",
        "size": 80,
        "kwargs": {
            "embed_dim": 48, "depths": [2, 2, 5], "num_heads": [2, 4, 8], "window_size": 5,
            "drop_path_rate": 0.0,
        },
    },
    "text": {"width": 160, "layers": 3, "heads": 5},
    "embed_dim": 128,
    "logit_scale_init": 2.659260036932778,
}  # fmt: skip
PAPER = {
    "image": {"name": "swin_tiny", "size": 224, "kwargs": {"drop_path_rate": 0.0}},
    "text": {"width": 512, "layers": 12, "heads": 8},
    "embed_dim": 512,
    "logit_scale_init": 2.659260036932778,
}
RATE, SAMPLES, SHARDS = 5e-4, 8192, 4  # no run sees a sample twice
LAST = 10  # steps whose losses are compared
# A low rate: at the other one the loss of a single batch jumps, and rounding grows with it.
FIXED_BATCH, FIXED_STEPS, FIXED_RATE = 128, 10, 1e-4


@dataclass
class Load:
    """One training that is compared, `rounds` times with other seeds.

    `pieces`: micro-batches of a rank (gradient caching).
    """

    name: str
    model: dict
    batch: int
    pieces: int
    steps: int
    rounds: int

    @property
    def warmup(self) -> int:
        return min(10, self.steps // 3)


LOADS = (
    Load("small towers", SMALL, 128, 1, 30, 3),
    Load("small towers, 4 micro-batches", SMALL, 512, 4, 12, 2),
    Load("the paper's towers", PAPER, 64, 1, 5, 2),
)


def compare(place: Path, shards: Path, load: Load, quick: bool) -> Iterator[dict]:
    """Speed, time and memory; loss curves where there are enough steps."""
    steps, rounds = load.steps, load.rounds
    if quick:
        steps, rounds = max(4, min(steps, 1536 // load.batch)), 1
    steady = min(50, steps - 1)
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    for number in range(rounds):
        start = write_weights(place / f"weights{number}", load.model, number)
        task = Task(
            shards, load.model, start, load.batch, steps, load.warmup, RATE, number, load.pieces
        )
        for side in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
            runs[side].append(SIDES[side](task, place / f"{side}{number}", steady))
    facts = {
        "load": load.name, "B": load.batch, "micro_batches": load.pieces, "ranks": RANKS,
        "threads": 1, "workers": WORKERS, "rounds": rounds, "steps": steps, "steady_steps": steady,
        "peer": "open_clip_torch 3.3.0",
    }  # fmt: skip

    def values(key: str) -> dict[str, list[float]]:
        return {side: [round(getattr(run, key), 4) for run in runs[side]] for side in SIDES}

    def ratio(key: str, above: str, below: str) -> float:
        return harness.ratio(values(key), above, below)

    yield harness.row(
        "samples per second, ours / open_clip", ratio("steady", "ours", "open_clip"), 1.3,
        at_most=False, **values("steady"), **facts,
    )  # fmt: skip
    for name, key, target in (
        ("wall seconds of the command", "wall", None),
        ("CPU seconds per sample", "cpu", None),
        ("peak MiB of a rank", "rank_mib", 1.0),
        ("peak MiB of all processes", "all_mib", None),
    ):
        value = ratio(key, "ours", "open_clip")
        yield harness.row(f"{name}, ours / open_clip", value, target, **values(key), **facts)
    if rounds < 3 or steps < LAST:
        return
    curves = {side: [run.losses for run in runs[side]] for side in SIDES}
    value, parts = _difference(curves)
    yield harness.row(
        f"mean loss of the last {LAST} steps, |ours - open_clip| / standard error", value, 3.0,
        **parts, **facts, peer_curve="what open_clip logs: the rows of rank 0 only",
    )  # fmt: skip
    if not quick and load is LOADS[0]:
        draw(curves, harness.RESULTS / "step_curves.png", load.batch)


def _difference(curves: dict[str, list[list[float]]]) -> tuple[float, dict]:
    """Difference of the sides' mean losses over the last steps in standard errors, from the spread
    over the runs, whose order of samples differs; what it is made of."""
    ends = {side: [statistics.mean(losses[-LAST:]) for losses in curves[side]] for side in SIDES}
    error = sum(statistics.variance(end) / len(end) for end in ends.values()) ** 0.5
    means = {side: statistics.mean(end) for side, end in ends.items()}
    facts = {f"{side}_loss": [round(value, 4) for value in end] for side, end in ends.items()}
    difference = abs(means["ours"] - means["open_clip"])
    return difference / error, facts | {"standard_error": round(error, 4)}


def fixed_batch(place: Path, pieces: int, quick: bool) -> Iterator[dict]:
    """Both sides on one repeated global batch without random crops: the loss they end with."""
    steps = 8 if quick else FIXED_STEPS
    shards = write_shards(place / "fixed", FIXED_BATCH, RANKS)
    start = write_weights(place / "fixed_weights", SMALL, 0)
    task = Task(
        shards, SMALL, start, FIXED_BATCH, steps, 10, FIXED_RATE, 0, pieces, fixed_view=True
    )
    ours(task, place / "fixed_ours", steps - 1)
    open_clip(task, place / "fixed_open_clip", steps - 1)
    models_after = {"start": start, "ours": place / "fixed_ours"}
    models_after["open_clip"] = _peer_weights(place / "fixed_open_clip", start)
    batch = _whole(shards)
    found = {name: _loss(path, *batch) for name, path in models_after.items()}
    difference = abs(found["ours"] - found["open_clip"]) / abs(found["start"] - found["ours"])
    yield harness.row(
        "one fixed batch: |loss of ours - open_clip| / change of the loss in training",
        difference, 0.01, B=FIXED_BATCH, micro_batches=pieces, ranks=RANKS, steps=steps, **found,
    )  # fmt: skip


def _peer_weights(run: Path, start: Path) -> Path:
    """The peer's last checkpoint as an open_clip folder."""
    checkpoint = torch.load(run / "checkpoints/epoch_1.pt", weights_only=True)
    state = {k.removeprefix("module."): v for k, v in checkpoint["state_dict"].items()}
    folder = run / "open_clip"
    shutil.copytree(start, folder)
    save_file(state, folder / WEIGHTS_FILE, {"format": "pt"})
    return folder


def _whole(shards: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of the shards, without random crop, and their token ids."""
    source = manifest.open_shards(shards, kind="image_text")
    size = SMALL["image"]["size"]
    view, tokenize = views.build_eval(size, size), tokenizers.build()
    everything = range(len(source))
    images = torch.stack([view(views.decode(source.read_image(i))) for i in everything])
    return images, tokenize([read_caption(source, i, "txt") for i in everything])


@torch.no_grad()
def _loss(path: Path, images: torch.Tensor, ids: torch.Tensor) -> float:
    model = weights.load(path).model.eval()
    cfg = model.cfg.image
    image, text, scale = model(views.normalize(images, cfg.mean, cfg.std), ids)
    return unicl_loss(image, text, torch.full((len(ids),), -1), scale).item()


def draw(curves: dict[str, list[list[float]]], path: Path, batch: int) -> None:
    """Loss by step: a faint line a step, a strong one averaged over 5."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for side, colour in zip(curves, ("tab:blue", "tab:orange"), strict=True):
        for number, losses in enumerate(curves[side]):
            style = ("-", "--", ":")[number % 3]
            axes.plot(range(1, len(losses) + 1), losses, color=colour, alpha=0.25, lw=0.8)
            smooth = [statistics.mean(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))]
            axes.plot(
                range(1, len(smooth) + 1), smooth, style, color=colour,
                label=f"{side.replace('_', ' ')}, seed {number}".replace("open clip", "open_clip"),
            )  # fmt: skip
    axes.set(xlabel="step", ylabel=f"CLIP loss, global batch {batch}")
    axes.grid(alpha=0.3)
    axes.legend(title="mean of 5 steps")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def rows(quick: bool) -> Iterator[dict]:
    """All rows."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for pieces in (1, 4):
            yield from fixed_batch(place / f"pieces{pieces}", pieces, quick)
        shards = write_shards(place / "shards", SAMPLES, SHARDS)
        for number, load in enumerate(LOADS):
            yield from compare(place / f"load{number}", shards, load, quick)


if __name__ == "__main__":
    harness.main("step", rows)
