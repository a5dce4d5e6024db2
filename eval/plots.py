"""Pictures and one web page: `python -m eval.plots --runs RUN... --results DIR --output DIR`."""

import argparse
import base64
import html
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put eval/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval import rows, tables
from eval.report import render
from eval.report.table import Table
from eval.sources.registry import REGISTRY, Registry
from loaders.errors import DataError, run_cli
from loaders.specs import as_path

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


def write_page(table: Table, folder: Path) -> Path:
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
    known, measured = Registry(registry), tables.load_folder(args.results)
    logs = {folder.resolve().name: read_log(folder) for folder in args.runs}
    # Late: torch and the towers take ten seconds, and the answers above should not.
    from eval.report import figures, pictures
    from eval.tasks.evaluation import make_accelerator
    from eval.tasks.features import Extractor
    from models import weights

    # The first run is the one that is shown in the grid and the confusion matrix.
    loaded = [weights.load_run(folder) for folder in args.runs]
    order = {(run.name, run.checkpoint_hash): i for i, run in enumerate(loaded)}
    found = [row for row in measured if (row["run"], row["checkpoint_hash"]) in order]
    found.sort(key=lambda row: order[row["run"], row["checkpoint_hash"]])
    if not found:
        raise DataError(f"{args.results} holds no rows of the current checkpoints of these runs")
    table = tables.join(found, args.results, known)

    args.output.mkdir(parents=True, exist_ok=True)
    figures.curves(logs, args.output / "curves.png")
    pictures.draw_bars(table, found, args.output / "bars.png")
    extractor = Extractor(make_accelerator(), loaded[0], args.results / ".features", 256, 0)
    evaluated = {(row["dataset"], row["task"]) for row in found}
    classified = [d for d in known.datasets.values() if (d.name, "zero_shot") in evaluated]
    if classified:
        pictures.draw_confusion(extractor, classified, args.output / "confusion.png")
    captioned = [d for d in known.datasets.values() if (d.name, "retrieval") in evaluated]
    if captioned:
        pictures.draw_grid(extractor, captioned[0], args.output / "retrieval_grid.png")
    print(write_page(table, args.output))


if __name__ == "__main__":
    run_cli(main)
