"""Pictures and one web page: `python -m eval.plots --runs RUN... --results DIR --output DIR`."""

import argparse
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

INTRODUCTION = (
    "Small models trained from scratch on a few thousand drawings, to show that training and "
    "evaluation work. The numbers say nothing about ImageNet or about the paper's models."
)
CREDITS = (
    "Drawings: Open Clip Art (public domain); Noto Emoji © Google (Apache-2.0); Fluent Emoji "
    "© Microsoft (MIT); Twemoji © Twitter and contributors (CC-BY-4.0)."
)
CAPTIONS = {
    "bars.png": "Main metric of every set",
    "curves.png": "Training curves",
    "confusion.png": "Zero-shot confusion",
    "retrieval.png": "Retrieval: what was found, and where the right answer came",
}


def write_page(
    table: Table, runs: dict[str, list[str]], commands: list[str], pictures: list[Path], path: Path
) -> Path:
    """One HTML file with the table, the facts and commands of the runs, and the pictures inside.

    Args:
        runs: fact -> its text for each line of `table`. commands: lines that say what trained
            them. pictures: in the order of the page, with names of CAPTIONS.
    """
    clip_art = table.title == tables.QUICKSTART_TITLE
    body = [f"<h1>{html.escape(table.title)}</h1>", f"<p>{INTRODUCTION}</p>" if clip_art else ""]
    body += [render.html_table(table), "<h2>Runs</h2>"]
    body.append(render.html_facts([render.name(line) for line in table.lines], runs))
    body.append(f"<pre>{html.escape(chr(10).join(commands))}</pre>" if commands else "")
    body.append('<div class="pictures">')
    for picture in pictures:
        caption = CAPTIONS[picture.name]
        body.append(
            f"<figure><h2>{html.escape(caption)}</h2>{render.picture(picture, caption)}</figure>"
        )
    body.append(f"</div><p><small>{CREDITS}</small></p>" if clip_art else "</div>")
    path.write_text(render.page(table.title, "".join(body)), encoding="utf-8")
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
    logs = [read_log(folder) for folder in args.runs]
    # Late: torch and the towers take ten seconds, and the answers above should not.
    from eval.report import run_facts
    from models import weights

    loaded = [weights.load_run(folder) for folder in args.runs]
    order = {(run.name, run.checkpoint_hash): i for i, run in enumerate(loaded)}
    found = [row for row in measured if (row["run"], row["checkpoint_hash"]) in order]
    found.sort(key=lambda row: order[row["run"], row["checkpoint_hash"]])
    if not found:
        raise DataError(f"{args.results} holds no rows of the current checkpoints of these runs")
    table = tables.join(found, args.results, known)
    args.output.mkdir(parents=True, exist_ok=True)
    pictures = draw(loaded, logs, table, found, known, args)

    shown = sorted({order[row["run"], row["checkpoint_hash"]] for row in found})  # lines of `table`
    facts = [run_facts.read(args.runs[i], loaded[i].step, logs[i]) for i in shown]
    rows = [[r for r in found if order[r["run"], r["checkpoint_hash"]] == i] for i in shown]
    commands = [
        text
        for line, one in zip(table.lines, facts, strict=True)
        for text in (f"# {render.name(line)}", *(one.commands or [run_facts.UNKNOWN]))
    ]
    page = args.output / "index.html"
    print(write_page(table, run_facts.table(facts, rows), commands, pictures, page))


def draw(
    loaded: list, logs: list[list[dict]], table: Table, found: list[dict], known: Registry, args
) -> list[Path]:
    """Draw into `args.output` what there are results for; the pictures in the order of CAPTIONS.

    Args:
        loaded: runs as `models.weights.load_run` returns them; the first one is shown in the
            confusion matrices and the examples of retrieval. logs: of each.
    """
    from eval.report import figure_curves, figures, pictures
    from eval.tasks.evaluation import make_accelerator
    from eval.tasks.features import Extractor

    names = [run.name for run in loaded]
    names = [
        name if names.count(name) == 1 else str(folder)
        for name, folder in zip(names, args.runs, strict=True)
    ]
    place = {name: args.output / name for name in CAPTIONS}
    pictures.draw_bars(table, found, place["bars.png"])
    curves = figure_curves.curves(dict(zip(names, logs, strict=True)))
    figures.save(curves, place["curves.png"])
    extractor = Extractor(make_accelerator(), loaded[0], args.results / ".features", 256, 0)
    evaluated = {(row["dataset"], row["task"]) for row in found}
    sets = [d for d in known.datasets.values() if not d.multilabel]
    drawn = {"bars.png", "curves.png"}
    if classified := [d for d in sets if (d.name, "zero_shot") in evaluated]:
        pictures.draw_confusion(extractor, classified, place["confusion.png"])
        drawn.add("confusion.png")
    if captioned := [d for d in sets if (d.name, "retrieval") in evaluated]:
        pictures.draw_retrieval(extractor, captioned[0], place["retrieval.png"])
        drawn.add("retrieval.png")
    return [path for name, path in place.items() if name in drawn]


if __name__ == "__main__":
    run_cli(main)
