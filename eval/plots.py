"""Pictures and one web page: `python -m eval.plots --runs RUN... --results DIR --output DIR`."""

import argparse
import base64
import html
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put eval/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from eval import rows, tables, zero_shot
from eval.cli import make_accelerator
from eval.features import Extractor
from eval.report import figures, render
from eval.sources.registry import REGISTRY, EvalDataset, Registry
from eval.sources.splits import EvalSplit
from loaders.errors import DataError, run_cli
from loaders.specs import as_path
from models import weights

BEST = 5
QUERIES = 4
PAGE_TITLE = "UniCL quickstart: clip art, not ImageNet"
INTRODUCTION = (
    "Small models trained from scratch on a few thousand drawings, to show that training and "
    "evaluation work. The numbers say nothing about ImageNet or about the paper's models."
)
CREDITS = (
    "Drawings: Open Clip Art (public domain); Noto Emoji © Google (Apache-2.0); Fluent Emoji "
    "© Microsoft (MIT); Twemoji © Twitter and contributors (CC-BY-4.0)."
)
CAPTIONS = {
    "bars.png": "Main metric of every set, with 95 % intervals.",
    "curves.png": "Training curves.",
    "retrieval_grid.png": "Retrieval: caption to images, image to captions.",
    "confusion.png": "Zero-shot confusion, percent of each true class.",
}


def chance_level(column: tables.Column, found: list[dict]) -> float:
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


def draw_bars(table: tables.Table, found: list[dict], path: Path) -> None:
    """The first metric that the registry names for every set and task, one bar per run."""
    first: dict[tuple, tables.Column] = {}
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
        panels.append((f"{rows.run_name(extractor.run)}, zero-shot on {row.name}", names, counts))
    figures.confusion(panels, path)


def draw_grid(extractor: Extractor, row: EvalDataset, path: Path) -> None:
    """Best matches of a few seeded captions and images of the test split."""
    split = EvalSplit(row, "test", extractor.size)
    captions, owner = split.distinct_texts()
    texts = extractor.texts(captions, f"{row.name} captions")["feature"].double()
    images = extractor.images(split)["feature"].double()
    generator = np.random.default_rng(0)
    by_text = []
    for t in generator.permutation(len(captions))[:QUERIES]:
        top = (images @ texts[t]).topk(min(BEST, len(images))).indices.tolist()
        by_text.append((captions[t], [(split.image(i), owner[i] == t) for i in top]))
    by_image = []
    for i in generator.permutation(len(split))[:QUERIES]:
        top = (texts @ images[i]).topk(min(BEST, len(captions))).indices.tolist()
        by_image.append((split.image(int(i)), [(captions[t], owner[i] == t) for t in top]))
    title = f"{rows.run_name(extractor.run)} on {row.name}: seeded queries, {len(split)} images"
    figures.retrieval_grid(by_text, by_image, title, path)


def write_page(table: tables.Table, folder: Path) -> Path:
    """FOLDER/index.html with the table and every picture of FOLDER inside."""
    body = [f"<h1>{PAGE_TITLE}</h1><p>{INTRODUCTION}</p>", render.html_table(table)]
    for name, caption in CAPTIONS.items():
        if (folder / name).exists():
            data = base64.b64encode((folder / name).read_bytes()).decode()
            alt = html.escape(caption)
            image = f'<img alt="{alt}" src="data:image/png;base64,{data}">'
            body.append(f'<h2>{alt}</h2><div class="scroll">{image}</div>')
    body.append(f"<p><small>{CREDITS}</small></p>")
    path = folder / "index.html"
    path.write_text(render.page(PAGE_TITLE, "".join(body)), encoding="utf-8")
    return path


def read_log(folder: Path) -> list[dict]:
    """Lines of RUN/metrics.jsonl; a run without one raises DataError."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise DataError(f"{path} is not there: {folder} is no run folder, or has not trained yet")
    return rows.read_rows(path)


def main(argv: Sequence[str] | None = None, registry=REGISTRY) -> None:
    """Command line; `registry` is another datasets.yaml."""
    parser = argparse.ArgumentParser(prog="python -m eval.plots", description="Pictures and page.")
    parser.add_argument("--runs", nargs="+", required=True, metavar="RUN", type=as_path)
    parser.add_argument("--results", required=True, metavar="DIR", type=as_path)
    parser.add_argument("--output", required=True, metavar="DIR", type=as_path)
    args = parser.parse_args(argv)
    known = Registry(registry)
    # The first run is the one that is shown in the grid and the confusion matrix.
    loaded = [weights.load_run(folder) for folder in args.runs]
    order = {(rows.run_name(run), run.checkpoint_hash): i for i, run in enumerate(loaded)}
    found = [
        row
        for row in tables.load_folder(args.results)
        if (row["run"], row["checkpoint_hash"]) in order
    ]
    found.sort(key=lambda row: order[row["run"], row["checkpoint_hash"]])
    if not found:
        raise DataError(f"{args.results} holds no rows of the current checkpoints of these runs")
    table = tables.join(found, args.results, known)

    args.output.mkdir(parents=True, exist_ok=True)
    figures.curves({f.resolve().name: read_log(f) for f in args.runs}, args.output / "curves.png")
    draw_bars(table, found, args.output / "bars.png")
    extractor = Extractor(make_accelerator(), loaded[0], args.results / ".features", 256, 0)
    evaluated = {(row["dataset"], row["task"]) for row in found}
    classified = [d for d in known.datasets.values() if (d.name, "zero_shot") in evaluated]
    if classified:
        draw_confusion(extractor, classified, args.output / "confusion.png")
    captioned = [d for d in known.datasets.values() if (d.name, "retrieval") in evaluated]
    if captioned:
        draw_grid(extractor, captioned[0], args.output / "retrieval_grid.png")
    print(write_page(table, args.output))


if __name__ == "__main__":
    run_cli(main)
