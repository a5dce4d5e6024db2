"""Image-text retrieval: `python -m eval.retrieval --checkpoint RUN --datasets quickstart
--output DIR`."""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put eval/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from eval import cli, metrics
from eval.features import Extractor
from eval.sources.registry import REGISTRY, EvalDataset
from eval.sources.splits import EvalSplit
from loaders.errors import run_cli


def evaluate(extractor: Extractor, row: EvalDataset) -> cli.Outcome | None:
    """R@1, R@5, R@10 in both directions over all images and captions of the split.

    With `captions_per_image` every caption is a text of its own, as the COCO and Flickr30k tables
    count: an image is found by any of its captions. Without, equal captions are one text, and a
    caption of several images is found when any of them is.
    """
    split = EvalSplit(row, "test", extractor.size)
    if row.captions_per_image is None:
        captions, text_of_image = split.distinct_texts()
        pair_image, pair_text = np.arange(len(split)), text_of_image
        kind = "distinct captions"
    else:
        captions, pair_image = split.captions()
        pair_text = np.arange(len(captions))
        limit = row.captions_per_image
        kind = "captions (all)" if limit == "all" else f"captions (the first {limit} of each)"
    texts = extractor.texts(captions, f"{row.name} captions")
    images = extractor.images(split)
    if images is None:
        return None
    image, text, name = images["feature"], texts["feature"], row.name
    return cli.Outcome(
        metrics.retrieval_metrics(
            metrics.positive_ranks(image, text, pair_image, pair_text, name=name),
            metrics.positive_ranks(text, image, pair_text, pair_image, name=name),
        ),
        classes=None,
        protocol=(
            f"{len(split)} images against {len(captions)} {kind}, any positive counts, "
            "ties count as errors"
        ),
        digest=None,
    )


def main(argv: Sequence[str] | None = None, registry=REGISTRY) -> None:
    """Command line; `registry` is another datasets.yaml."""
    cli.run("retrieval", "Image-text retrieval.", evaluate, argv, registry)


if __name__ == "__main__":
    run_cli(main)
