"""Zero-shot classification, the task of `eval.zero_shot`.

Two published protocols: `unicl` (UniCL's ImageNet evaluator: resize 256, crop 224, 81
templates) and `elevater` (ELEVATER's toolkit: resize 224, the templates of each set, 80 for
ImageNet). Both average normalised prompt features and normalise again; what is scored is the
softmax of 100 x cosine, whose order within an image is that of the cosine. A model that compares
tokens (`model.similarity: late`) averages the scores of the prompts instead, as FILIP does, never
features (arXiv 2111.07783).
"""

import numpy as np

from eval import rows
from eval.sources.registry import EvalDataset
from eval.sources.splits import EvalSplit
from eval.tasks import metrics, metrics_scores
from eval.tasks.features import Extractor
from eval.tasks.outcome import Outcome
from eval.tasks.scores import Scores, compare
from loaders.errors import DataError


def class_scores(
    extractor: Extractor, split: EvalSplit
) -> tuple[Scores, np.ndarray, list[str]] | None:
    """Scores of n images for K classes, class ids (K,) and class texts (K). None off the main
    process; every process must call it."""
    ids, names = split.class_names()
    class_texts = split.row.class_texts(names)
    classes, each = extractor.classes(class_texts, split.templates())
    images = extractor.images(split)
    if images is None:
        return None
    device = extractor.accelerator.device
    return compare(images, classes, split.row.name, device, each), ids, class_texts


def _ranks(split: EvalSplit, scores: Scores, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank of the true class, and its index, of every image."""
    name = split.row.name
    if split.targets is not None or (split.labels < 0).any():
        raise DataError(f"{name}: one label per image is needed")
    true = np.searchsorted(ids, split.labels)
    each = np.arange(len(true))
    return metrics.ranks(scores, each, true), true


def class_ranks(
    extractor: Extractor, split: EvalSplit
) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray] | None:
    """Rank of the true class, index of the true class, class names, and index of the predicted
    class of every image of `split`; (n,), (n,), K strings, (n,). None off the main process.

    Raises DataError for a set with several labels per image.
    """
    found = class_scores(extractor, split)
    if found is None:
        return None
    scores, ids, names = found
    ranks, true = _ranks(split, scores, ids)
    return ranks, true, names, scores.whole().argmax(dim=1).numpy()


def evaluate(extractor: Extractor, row: EvalDataset) -> Outcome | None:
    """The row's metrics by the scores of the classes.

    Candidate classes are those of the prompt file, or those that occur in the test split where the
    row has none. ROC AUC takes the probability of the second class.
    """
    split = EvalSplit(row, "test", extractor.size)
    found = class_scores(extractor, split)
    if found is None:
        return None
    scores_of, ids, names = found
    wanted, measured = row.tasks["zero_shot"], {}
    if {"map_11_point", "roc_auc"} & set(wanted):
        scores = metrics_scores.probabilities(scores_of.whole())
        metrics_scores.check_finite(scores, row.name)
        if "map_11_point" in wanted:
            targets = split.targets[:, ids]
            measured["map_11_point"] = metrics_scores.mean_average_precision_11(scores, targets)
        if "roc_auc" in wanted:
            if len(names) != 2:
                raise DataError(f"{row.name}: roc_auc needs two classes, these are {names[:5]}")
            positive = split.labels == ids[1]
            measured["roc_auc"] = metrics_scores.area_under_roc(scores[:, 1], positive)
    if not set(wanted) <= set(measured):
        measured |= metrics.classification_metrics(*_ranks(split, scores_of, ids))
    templates = split.templates()
    return Outcome(
        measured,
        classes=len(names),
        protocol=_describe(split, len(names), len(templates), extractor.late),
        digest=rows.prompt_digest(names, templates),
    )


def _describe(split: EvalSplit, classes: int, templates: int, late: bool) -> str:
    """The protocol in words; equal words are equal protocols."""
    row = split.row
    of = "classes of the set" if row.all_classes else "classes of the split"
    of = f"classes of prompts/{row.prompts}" if row.prompts else of
    named = {"prompts": row.prompts, "source": "the source's own"}
    which = row.templates_from
    if isinstance(row.templates, str):
        which = named.get(row.templates, row.templates)
    mean = "normalised prompt features"
    if late:
        mean = "scores, one a prompt, each of late interaction, the mean over image tokens"
    text = (
        f"zero-shot among the {classes} {of}, mean of {templates} {mean} ({which}), ties count as "
        "errors"
    )
    if row.protocol:
        resized = "squashed to" if row.squash else f"resize {split.resize} crop"
        text += f"; protocol {row.protocol}: {resized} {split.crop}, softmax of 100 x "
        text += "score" if late else "cosine"
    return text
