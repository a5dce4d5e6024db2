"""The pictures of `eval.plots`: bars, confusion and retrieval, from rows and from features."""

from pathlib import Path

import numpy as np

from eval.report import figures, render
from eval.report.table import Column, Table
from eval.sources.registry import EvalDataset
from eval.sources.splits import EvalSplit
from eval.tasks import zero_shot
from eval.tasks.features import Extractor
from eval.tasks.scores import compare

BEST = 5
QUERIES = 4


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
    figures.bars(
        [
            f"{c.dataset}\n{render.TASKS[c.task]}, {render.METRICS[c.metric]}\n{render.size(c)}"
            for c in columns
        ],
        {line.label: [line.cells.get(c) for c in columns] for line in table.lines},
        [chance_level(column, found) for column in columns],
        table.title,
        path,
    )


def draw_confusion(extractor: Extractor, datasets: list[EvalDataset], path: Path) -> None:
    """Zero-shot confusion of one run on every given data set."""
    panels = []
    for row in datasets:
        split = EvalSplit(row, "test", extractor.size)
        _, true, names, predicted = zero_shot.class_ranks(extractor, split)
        counts = np.zeros((len(names), len(names)), dtype=np.int64)
        np.add.at(counts, (true, predicted), 1)
        panels.append((f"{extractor.run.name}, zero-shot on {row.name}", names, counts))
    figures.confusion(panels, path)


def draw_grid(extractor: Extractor, row: EvalDataset, path: Path) -> None:
    """Best matches of a few seeded captions and images of the test split."""
    split = EvalSplit(row, "test", extractor.size)
    captions, owner = split.distinct_texts()
    texts, images = extractor.texts(captions, f"{row.name} captions"), extractor.images(split)
    device = extractor.accelerator.device
    of_texts = compare(texts, images, row.name, device)
    of_images = compare(images, texts, row.name, device)
    generator = np.random.default_rng(0)
    by_text = []
    for t in generator.permutation(len(captions))[:QUERIES]:
        top = of_texts.row(t).topk(min(BEST, len(split))).indices.tolist()
        by_text.append((captions[t], [(split.image(i), owner[i] == t) for i in top]))
    by_image = []
    for i in generator.permutation(len(split))[:QUERIES]:
        top = of_images.row(i).topk(min(BEST, len(captions))).indices.tolist()
        by_image.append((split.image(int(i)), [(captions[t], owner[i] == t) for t in top]))
    title = f"{extractor.run.name} on {row.name}: seeded queries, {len(split)} images"
    figures.retrieval_grid(by_text, by_image, title, path)
