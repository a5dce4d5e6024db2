"""The pictures of `eval.plots`: bars, confusion and retrieval, from rows and from features."""

from pathlib import Path

import numpy as np

from eval.report import figure_confusion, figure_retrieval, figures, render, render_names
from eval.report.figure_retrieval import BEST, Answer, Direction, Query
from eval.report.table import Column, Table
from eval.sources.registry import EvalDataset
from eval.sources.splits import EvalSplit
from eval.tasks import metrics, zero_shot
from eval.tasks.features import Extractor
from eval.tasks.retrieval import pairs
from eval.tasks.scores import Scores, compare

EXAMPLES = 3  # of the queries that found the right answer, and as many of those that did not


def chance_level(column: Column, found: list[dict]) -> float:
    """Percent that guessing reaches: 1 / k for classes; for the mean of R@1, R@5 and R@10 among m
    captions about 16 / (3 m), where m is the n of the text queries in `found`."""
    if column.task != "retrieval":
        return 100 / column.classes
    texts = next(
        row["n"]
        for row in found
        if row["dataset"] == column.dataset and row["metric"] == "text_to_image_r1"
    )
    return 100 * (1 + 5 + 10) / 3 / texts


def draw_bars(table: Table, found: list[dict], path: Path) -> None:
    """The first metric that the registry names for every set and task, one bar per run."""
    first: dict[tuple, Column] = {}
    for column in table.columns:
        if column.n is not None:
            first.setdefault(column[:2], column)
    columns = list(first.values())
    figure = figures.bars(
        [
            f"{c.dataset} ({render.size(c)})\n"
            f"{render_names.task_name(c.task)}, {render_names.metric_name(c.metric)}"
            for c in columns
        ],
        {line.label: [line.cells.get(c) for c in columns] for line in table.lines},
        [chance_level(column, found) for column in columns],
        table.title,
    )
    figures.save(figure, path)


def draw_confusion(extractor: Extractor, datasets: list[EvalDataset], path: Path) -> None:
    """Zero-shot confusion of one run on every given data set."""
    panels = []
    for row in datasets:
        split = EvalSplit(row, "test", extractor.size)
        _, true, names, predicted = zero_shot.class_ranks(extractor, split)
        counts = np.zeros((len(names), len(names)), dtype=np.int64)
        np.add.at(counts, (true, predicted), 1)
        panels.append((f"{extractor.run.name}, zero-shot on {row.name}", names, counts))
    figures.save(figure_confusion.confusion(panels), path)


def draw_retrieval(extractor: Extractor, row: EvalDataset, path: Path) -> None:
    """Examples from the test split of `row` in both directions: queries that found the right answer
    first, and queries that did not among the first BEST, drawn with a fixed seed."""
    split = EvalSplit(row, "test", extractor.size)
    captions, pair_image, pair_text, _ = pairs(split)
    texts, images = extractor.texts(captions, f"{row.name} captions"), extractor.images(split)
    device = extractor.accelerator.device
    of_texts = compare(texts, images, row.name, device)
    of_images = compare(images, texts, row.name, device)

    def show(i: int):
        return split.image(i)

    def say(t: int) -> str:
        return captions[t]

    figure = figure_retrieval.retrieval(
        direction(of_texts, pair_text, pair_image, say, show),
        direction(of_images, pair_image, pair_text, show, say),
        f"{extractor.run.name} on {row.name}",
    )
    figures.save(figure, path)


def direction(
    scores: Scores, pair_query: np.ndarray, pair_candidate: np.ndarray, query, candidate
) -> Direction:
    """Counts of all queries, and examples by the rank of their best right answer.

    Args:
        scores: of n queries against m candidates. pair_query, pair_candidate: (pairs,) int64, which
            candidate is right for which query. query, candidate: number -> image or caption.
    """
    ranks = 1 + metrics.ranks(scores, pair_query, pair_candidate)

    def example(i: int) -> Query:
        row, right = scores.row(i), pair_candidate[pair_query == i].tolist()

        def answer(c: int) -> Answer:
            return Answer(candidate(c), float(row[c]), c in right)

        best = row.topk(min(BEST, len(row))).indices.tolist()
        truth = max(right, key=lambda c: float(row[c]))
        return Query(query(i), [answer(c) for c in best], answer(truth), int(ranks[i]))

    groups = np.flatnonzero(ranks == 1), np.flatnonzero(ranks > BEST)
    generator = np.random.default_rng(0)
    drawn = [generator.permutation(group)[:EXAMPLES].tolist() for group in groups]
    examples = [[example(i) for i in sorted(part, key=lambda i: ranks[i])] for part in drawn]
    return Direction(*scores.shape, *map(len, groups), *examples)
