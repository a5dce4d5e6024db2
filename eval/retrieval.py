"""Image-text retrieval: `python -m eval.retrieval --checkpoint RUN --datasets quickstart
--output DIR`."""

from collections.abc import Sequence

import numpy as np

from eval import cli, metrics, sources
from eval.features import Extractor
from loaders.errors import run_cli


def evaluate(extractor: Extractor, row: sources.EvalDataset) -> cli.Outcome | None:
    """R@1, R@5, R@10 in both directions over all images and distinct captions of the split.

    A caption of several images is found when any of them is.
    """
    split = sources.EvalSplit(row, "test", extractor.size)
    captions, owner = split.distinct_texts()
    texts = extractor.texts(captions, f"{row.name} captions")
    images = extractor.images(split)
    if images is None:
        return None
    each = np.arange(len(split))
    return cli.Outcome(
        metrics.retrieval_metrics(
            metrics.positive_ranks(images["feature"], texts["feature"], each, owner),
            metrics.positive_ranks(texts["feature"], images["feature"], owner, each),
        ),
        classes=None,
        protocol=(
            f"{len(split)} images against {len(captions)} distinct captions, any positive counts, "
            "ties count as errors"
        ),
        digest=None,
    )


def main(argv: Sequence[str] | None = None, registry=sources.REGISTRY) -> None:
    """Command line; `registry` is another datasets.yaml."""
    cli.run("retrieval", "Image-text retrieval.", evaluate, argv, registry)


if __name__ == "__main__":
    run_cli(main)
