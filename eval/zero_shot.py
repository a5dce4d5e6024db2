"""Zero-shot classification: `python -m eval.zero_shot --checkpoint RUN --datasets quickstart
--output DIR`."""

from collections.abc import Sequence

import numpy as np

from eval import cli, metrics, rows, sources
from eval.features import Extractor
from loaders import texts
from loaders.errors import run_cli


def class_ranks(
    extractor: Extractor, split: sources.EvalSplit
) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray] | None:
    """Rank of the true class, index of the true class, class names, and index of the predicted
    class of every image of `split`; (n,), (n,), K strings, (n,). None off the main process."""
    ids, names = split.class_names()
    classifier = extractor.class_weights(names, texts.load_templates(split.row.templates))
    features = extractor.images(split)
    if features is None:
        return None
    true = np.searchsorted(ids, split.labels)
    ranks = metrics.positive_ranks(features["feature"], classifier, np.arange(len(true)), true)
    predicted = (features["feature"].double() @ classifier.double().T).argmax(dim=1).numpy()
    return ranks, true, names, predicted


def evaluate(extractor: Extractor, row: sources.EvalDataset) -> cli.Outcome | None:
    """Top-1, top-5 and mean per-class recall by cosine to the averaged class prompts.

    Candidate classes are those that occur in the test split.
    """
    split = sources.EvalSplit(row, "test", extractor.size)
    found = class_ranks(extractor, split)
    if found is None:
        return None
    ranks, true, names, _ = found
    templates = texts.load_templates(row.templates)
    return cli.Outcome(
        metrics.classification_metrics(ranks, true),
        classes=len(names),
        protocol=(
            f"zero-shot among the {len(names)} classes of the split, mean of {len(templates)} "
            f"normalised prompt features ({row.templates}), ties count as errors"
        ),
        digest=rows.prompt_digest(names, templates),
    )


def main(argv: Sequence[str] | None = None, registry=sources.REGISTRY) -> None:
    """Command line; `registry` is another datasets.yaml."""
    cli.run("zero_shot", "Zero-shot classification.", evaluate, argv, registry)


if __name__ == "__main__":
    run_cli(main)
