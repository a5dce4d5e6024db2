"""Image-text retrieval, the task of `eval.retrieval`."""

import numpy as np

from eval.sources.registry import EvalDataset
from eval.sources.splits import EvalSplit
from eval.tasks import metrics
from eval.tasks.features import Extractor
from eval.tasks.outcome import Outcome
from eval.tasks.scores import compare


def pairs(split: EvalSplit) -> tuple[list[str], np.ndarray, np.ndarray, str]:
    """Captions of a split, which image and which caption form each pair, (pairs,) int64 each, and
    what the captions are, in words; see `evaluate`."""
    limit = split.row.captions_per_image
    if limit is None:
        captions, text_of_image = split.distinct_texts()
        return captions, np.arange(len(split)), text_of_image, "distinct captions"
    captions, pair_image = split.captions()
    kind = "captions (all)" if limit == "all" else f"captions (the first {limit} of each)"
    return captions, pair_image, np.arange(len(captions)), kind


def evaluate(extractor: Extractor, row: EvalDataset) -> Outcome | None:
    """R@1, R@5, R@10 in both directions over all images and captions of the split.

    With `captions_per_image` every caption is a text of its own, as the COCO and Flickr30k tables
    count: an image is found by any of its captions. Without, equal captions are one text, and a
    caption of several images is found when any of them is.
    """
    split = EvalSplit(row, "test", extractor.size)
    captions, pair_image, pair_text, kind = pairs(split)
    texts = extractor.texts(captions, f"{row.name} captions")
    images = extractor.images(split)
    if images is None:
        return None
    name, device = row.name, extractor.accelerator.device
    by = "by late interaction, each query's mean over its tokens, " if extractor.late else ""
    return Outcome(
        metrics.retrieval_metrics(
            metrics.ranks(compare(images, texts, name, device), pair_image, pair_text),
            metrics.ranks(compare(texts, images, name, device), pair_text, pair_image),
        ),
        classes=None,
        protocol=(
            f"{len(split)} images against {len(captions)} {kind}, {by}any positive counts, "
            "ties count as errors"
        ),
        digest=None,
    )
