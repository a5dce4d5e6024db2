"""One table in five formats. A table is `table.Table`."""

import base64
import csv as csv_module
import html as html_module
import io
from itertools import groupby
from pathlib import Path

from eval.report import palette, render_names
from eval.report.table import Column, Line, Table

EMPTY = "—"
TASKS, METRICS = render_names.TASKS, render_names.METRICS
FILL = f"{EMPTY} = not evaluated yet; fill with:"
LEGEND = (
    "Percent, with the 95 % interval: Wilson, or bootstrap for means over classes and R@K; none "
    "for detection."
)


def size(column: Column) -> str:
    """'n=810, k=28'; without k where there are no classes, empty for a column without results."""
    if column.n is None:
        return ""
    return f"n={column.n}" + (f", k={column.classes}" if column.classes is not None else "")


def header(column: Column) -> list[str]:
    """The three lines of a column's head: data set, task and metric, size."""
    measure = f"{render_names.task_name(column.task)} {render_names.metric_name(column.metric)}"
    return [column.dataset, f"{measure}{protocol(column)}", size(column)]


def protocol(column: Column) -> str:
    """', elevater protocol' where the data set has several."""
    return f", {column.protocol} protocol" if column.protocol else ""


def interval(row: dict) -> str:
    """' [40.1, 46.3]', or nothing for a result without an interval."""
    return " [{:.1f}, {:.1f}]".format(*row["ci95"]) if row["ci95"] else ""


def cell(line: Line, column: Column) -> str:
    """'43.2 [40.1, 46.3]' or a dash."""
    row = line.cells.get(column)
    return EMPTY if row is None else f"{row['value']:.1f}{interval(row)}"


def name(line: Line) -> str:
    """Label of a line, with the name of its configuration where that says more."""
    return line.label if line.config_name == line.label else f"{line.label} ({line.config_name})"


