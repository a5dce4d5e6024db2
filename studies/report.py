"""Tables and pictures of a study: `python -m studies.report studies/family.yaml`.

Writes OUT/report/{table.md, index.html, measures.png, costs.png, differences.png}, and the figures
that the study states, from what is there, and prints the tables. A cell that is missing is empty,
with the command that makes it. A difference whose 95 % interval holds zero is "not shown"; that is
never "equal".
"""

import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put studies/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from loaders.errors import run_cli
from loaders.specs import as_path
from studies.run import parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parser("report", __doc__).parse_args(argv)
    # Late: what is wrong with the command line is said before configurations are read.
    from studies import _cells, _evaluations, _study, _tables

    study = _study.read(args.study)
    planned = _evaluations.plan(study)
    output = args.output or as_path(study.output)
    cells = _cells.make(study, args.study, planned, output, changes=args.changes)
    report = collect(study, planned, cells)
    words = ["python", "-m", "studies.run", str(args.study)]
    words += ["--output", str(args.output)] if args.output else []
    words += ["--set", *args.changes] if args.changes else []
    report.commands = fill(study, cells, shlex.join(words))
    text = _tables.md(report)
    folder = output / "report"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text, encoding="utf-8")
    draw(report, folder)
    print(text, end="")
    print(f"-> {folder}")


def collect(study, planned: list, cells: list):
    """What the cells tell, as a `_tables.Report` without commands."""
    from studies import _costs, _evaluations, _statistics, _tables

    measures = _evaluations.measures(study, planned)
    values = _statistics.values_of(cells, measures)
    differences = _statistics.differences(study, measures, values)
    costs = {arm: _costs.cost_of([cell for cell in cells if cell.arm == arm]) for arm in study.arms}
    notes = []
    for cell in cells:
        if differing := cell.differing():
            said = "; ".join(f"{k}: there {a!r}, here {b!r}" for k, (a, b) in differing.items())
            notes.append(f"{cell.name} is left out: its run is not that of this file ({said}).")
        failure = cell.notes / "failure.txt"
        if failure.is_file():
            notes.append(f"{cell.name} failed: {failure}.")
    return _tables.Report(study, measures, values, differences, costs, notes)


def fill(study, cells: list, command: str) -> list[str]:
    """One command for each arm that lacks something, with the seeds that lack it."""
    lacking: dict[str, list[int]] = {}
    for cell in cells:
        if not cell.trained() or cell.lacking():
            lacking.setdefault(cell.arm, []).append(cell.seed)
    if len(lacking) == len(study.arms) and all(s == study.seeds for s in lacking.values()):
        return [command]
    return [
        f"{command} --only {arm} --seeds {' '.join(map(str, seeds))}"
        for arm, seeds in lacking.items()
    ]


def draw(report, folder: Path) -> None:
    """The pictures that there is something for, and the page that holds them."""
    # Here and not above: --help should not wait for matplotlib.
    from eval.report import render
    from studies import _figures, _panels, _tables

    body = _tables.html_body(report)
    stated = [
        (name, partial(_panels.draw, name=name), bool(report.values))
        for name in report.study.figures
    ]
    for name, call, there in (
        *stated,
        ("measures", _figures.draw_measures, bool(report.values)),
        ("costs", _figures.draw_costs, bool(report.values) and _costs_known(report)),
        ("differences", _figures.draw_differences, any(d.mean for d in report.differences)),
    ):
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        if there:
            call(report, path=path)
            body += f"<p>{render.picture(path, name)}</p>"
    page = render.page(report.study.name, body)
    (folder / "index.html").write_text(page, encoding="utf-8")


def _costs_known(report) -> bool:
    return any(cost.samples_per_cpu_second for cost in report.costs.values())


if __name__ == "__main__":
    run_cli(main)
