"""A published table (`paper_tables.PaperTable`) beside our numbers, as text."""

import csv as csv_module
import html as html_module
import io

from eval.report import render
from eval.report.paper_tables import Cell, Column, PaperTable, Published, Row

OTHER_RECIPE, UNVERIFIED = "†", "‡"
RECIPES = {
    "release_defaults": "release_defaults (the released code's defaults)",
    "ours": "ours (chosen by whoever ran it)",
    None: "not recorded",
}
FACTS = {"label": "row", "model": "model", "data": "training data", "method": "method"}


def decimals(table: PaperTable, column: Column) -> int:
    """Decimals that the paper prints in this column."""
    cells = [c for row in table.rows for c in row.cells if c.column.id == column.id]
    printed = [repr(p.value) for c in cells for p in c.published]
    return max((len(text.partition(".")[2]) for text in printed), default=1)


def ours(cell: Cell, places: int) -> str:
    """Our number, marked where the recipe is not the paper's; a dash without a run."""
    if cell.ours is None:
        return render.EMPTY if cell.applies else "n/a"
    return f"{cell.ours:.{max(places, 1)}f}{OTHER_RECIPE if cell.recipe != 'paper' else ''}"


def published(table: PaperTable, cell: Cell, places: int) -> str:
    """All published numbers: unverified ones marked, with a letter for the source of each where the
    table has several sources."""
    if not cell.published:
        return render.EMPTY if cell.applies else "n/a"
    return " / ".join(published_one(table, p, places) for p in cell.published)


def published_one(table: PaperTable, number: Published, places: int) -> str:
    """One published number with its marks."""
    mark = "" if number.verified else UNVERIFIED
    return f"{number.value:,.{places}f}{mark}{letter(table, number.source)}"


def letter(table: PaperTable, source: str) -> str:
    """' [a]' for the first of several sources; nothing where all numbers have the same."""
    place = table.sources.index(source)
    return f" [{chr(ord('a') + place)}]" if len(table.sources) > 1 else ""


def difference(cell: Cell, places: int) -> str:
    """Ours minus each published number, in points."""
    values = [f"{d:+.{max(places, 1)}f}".replace("-", "−") for d in cell.differences()]
    return " / ".join(values) or (render.EMPTY if cell.applies else "n/a")


def signs(table: PaperTable) -> list[str]:
    """What the signs in the table mean, as far as they occur."""
    cells = [cell for row in table.rows for cell in row.cells]
    letters = [f"{letter(table, s)} {s}".strip() for s in table.sources]
    lines = [f"Published: {'; '.join(letters)}."] if letters else []
    recipes = {cell.recipe for cell in cells if cell.ours is not None} - {"paper"}
    if recipes:
        names = ", ".join(RECIPES[name] for name in sorted(recipes, key=str))
        lines.append(f"{OTHER_RECIPE} The run's recipe is not the paper's: {names}.")
    if any(not p.verified for cell in cells for p in cell.published):
        lines.append(f"{UNVERIFIED} Second-hand: not read in the named source itself.")
    return lines


def legend(table: PaperTable) -> list[str]:
    """The lines under the table: signs, then notes."""
    points = "Difference: ours minus published, in absolute points."
    return [*signs(table), *([points] if table.joined else []), *table.notes]


def facts(table: PaperTable) -> list[str]:
    """Names of the facts that any row states, in a fixed order."""
    return [key for key in FACTS if any(key in row.facts for row in table.rows)]


def parts(table: PaperTable) -> list[str]:
    """Sub-columns of a measure."""
    return ["ours", "published", "difference"] if table.joined else ["published"]


def texts(table: PaperTable, cell: Cell) -> list[str]:
    """Text of a cell for every one of `parts`."""
    places = decimals(table, cell.column)
    three = [ours(cell, places), published(table, cell, places), difference(cell, places)]
    return three if table.joined else three[1:2]


