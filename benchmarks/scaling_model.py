"""Step time and traffic from 1 to 512 GPUs, computed from pieces that are given as arguments.

    python -m benchmarks.scaling_model --encoder-ms 0.16 --link-gbps 50

No run stands behind these figures. Counted: what a rank receives (`traffic`, equal to the counts of
`benchmarks.loss_ranks`), products per pair, parameters. Assumed, unless measured and given: time of
the encoders, rate of the loss's products, speed and latency of the link. Nothing is overlapped,
and every collective is a ring: n - 1 messages for a gather or reduce-scatter over n ranks, twice
that for an all-reduce.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import harness

RANKS = tuple(2**n for n in range(10))
UNITS = {"ours": 4, "open_clip": 6}  # products of B x b x D per step


@dataclass
class Pieces:
    """What a prediction is made of; help texts say where the defaults come from."""

    batch: int = 32768
    width: int = 512
    encoder_ms: float = 0.16
    loss_tflops: float = 400.0
    parameters: float = 91.1e6
    link_gbps: float = 50.0
    latency_us: float = 5.0


HELP = {
    "batch": "global batch, the same at any number of GPUs",
    "width": "of the features",
    "encoder_ms": "of both towers per sample, forward and backward, one GPU; the default is assumed"
    " (45 GFLOP at 280 TFLOP/s)",
    "loss_tflops": "rate of the loss's matrix products, TFLOP/s; the default is assumed",
    "parameters": "trained, moved in 2 bytes each; the default is Swin-T with UniCL's text tower",
    "link_gbps": "what a GPU receives, gigabytes per second; the default is assumed (400 Gbit/s)",
    "latency_us": "of a message; the default is assumed",
}


@dataclass
class Moved:
    """What a rank receives in one forward and backward of the loss.

    Attributes:
        features: bytes of float32 features and their gradients. rest: bytes of labels and
            normalisers. messages: one after the other.
    """

    features: float
    rest: float
    messages: int


def _grid(ranks: int) -> tuple[int, int]:
    from losses._gather import grid_shape  # late: torch takes seconds, which --help need not

    return grid_shape(ranks)


def traffic(side: str, ranks: int, batch: int, width: int) -> Moved:
    """Of `ours` (the rank grid) or of `open_clip` (local_loss and gather_with_grad)."""
    share = batch / ranks
    if side == "open_clip":  # gathers both sides, reduce-scatters both gradients
        return Moved(4 * (ranks - 1) * share * width * 4, 0.0, 4 * (ranks - 1))
    rows, columns = _grid(ranks)
    features = 2 * (rows + columns - 2) * share * width * 4
    # Sizes and labels of all ranks (int64); then, of the `columns` ranks that share rows, one
    # maximum and two sums per row, of the `rows` that share columns one and one; and the loss.
    rest = (ranks - 1) * (8 + 8 * share) + _all_reduce(1, ranks)
    rest += _all_reduce(3 * columns * share, columns) + _all_reduce(2 * rows * share, rows)
    # Backward, the gradients of normalisers and positives: two per row, one per column.
    rest += 4 * share * (2 * (columns - 1) + (rows - 1))
    sides = 2 * (rows + columns - 2)
    messages = sides + 2 * (ranks - 1) + 2 * (ranks - 1) + 2 * sides
    messages += 2 * (columns - 1) + (rows - 1)
    return Moved(features, rest, messages)


def _all_reduce(elements: float, ranks: int) -> float:
    """Bytes of float32 that a rank receives: reduce-scatter, then gather."""
    return 4 * elements * 2 * (ranks - 1) / ranks


def predict(ranks: int, pieces: Pieces) -> dict:
    """One row: milliseconds of each part and MB received, for both sides."""
    link, latency = pieces.link_gbps * 1e9, pieces.latency_us / 1e6
    share = pieces.batch / ranks
    encoders = share * pieces.encoder_ms / 1e3
    # ZeRO-1 reduce-scatters 16-bit gradients and gathers the weights; DDP's all-reduce is as much.
    weights = 2 * (ranks - 1) / ranks * pieces.parameters * 2
    update = weights / link + 2 * (ranks - 1) * latency
    p, q = _grid(ranks)
    row = {"gpus": ranks, "grid": f"{p}x{q}", "per_gpu": share, "parameter_mb": weights / 1e6,
           "encoder_ms": 1e3 * encoders, "update_ms": 1e3 * update}  # fmt: skip
    for side, units in UNITS.items():
        moved = traffic(side, ranks, pieces.batch, pieces.width)
        products = units * 2 * share * pieces.batch * pieces.width
        loss = products / (pieces.loss_tflops * 1e12)
        communication = (moved.features + moved.rest) / link + moved.messages * latency
        row |= {
            f"{side}_feature_mb": moved.features / 1e6,
            f"{side}_loss_ms": 1e3 * loss,
            f"{side}_gather_ms": 1e3 * communication,
            f"{side}_step_ms": 1e3 * (encoders + loss + communication + update),
        }
    alone = pieces.batch * pieces.encoder_ms
    row["ours_efficiency"] = alone / ranks / row["ours_step_ms"]
    return {key: round(value, 4) if isinstance(value, float) else value
            for key, value in row.items()}  # fmt: skip


def table(rows: list[dict]) -> str:
    """The rows for people."""
    names = {
        "gpus": "GPUs", "grid": "grid", "per_gpu": "per GPU", "encoder_ms": "encoders ms",
        "update_ms": "update ms", "ours_loss_ms": "loss ms", "ours_gather_ms": "gathers ms",
        "ours_step_ms": "step ms", "open_clip_step_ms": "open_clip's", "ours_feature_mb":
        "features MB", "open_clip_feature_mb": "open_clip's", "parameter_mb": "weights MB",
        "ours_efficiency": "efficiency",
    }  # fmt: skip
    lines = ["  ".join(f"{name:>11}" for name in names.values())]
    for row in rows:
        cells = [row[key] for key in names]
        lines.append(
            "  ".join(f"{c:>11.2f}" if isinstance(c, float) else f"{c:>11}" for c in cells)
        )
    return "\n".join(lines)


def draw(rows: list[dict], pieces: Pieces, path: Path) -> None:
    """Left: parts of a step. Right: what a GPU receives."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    gpus = [row["gpus"] for row in rows]
    for key, name, style in (
        ("ours_step_ms", "step, ours", "k-"), ("open_clip_step_ms", "step, open_clip's loss", "k:"),
        ("encoder_ms", "encoders", "C0-"), ("ours_loss_ms", "loss, ours", "C1-"),
        ("ours_gather_ms", "gathers of the loss, ours", "C2-"),
        ("open_clip_gather_ms", "gathers, open_clip", "C2:"),
        ("update_ms", "gradients and weights", "C3-"),
    ):  # fmt: skip
        shown = [(n, row[key]) for n, row in zip(gpus, rows, strict=True) if row[key] > 0]
        left.plot(*zip(*shown, strict=True), style, label=name, marker=".")
    left.set(title=f"Computed time of a step, global batch {pieces.batch:,}", ylabel="ms")
    for key, name, style in (
        ("ours_feature_mb", "features, ours (grid)", "C2-"),
        ("open_clip_feature_mb", "features, open_clip", "C2:"),
        ("parameter_mb", "gradients and weights, both", "C3-"),
    ):
        shown = [(n, row[key]) for n, row in zip(gpus, rows, strict=True) if row[key] > 0]
        right.plot(*zip(*shown, strict=True), style, label=name, marker=".")
    right.set(title="Received by a GPU in a step", ylabel="MB")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="GPUs", xticks=gpus, xticklabels=gpus)
        axes.minorticks_off()  # or they would write between the labels
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    ticks = (10, 20, 50, 100, 200, 500)
    right.set(yticks=ticks, yticklabels=ticks)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Command line: table, picture, results/scaling_model.jsonl."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling_model", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for key, value in asdict(Pieces()).items():
        text = f"{HELP[key]} ({value:g})"
        parser.add_argument(
            f"--{key.replace('_', '-')}", type=type(value), default=value, help=text
        )
    pieces = Pieces(**vars(parser.parse_args()))
    rows = [predict(ranks, pieces) for ranks in RANKS]
    print(table(rows))
    date = datetime.now(UTC).date().isoformat()
    facts = {"computed_from": asdict(pieces), "date": date}
    lines = [json.dumps({"benchmark": "scaling_model", **row, **facts}) for row in rows]
    harness.RESULTS.mkdir(exist_ok=True)
    (harness.RESULTS / "scaling_model.jsonl").write_text("\n".join(lines) + "\n")
    draw(rows, pieces, harness.RESULTS / "scaling_model.png")


if __name__ == "__main__":
    main()
