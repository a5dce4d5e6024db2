"""The classes that a fitted task chooses among: labels of several splits meet by class name.

Ids are positions in a split's own list of classes, and two splits of one set may have two lists
(class folders of which one is absent, manifests and ClassLabel columns in another order), so no
label of one split may be compared with one of another but through `meet`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.sources.presence import TEST_ONLY
from eval.sources.registry import EvalDataset
from eval.sources.splits import EvalSplit
from loaders.errors import DataError


@dataclass(frozen=True)
class CommonClasses:
    """Candidates of a task, and the labels of its splits among them.

    Attributes:
        names: K class names.
        targets: split -> (n,) int64 positions in `names`, or (n, K) float32, 0 or 1, for several
            labels per image.
    """

    names: list[str]
    targets: dict[str, np.ndarray]

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return any(target.ndim == 2 for target in self.targets.values())


def open_sets(chosen: Sequence[tuple[str, EvalDataset]]) -> None:
    """Open what tasks read of their sets: what is wrong with one must be said before a model is
    built. No image is decoded, so the crop does not matter.

    Args:
        chosen: (task, row) pairs; a task that is none of `TEST_ONLY` fits on the split `train`.

    Raises DataError as `open_splits`, and for a first sample without a caption in retrieval.
    """
    for task, row in chosen:
        if task not in TEST_ONLY:
            open_splits(row, ("train",), crop=1)
            continue
        split = EvalSplit(row, "test", crop=1)
        if task == "zero_shot":
            split.class_names()
        elif len(split):
            split.texts(0)


def open_splits(
    row: EvalDataset, fitted: Sequence[str], crop: int
) -> tuple[dict[str, EvalSplit], CommonClasses]:
    """The splits `fitted` and `test` of `row` by name, and their common classes.

    Raises DataError as `EvalSplit` and `meet` do; no image is decoded.
    """
    splits = {name: EvalSplit(row, name, crop) for name in (*fitted, "test")}
    classes = meet(splits, fitted)
    if len(classes.names) != 2 and any("roc_auc" in metrics for metrics in row.tasks.values()):
        raise DataError(
            f"{row.name}: roc_auc needs two classes, these are {len(classes.names)}: "
            f"{classes.names[:5]}"
        )
    return splits, classes


def meet(splits: dict[str, EvalSplit], fitted: Sequence[str]) -> CommonClasses:
    """Candidates of a task that fits on the splits `fitted` and is scored on the split `test`.

    With a prompt file the candidates are its classes; what has no training sample counts as an
    error of the task, unless a head made of text chooses it. Without one they are the classes with
    training samples, so one that the test split lacks is a candidate too. A class of the test
    split without a training sample is refused by name: no fit can choose it, and most often it is
    a class of the training split in another spelling. Names are compared exactly ("a" and "A" are
    two classes of EMNIST).

    Raises DataError for that, for samples without a label, and for classes that share a name or
    have none (`EvalSplit.occurring_classes`).
    """
    for split in splits.values():
        if not len(split):
            raise DataError(f"{_where(split)}: no image with a label")
        missing = 0 if split.targets is not None else int((split.labels < 0).sum())
        if missing:
            raise DataError(
                f"{_where(split)}: one label per image is needed, {missing} of {len(split)} images "
                "have none; `labelled_only: true` in the registry leaves them out"
            )
    test_ids, test_names = splits["test"].class_names()
    if splits["test"].row.prompts:  # the labels of every split are ids of the prompt file already
        targets = {name: _among(split, test_ids) for name, split in splits.items()}
        return CommonClasses(test_names, targets)
    of_split = {name: split.occurring_classes() for name, split in splits.items()}
    test_names = of_split["test"][1]
    names = list(dict.fromkeys(name for split in fitted for name in of_split[split][1]))
    untrained = [name for name in test_names if name not in set(names)]
    if untrained:
        folded = {_fold(name): name for name in names}
        near = [folded[_fold(name)] for name in untrained if _fold(name) in folded]
        hint = f", which has {near[:5]}: give equal classes equal names" if near else ""
        raise DataError(
            f"{_where(splits['test'])}: no sample of the classes {untrained[:5]} "
            f"({len(untrained)} of {len(test_names)}) in the training split "
            f"{_where(splits[fitted[0]])}{hint}"
        )
    targets = {}
    for name, (ids, own) in of_split.items():
        place = {class_name: int(i) for i, class_name in zip(ids, own, strict=True)}
        targets[name] = _among(splits[name], np.array([place.get(n, -1) for n in names]))
    return CommonClasses(names, targets)


def _among(split: EvalSplit, ids: np.ndarray) -> np.ndarray:
    """Labels of `split` as positions in `ids` (K,), or as a 0/1 matrix (n, K); an id of -1 stands
    for a class that the split does not have."""
    if split.targets is not None:
        columns = split.targets[:, np.maximum(ids, 0)]
        return np.where(ids >= 0, columns, False).astype(np.float32)
    position = np.full(max(ids.max(), split.labels.max()) + 1, -1)
    position[ids[ids >= 0]] = np.flatnonzero(ids >= 0)
    return position[split.labels]


def _where(split: EvalSplit) -> str:
    return f"{split.row.name}, split {split.split} ({split.source.what})"


def _fold(name: str) -> str:
    """A class name without case, spaces and underscores, for hints only."""
    return "".join(name.replace("_", " ").casefold().split())