def md(table: PaperTable) -> str:
    """GitHub Markdown, a line per row and measure: it stays narrow on a terminal."""
    keys = facts(table)
    body = []
    for row in table.rows:
        for i, cell in enumerate(row.cells):
            names = ["" if i else row.facts.get(key, "") for key in keys]
            body.append([*names, cell.column.title, *texts(table, cell)])
    head = [*(FACTS[key] for key in keys), "measure", *parts(table)]
    left = len(keys) + 1
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = [f"**{table.title}**", ""]
    for line in (head, rule, *body):
        padded = [
            text.ljust(w) if i < left else text.rjust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
    lines += ["", *(f"- {line}" for line in legend(table))]
    if table.commands:
        lines += ["", render.FILL, "", "```", *table.commands, "```"]
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    text = render.tex_escape(text)
    for sign, command in (
        (OTHER_RECIPE, r"$^\dagger$"),
        (UNVERIFIED, r"$^\ddagger$"),
        ("−", "$-$"),
    ):
        text = text.replace(sign, command)
    return text


def tex(table: PaperTable) -> str:
    """A LaTeX tabular (booktabs) in the shape of the paper; notes and commands as comments."""
    keys, kinds = facts(table), parts(table)
    lines = [f"% {table.title}", *(f"% {line}" for line in legend(table))]
    lines += [f"% {render.FILL} {command}" for command in table.commands]
    lines.append(rf"\begin{{tabular}}{{{'l' * len(keys)}{'r' * len(kinds) * len(table.columns)}}}")
    spans = [rf"\multicolumn{{{len(kinds)}}}{{c}}{{{_tex(c.title)}}}" for c in table.columns]
    lines += [r"\toprule", " & ".join([*([""] * len(keys)), *spans]) + r" \\"]
    heads = [*(FACTS[key] for key in keys), *(kinds * len(table.columns))]
    lines += [" & ".join(heads) + r" \\", r"\midrule"]
    for row in table.rows:
        names = [_tex(row.facts.get(key, "")) for key in keys]
        values = [_tex(text) for cell in row.cells for text in texts(table, cell)]
        lines.append(" & ".join([*names, *values]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def csv(table: PaperTable) -> str:
    """A line per published number (a cell without one has a line too), unrounded."""
    out = io.StringIO()
    writer = csv_module.writer(out, lineterminator="\n")
    head = ["table", "row", *FACTS, "measure", "config", "ours", "recipe"]
    writer.writerow([*head, "published", "verified", "source", "difference"])
    for row in table.rows:
        for cell in row.cells:
            mine = "" if cell.ours is None else cell.ours
            start = [table.id, row.id, *(row.facts.get(key, "") for key in FACTS)]
            start += [cell.column.title, cell.config or "", mine, cell.recipe or ""]
            differences = [round(d, 6) for d in cell.differences()] or [""] * len(cell.published)
            for p, d in zip(cell.published, differences, strict=True):
                writer.writerow([*start, p.value, str(p.verified).lower(), p.source, d])
            if not cell.published:
                writer.writerow([*start, "", "", "", ""])
    return out.getvalue()


def _html_cells(table: PaperTable, row: Row) -> str:
    """The <td> of a row; `data-value` is what a click on the head sorts by."""
    cells = []
    for cell in row.cells:
        values = [cell.ours, next((p.value for p in cell.published), None)]
        values.append(next(iter(cell.differences()), None))
        values = values if table.joined else values[1:2]
        for kind, value, text in zip(parts(table), values, texts(table, cell), strict=True):
            key = "" if value is None else value
            cells.append(f'<td class="{kind}" data-value="{key}">{html_module.escape(text)}</td>')
    return "".join(cells)


def html(table: PaperTable) -> str:
    """A self-contained page: sortable, the name of a row stays in sight when scrolled sideways."""
    escape = html_module.escape
    heads = "".join(
        f"<th>{escape(column.title)}<br><small>{kind}</small></th>"
        for column in table.columns
        for kind in parts(table)
    )
    keys, body = facts(table), []
    for row in table.rows:
        first, *others = [escape(row.facts[key]) for key in keys if key in row.facts]
        name = first + "".join(f"<br><small>{other}</small>" for other in others)
        body.append(f"<tr><th>{name}</th>{_html_cells(table, row)}</tr>")
    notes = "".join(f"<li>{escape(line)}</li>" for line in legend(table))
    fill = ""
    if table.commands:
        commands = escape("\n".join(table.commands))
        fill = f"<p>{render.FILL}</p><pre>{commands}</pre>"
    corner = escape(", ".join(FACTS[key] for key in keys))
    return render.page(
        table.title,
        f'<h1>{escape(table.title)}</h1><div class="scroll"><table class="wraps"><thead><tr>'
        f"<th>{corner}</th>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f"<ul>{notes}</ul>{fill}",
    )