def md(table: Table) -> str:
    """GitHub Markdown, a line per measure and a column per run: it stays narrow on a terminal."""
    head = ["data set", "measure", "n", *(name(line) for line in table.lines)]
    body = []
    for column in table.columns:
        dataset, measure, samples = header(column)
        body.append([dataset, measure, samples, *(cell(line, column) for line in table.lines)])
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    rule = ["-" * width if i < 3 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    text = [f"**{table.title}**", ""]
    for row in (head, rule, *body):
        cells = [
            c.ljust(w) if i < 3 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        text.append(f"| {' | '.join(cells)} |")
    text += ["", LEGEND, "", *(f"- {note}" for note in table.notes)]
    if table.commands:
        text += ["", FILL, "", "```", *table.commands, "```"]
    return "\n".join(text) + "\n"


def tex_escape(text: str) -> str:
    """`text` with the characters that LaTeX would interpret, or lacks, replaced."""
    for plain, escaped in (("\\", r"\textbackslash "), ("_", r"\_"), ("%", r"\%"), ("&", r"\&")):
        text = text.replace(plain, escaped)
    return text.replace("→", r"$\rightarrow$").replace(EMPTY, "---").replace("#", r"\#")


def tex(table: Table) -> str:
    """A LaTeX tabular (booktabs); notes and commands as comments."""
    heads = zip(*(header(column) for column in table.columns), strict=True)
    lines = [f"% {table.title}. {LEGEND}", *(f"% {note}" for note in table.notes)]
    lines += [f"% {FILL} {command}" for command in table.commands]
    lines += [r"\begin{tabular}{l" + "r" * len(table.columns) + "}", r"\toprule"]
    lines += [" & ".join(["", *map(tex_escape, head)]) + r" \\" for head in heads]
    lines.append(r"\midrule")
    for line in table.lines:
        cells = [
            tex_escape(name(line)),
            *(tex_escape(cell(line, column)) for column in table.columns),
        ]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


# Of a line of `csv`: keys of a result row, which stand there as they are, and what is made of them.
KEYS = (
    "run", "config_name", "checkpoint_hash", "step", "samples_seen", "dataset", "split", "task",
    "metric", "n", "classes", "value",
)  # fmt: skip
LAST_KEYS = ("protocol", "recipe", "prompt_digest", "training_git", "git_hash", "date")


def csv(table: Table) -> str:
    """Comma-separated, a line for each number, unrounded, with the names of the result rows;
    `measure` is what the other formats call task and metric, `low` and `high` are the interval.
    A cell without a result has no line."""
    out = io.StringIO()
    writer = csv_module.writer(out, lineterminator="\n")
    writer.writerow([*KEYS, "low", "high", "measure", *LAST_KEYS])
    for column in table.columns:
        for row in (line.cells[column] for line in table.lines if column in line.cells):
            first, last = ([row.get(key) for key in keys] for keys in (KEYS, LAST_KEYS))
            writer.writerow([*first, *(row["ci95"] or [None, None]), header(column)[1], *last])
    return out.getvalue()


def html_table(table: Table) -> str:
    """The <table> with its notes, a line per measure and a column per run as in `md`; a click on a
    head sorts (script in `page`)."""
    escape = html_module.escape
    heads = "".join(f"<th>{escape(name(line))}</th>" for line in table.lines)
    body = []
    for column in table.columns:
        dataset, measure, samples = map(escape, header(column))
        cells = [f"<th>{dataset}<br>{measure}<br><small>{samples}</small></th>"]
        for row in (line.cells.get(column) for line in table.lines):
            if row is None:
                cells.append(f'<td data-value="">{EMPTY}</td>')
                continue
            cells.append(
                f'<td data-value="{row["value"]}">{row["value"]:.1f}'
                f"<small>{interval(row)}</small></td>"
            )
        body.append(f"<tr>{''.join(cells)}</tr>")
    notes = "".join(f"<li>{escape(note)}</li>" for note in [LEGEND, *table.notes])
    fill = ""
    if table.commands:
        fill = f"<p>{FILL}</p><pre>{escape(chr(10).join(table.commands))}</pre>"
    return (
        '<div class="scroll"><table class="wraps results"><thead><tr><th>measure</th>'
        f"{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div><ul>{notes}</ul>{fill}"
    )


def html_facts(heads: list[str], facts: dict[str, list[str]]) -> str:
    """A <table> of texts: `heads` of its columns, and a line of texts for each fact."""
    escape = html_module.escape
    columns = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join(
        f"<tr><th>{escape(fact)}</th>{''.join(f'<td>{escape(text)}</td>' for text in texts)}</tr>"
        for fact, texts in facts.items()
    )
    return (
        f'<div class="scroll"><table class="wraps facts"><thead><tr><th></th>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def picture(path: Path, caption: str) -> str:
    """An <img> that holds the PNG file itself, as large as it was drawn, or as the page is wide."""
    data = path.read_bytes()
    width = int.from_bytes(data[16:20], "big") // palette.DENSITY  # of the file's first chunk
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<img alt="{html_module.escape(caption)}" width="{width}" src="{source}">'


STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;padding:1rem;max-width:70rem;color:#222}
h1{font-size:1.4rem}h2{font-size:1.1rem}img{max-width:100%;height:auto}.scroll{overflow-x:auto}
figure{margin:0;max-width:100%}.pictures{display:flex;flex-wrap:wrap;gap:1rem 2rem}
table{border-collapse:collapse;font-size:.85rem}th,td{padding:.4rem .6rem;border-bottom:1px solid
#ddd;text-align:right;white-space:nowrap}thead th{cursor:pointer;vertical-align:bottom;
background:#f4f4f4}tr>:first-child{text-align:left;position:sticky;left:0;background:#f4f4f4}
small,li{color:#555}li{font-size:.85rem;overflow-wrap:anywhere}
pre{overflow-x:auto;background:#f4f4f4;padding:.6rem}
.wraps thead th{white-space:normal;min-width:4.5rem}.wraps tr>:first-child{white-space:normal;
min-width:8rem;max-width:11rem;border-right:1px solid #ccc}td.published{color:#555}
.results td small{display:block}.results thead th,.facts td{overflow-wrap:anywhere}
.facts td{white-space:normal;min-width:5rem}.facts thead th{cursor:default}
td.ours{font-weight:600;border-left:1px solid #ccc}
@media(min-width:50rem){.results tr>:first-child{max-width:none;white-space:nowrap}}
.up::after{content:" ▲"}.down::after{content:" ▼"}
"""
SORT = """
document.querySelectorAll("table:not(.facts) thead th").forEach(th => th.onclick = () => {
  const table = th.closest("table"), body = table.tBodies[0], i = th.cellIndex;
  const up = th.className === "down";
  const key = tr => i ? tr.cells[i].dataset.value : tr.cells[i].textContent;
  const compare = (a, b) => i ? a - b : a.localeCompare(b);
  body.append(...[...body.rows].sort((a, b) =>
    (key(a) === "") - (key(b) === "") || (up ? 1 : -1) * compare(key(a), key(b))));
  table.querySelectorAll("thead th").forEach(other => other.className = "");
  th.className = up ? "up" : "down";
});
"""


def page(title: str, body: str) -> str:
    """A whole HTML page that needs nothing else: style and the sorting script are inside."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html_module.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{body}<script>{SORT}</script></body></html>\n"
    )


def html(table: Table) -> str:
    """A self-contained page with the sortable table."""
    return page(table.title, f"<h1>{html_module.escape(table.title)}</h1>{html_table(table)}")


def png(table: Table, path: Path) -> None:
    """A picture: one panel per data set and task, so that it stays readable on a page."""
    # Here and not above: text formats should not wait for matplotlib.
    from eval.report.figures import new_figure, save

    panels = [list(g) for _, g in groupby(table.columns, key=lambda column: column[:2])]
    row_count = len(table.lines) + 2
    figure, axes = new_figure(len(panels), 1, (12, len(panels) * (0.32 * row_count + 0.5) + 0.4))
    for axis, columns in zip(axes[:, 0], panels, strict=True):
        axis.axis("off")
        title = f"{columns[0].dataset}, {render_names.task_name(columns[0].task)}"
        axis.set_title(title, loc="left", fontweight="bold")
        drawn = axis.table(
            [[cell(line, column) for column in columns] for line in table.lines],
            rowLabels=[name(line) for line in table.lines],
            colLabels=[
                f"{render_names.metric_name(column.metric)}{protocol(column)}\n{size(column)}"
                for column in columns
            ],
            bbox=(0.12, 0, 0.88, 1),
            cellLoc="center",
        )
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(8)
    figure.suptitle(table.title)
    save(figure, path)
