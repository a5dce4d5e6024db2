"""What one checkpoint finds nearest to words or to a picture."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.explorer.collection import Collection
from eval.explorer.index import Index, nearest

CAPTIONS, CLASSES = 5, 5  # of each as many are shown


@dataclass(frozen=True)
class Query:
    """Words, a sample of the data set, or a picture that was uploaded.

    Attributes:
        vectors: of each checkpoint one, (D,) float32 of unit length.
        text, sample, upload: the one that was asked for; the others are None.
    """

    vectors: list[Tensor]
    text: str | None = None
    sample: int | None = None
    upload: str | None = None


@dataclass(frozen=True)
class Answer:
    """The nearest, the best first, each with its cosine.

    Attributes:
        images: (sample, cosine). captions: (caption, sample that has it, cosine).
        classes: (name, cosine).
    """

    images: list[tuple[int, float]]
    captions: list[tuple[str, int, float]]
    classes: list[tuple[str, float]]


def answer(
    vector: Tensor, query: Query, collection: Collection, index: Index, count: int
) -> Answer:
    """What is nearest to `vector` (D,), that of `query` by the checkpoint of `index`: `count`
    pictures, and a few captions and classes. A sample is not its own neighbour.
    """
    images = nearest(index.images, vector, count, query.sample)
    captions = []
    if index.captions is not None:
        for row, cosine in nearest(index.captions, vector, CAPTIONS):
            sample, number = index.places[row].tolist()
            captions.append((collection.captions(sample)[number], sample, cosine))
    classes = []
    if index.weights is not None:
        best = (
            (index.weights @ vector)
            .nan_to_num(nan=-torch.inf)
            .topk(min(CLASSES, len(index.weights)))
        )
        classes = [
            (collection.classes[i], cosine)
            for i, cosine in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
    return Answer(images, captions, classes)
