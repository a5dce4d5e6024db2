"""Memory of retrieval scoring: ours a chunk at a time, CLIP_benchmark's by the whole matrix."""

import multiprocessing
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks import harness
from eval.tasks import metrics

DIMENSION, CAPTIONS, BATCH = 512, 5, 64
MIB = 2**20


class Identity(torch.nn.Module):
    """A model whose inputs are features already."""

    def encode_image(self, features: torch.Tensor) -> torch.Tensor:
        return features

    encode_text = encode_image


def features(images: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Unit image features (n, D), text features (CAPTIONS n, D), and the image of every text."""
    torch.manual_seed(0)
    image = F.normalize(torch.randn(images, DIMENSION), dim=-1)
    owner = np.repeat(np.arange(images), CAPTIONS)
    text = F.normalize(image[owner] + 0.3 * torch.randn(len(owner), DIMENSION), dim=-1)
    return image, text, owner


def ours(image: torch.Tensor, text: torch.Tensor, owner: np.ndarray) -> tuple[float, float]:
    """R@1 in both directions as eval.retrieval scores: image to text, text to image."""
    each = np.arange(len(owner))
    found = metrics.retrieval_metrics(
        metrics.positive_ranks(image, text, owner, each),
        metrics.positive_ranks(text, image, each, owner),
    )
    return tuple(found[f"{way}_r1"]["value"] / 100 for way in ("image_to_text", "text_to_image"))


def clip_benchmark(
    image: torch.Tensor, text: torch.Tensor, owner: np.ndarray
) -> tuple[float, float]:
    """The same of CLIP_benchmark's own `evaluate`, whose encoders hand the features through."""
    from clip_benchmark.metrics import zeroshot_retrieval

    loader = (
        (image[i : i + BATCH], [range(CAPTIONS * j, CAPTIONS * (j + 1)) for j in range(i, stop)])
        for i in range(0, len(image), BATCH)
        for stop in [min(i + BATCH, len(image))]
    )
    found = zeroshot_retrieval.evaluate(
        Identity(), loader, lambda rows: text[rows], "cpu", amp=False, recall_k_list=[1]
    )
    return found["text_retrieval_recall@1"], found["image_retrieval_recall@1"]


def peak(score, images: int) -> dict:
    """Peak MiB of a call in a fresh process above its features, seconds, and what it returned."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, score, images))
    process.start()
    sender.close()  # so that a child that dies ends the wait
    value = receiver.recv()
    process.join()
    return value


def _measure(sender, score, images: int) -> None:
    score(*features(100))  # imports and buffers that any size needs
    data, found = features(images), []
    start = time.perf_counter()
    mib = harness.peak_mib(lambda: found.append(score(*data)))
    sender.send({"mib": mib, "seconds": time.perf_counter() - start, "recalls": found[0]})


def rows(quick: bool) -> Iterator[dict]:
    """Peaks of both sides at growing sizes.

    The bound of ours is one chunk of scores with its comparison, the larger side in float64, and
    32 MiB: linear in images + texts.
    """
    for images in (200, 400) if quick else (2000, 5000, 10_000):
        texts = CAPTIONS * images
        mine, theirs = peak(ours, images), peak(clip_benchmark, images)
        bound = (9 * metrics.SCORES + 8 * DIMENSION * texts) / MIB + 32
        facts = {"images": images, "texts": texts, "D": DIMENSION}
        yield harness.row(
            "retrieval, peak MiB above the features, ours", mine["mib"], round(bound), **facts,
            seconds=round(mine["seconds"], 1), r1=mine["recalls"],
        )  # fmt: skip
        yield harness.row(
            "retrieval, peak MiB above the features, CLIP_benchmark", theirs["mib"], **facts,
            seconds=round(theirs["seconds"], 1), r1=theirs["recalls"],
            matrix_mib=round(4 * images * texts / MIB),
        )  # fmt: skip


if __name__ == "__main__":
    harness.main("evaluation_retrieval", rows)
