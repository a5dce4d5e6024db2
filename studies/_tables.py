"""The report of a study as text: one table of arms, one of comparisons, notes and commands."""

import html as html_module
from dataclasses import dataclass, field

from studies import _statistics
from studies._costs import Cost
from studies._statistics import Difference, Mean, Value
from studies._study import Measure, Study

EMPTY, NONE = "—", "·"
COSTS = ("samples", "samples per CPU second", "peak memory, MB", "parameters, M")


@dataclass
class Report:
    """All that is shown: what was stated, what was found, what is missing."""

    study: Study
    measures: dict[str, Measure]
    values: dict[tuple, dict[int, Value]]
    differences: list[Difference]
    costs: dict[str, Cost]
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def mean(self, arm: str, measure: str) -> Mean | None:
        """Mean over the seeds that are there."""
        found = self.values.get((arm, measure))
        return _statistics.mean_of([v.value for v in found.values()]) if found else None

    def label(self, arm: str) -> str:
        """What tables call an arm."""
        return self.study.arms[arm].label or arm


def legend(report: Report) -> str:
    """How to read a cell of the table of arms."""
    text = (
        "Percent: mean over seeds ± half of its 95 % interval over seeds (Student's t) / ± half of "
        "that over test samples (mean over seeds). "
    )
    if len(report.study.seeds) == 1:
        text += "One seed: there is no interval over seeds. "
    text += f"{EMPTY}: not there yet; {NONE}: says nothing about this arm."
    return text


COST_LEGEND = (
    "Samples per CPU second: all processes of the training, their start included. Peak memory: the "
    "largest resident size of one process, not that of a GPU. Parameters: those of the model."
)
DIFFERENCE_LEGEND = (
    "First arm minus second, paired over seeds, with its 95 % interval (Student's t, n - 1). An "
    "interval that holds 0 shows no difference; it does not show that there is none."
)


def arm_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of the table of arms."""
    heads = ["arm", *(_statistics.label(n, m) for n, m in report.measures.items()), *COSTS]
    lines = []
    for arm in report.study.arms:
        cells = [measure_cell(report, arm, name) for name in report.measures]
        lines.append([report.label(arm), *cells, *cost_cells(report.costs[arm])])
    return heads, lines


def measure_cell(report: Report, arm: str, name: str) -> str:
    """'63.5 ± 3.5 / 3.1', '63.5 (1 of 3 seeds; no interval) / 3.1', NONE or EMPTY."""
    if report.measures[name].task in _statistics.row_tasks(report.study, arm):
        return NONE
    mean, wanted = report.mean(arm, name), len(report.study.seeds)
    if mean is None:
        return EMPTY
    text = f"{mean.mean:.1f}" + (f" ± {mean.half:.1f}" if mean.half is not None else "")
    if mean.n < wanted:
        text += f" ({mean.n} of {wanted} seeds{'' if mean.half is not None else ', no interval'})"
    halves = [value.samples_half for value in report.values[arm, name].values()]
    return text if None in halves else f"{text} / {sum(halves) / len(halves):.1f}"


def cost_cells(cost: Cost) -> list[str]:
    """The cells under COSTS."""
    return [
        f"{cost.samples:,}" if cost.samples else EMPTY,
        f"{cost.samples_per_cpu_second:.1f}" if cost.samples_per_cpu_second else EMPTY,
        f"{cost.peak_bytes / 1e6:.0f}" if cost.peak_bytes else EMPTY,
        f"{cost.parameters / 1e6:.2f}" if cost.parameters else EMPTY,
    ]


def difference_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of the table of comparisons."""
    lines = []
    for one in report.differences:
        first, second = map(report.label, one.arms)
        measure = _statistics.label(one.measure, report.measures[one.measure])
        lines.append([one.claim or EMPTY, f"{first} − {second}", measure, *_found(report, one)])
    return ["claim", "arms", "measure", "difference", "seeds", "outcome"], lines


def _found(report: Report, one: Difference) -> list[str]:
    if one.mean is None:
        return [EMPTY, f"0 of {len(report.study.seeds)}", EMPTY]
    mean = one.mean
    text, seeds = f"{mean.mean:+.2f}", f"{mean.n} of {len(report.study.seeds)}"
    if mean.half is None:
        return [text, seeds, "one seed: no interval"]
    text += f" [{mean.mean - mean.half:+.2f}, {mean.mean + mean.half:+.2f}]"
    if one.margin:
        return [text, seeds, f"at most {one.margin:g} behind: {one.verdict}"]
    higher = report.label(one.arms[0 if mean.mean > 0 else 1])
    shown = one.verdict != _statistics.NOT_SHOWN
    return [text, seeds, f"{higher} higher" if shown else one.verdict]


def md(report: Report) -> str:
    """GitHub Markdown."""
    text = [f"**{report.study.name}**", "", *_md_table(*arm_rows(report)), "", legend(report)]
    text += [COST_LEGEND]
    if report.differences:
        text += ["", *_md_table(*difference_rows(report)), "", DIFFERENCE_LEGEND]
    if report.notes:
        text += ["", *(f"- {note}" for note in report.notes)]
    if report.commands:
        text += ["", "Missing cells; fill with:", "", "```", *report.commands, "```"]
    return "\n".join(text) + "\n"


def _md_table(heads: list[str], lines: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [heads, *lines]) for i in range(len(heads))]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    rows = [heads, rule, *lines]
    return [
        "| "
        + " | ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    ]


def html_body(report: Report) -> str:
    """What stands inside <body>, without the pictures."""
    escape = html_module.escape
    parts = [f"<h1>{escape(report.study.name)}</h1>", _html_table(*arm_rows(report))]
    parts.append(f"<p><small>{escape(legend(report))} {escape(COST_LEGEND)}</small></p>")
    if report.differences:
        parts.append(_html_table(*difference_rows(report)))
        parts.append(f"<p><small>{escape(DIFFERENCE_LEGEND)}</small></p>")
    if report.notes:
        parts.append(f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in report.notes)}</ul>")
    if report.commands:
        commands = escape("\n".join(report.commands))
        parts.append(f"<p>Missing cells; fill with:</p><pre>{commands}</pre>")
    return "".join(parts)


def _html_table(heads: list[str], lines: list[list[str]]) -> str:
    escape = html_module.escape
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = []
    for line in lines:
        cells = "".join(
            f'<td data-value="{_number(text)}">{escape(text)}</td>' for text in line[1:]
        )
        body.append(f"<tr><th>{escape(line[0])}</th>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _number(text: str) -> str:
    """What a click on a head sorts by; nothing for a cell without a number."""
    first = text.split(" ")[0].replace(",", "")
    try:
        return str(float(first))
    except ValueError:
        return ""
