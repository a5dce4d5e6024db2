"""Tables, pictures and the page, from rows written here."""

import csv
import io
import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import pytest
from PIL import Image

from eval import plots, tables
from eval.report import pictures, render, run_facts
from eval.report.table import Column
from eval.sources.registry import Registry
from loaders.errors import ConfigError, DataError
from tests.eval.test_end_to_end import evaluate


def result(run, dataset, task, metric, value, **changes):
    row = {"dataset": dataset, "split": "test", "n": 810, "classes": 28, "metric": metric}
    row |= {"value": value, "ci95": [value - 2.5, value + 3.25], "task": task}
    row |= {"protocol": "some protocol", "checkpoint_hash": f"hash_of_{run}", "step": 100}
    row |= {"prompt_digest": f"texts of {dataset}"}
    return row | {"run": run, "config_name": run} | changes


ROWS = [
    result("labels", "emoji_twemoji", "zero_shot", "top1", 20.0),
    result("unicl", "openclipart_classes", "linear_probe", "top1", 61.25, n=400),
    result("unicl", "emoji_twemoji", "zero_shot", "top1", 43.21),
    result("unicl", "emoji_twemoji", "zero_shot", "mean_per_class", 40.0),
    result("labels", "emoji_twemoji", "zero_shot", "mean_per_class", 18.0),
]


def test_cells_join_by_run_and_column_and_missing_ones_name_their_command(tmp_path):
    text = render.md(tables.join(ROWS, tmp_path / "results"))
    lines = [
        [c.strip() for c in t.strip("|").split("|")] for t in text.splitlines() if t[:1] == "|"
    ]
    head, body = (
        lines[0],
        [(tuple(line[:3]), dict(zip(lines[0], line, strict=True))) for line in lines[2:]],
    )
    cells = dict(body)
    order = [key for key, _ in body]
    top1 = ("emoji_twemoji", "zero-shot top-1", "n=810, k=28")
    probe = ("openclipart_classes", "linear probe top-1", "n=400, k=28")
    assert head[:3] == ["data set", "measure", "n"]
    assert order.index(top1) < order.index(probe)  # the registry's order
    assert cells[top1]["unicl"] == "43.2 [40.7, 46.5]"
    assert cells[top1]["labels"] == "20.0 [17.5, 23.2]"
    assert cells[probe]["unicl"].startswith("61.2 [58.8, 64.5]")
    assert cells[probe]["labels"] == "—"
    assert "not ImageNet" in text.splitlines()[0]
    command = "python -m eval.linear_probe --checkpoint FOLDER_OF_RUN/labels --datasets "
    assert f"{command}openclipart_classes" in text
    assert f"--output {tmp_path / 'results'}" in text
    # Never evaluated, but part of the collection: a line of dashes.
    assert cells["openclipart_captions", "retrieval mean R@1,5,10", ""]["unicl"] == "—"


class Cells(HTMLParser):
    """Texts of the cells of every table, by row."""

    def __init__(self, page):
        super().__init__()
        self.tables, self.open = [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self.open = True
        elif tag == "br" and self.open:
            self.tables[-1][-1][-1] += "\n"

    def handle_endtag(self, tag):
        self.open = self.open and tag not in ("th", "td")

    def handle_data(self, data):
        if self.open:
            self.tables[-1][-1][-1] += data


def md_cells(text):
    """Cells of the table of a Markdown text, without the rule."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [rows[0], *rows[2:]]


def test_html_is_the_same_way_round_as_the_table_of_the_terminal(tmp_path):
    table = tables.join(ROWS, tmp_path)
    terminal = md_cells(render.md(table))
    (page,) = Cells(render.html(table)).tables
    assert page[0][1:] == terminal[0][3:] == ["labels", "unicl"]
    assert [row[0].split("\n") for row in page[1:]] == [row[:3] for row in terminal[1:]]
    assert [row[1:] for row in page[1:]] == [row[3:] for row in terminal[1:]]


def test_optional_sets_that_are_not_there_are_one_line(tmp_path):
    registry, stamps = Registry(), tmp_path / "stamps"
    for name in ("stamps_classes", "stamps_captions"):
        row = registry.datasets[name]
        splits = {"test": {**row.splits["test"], "path": str(stamps)}}
        registry.datasets[name] = replace(row, splits=splits)
    table = tables.join(ROWS, tmp_path, registry)
    for form in ("md", "tex", "html"):
        (line,) = [t for t in getattr(render, form)(table).splitlines() if "stamps" in t]
        assert "stamps_classes, stamps_captions: python data_prep/quickstart.py --stamps" in line
    assert "stamps" not in render.csv(table)
    # There, but not evaluated: empty cells and the command that fills them, as for any other set.
    stamps.mkdir()
    (stamps / "manifest.json").touch()
    table = tables.join(ROWS, tmp_path, registry)
    text = render.md(table)
    assert len([t for t in text.splitlines() if t.startswith("| stamps_")]) == 3 + 7
    assert "--stamps" not in text
    assert any("stamps_classes" in command for command in table.commands)
    # Not there any more, but evaluated: what is missing of it keeps its place.
    (stamps / "manifest.json").unlink()
    rows = [*ROWS, result("unicl", "stamps_classes", "zero_shot", "top1", 20.0)]
    table = tables.join(rows, tmp_path, registry)
    assert {c.metric for c in table.columns if c.dataset == "stamps_classes"} == {
        "mean_per_class", "top1", "top5",
    }  # fmt: skip
    assert "python data_prep/quickstart.py --stamps" in table.commands


def test_command_knows_runs_beside_the_results(tmp_path):
    (tmp_path / "labels").mkdir()
    commands = tables.join(ROWS, tmp_path / "results").commands
    assert any(f"--checkpoint {tmp_path / 'labels'} " in command for command in commands)


def test_results_on_another_n_do_not_share_a_column(tmp_path):
    other = result("labels", "emoji_twemoji", "zero_shot", "top1", 30.0, n=811)
    columns = tables.join([ROWS[2], other], tmp_path).columns
    assert [c.n for c in columns if c.metric == "top1" and c.dataset == "emoji_twemoji"] == [
        810,
        811,
    ]


def test_results_of_other_prompts_are_not_merged(tmp_path):
    other = [row | {"prompt_digest": "other"} for row in ROWS if row["run"] == "labels"]
    with pytest.raises(DataError, match=r"emoji_twemoji, zero_shot: .*unicl.* different prompts"):
        tables.join([*ROWS[1:4], *other], tmp_path)
    again = [row | {"protocol": "another protocol"} for row in other]
    tables.join([*ROWS[1:4], *again], tmp_path)  # both protocols stand in the notes


def test_protocols_of_one_set_are_two_columns(tmp_path):
    rows = [
        result("a", "imagenet1k", "zero_shot", "top1", value, protocol=f"x; protocol {name}: y")
        | {"prompt_digest": name}
        for name, value in (("unicl", 70.0), ("elevater", 71.0))
    ]
    text = render.md(tables.join(rows, tmp_path))
    assert "Clip-art" not in text
    lines = [line for line in text.splitlines() if line.startswith("| imagenet1k ")]
    assert len(lines) == 2  # and no line for the other sets of the same benchmarks
    for line, name, value in zip(lines, ("elevater", "unicl"), ("71.0", "70.0"), strict=True):
        assert f"zero-shot top-1, {name} protocol" in line
        assert value in line


def test_results_without_an_interval_and_variants_are_shown(tmp_path):
    rows = [
        result("a", "coco_detection", "detection", "box_map", 40.04, ci95=None, classes=80),
        result("a", "dtd", "linear_probe_elevater_5shot", "top1_best_epoch", 50.0),
        result("a", "dtd", "linear_probe_elevater_5shot", "top1_last_epoch_seed0", 49.0),
        result("b", "dtd", "linear_probe_clip", "top1", 61.0),
    ]
    table = tables.join(rows, tmp_path / "results")
    for form in ("md", "tex", "csv", "html"):
        text = getattr(render, form)(table)
        assert "40.0" in text
        assert "linear probe (ELEVATER), 5-shot top-1 (best epoch)" in text
        assert "top-1 (last epoch seed0)" in text
    render.png(table, tmp_path / "table.png")
    for run, command in (
        ("b", "linear_probe CHECKPOINT --datasets dtd --protocol elevater --shots 5 --output"),
        ("a", "linear_probe CHECKPOINT --datasets dtd --protocol clip --output"),
        ("b", "detection CHECKPOINT --train data/eval/coco_detection/train2017 --val data/eval/"),
    ):
        start = command.replace("CHECKPOINT", f"--checkpoint FOLDER_OF_RUN/{run}")
        assert any(c.startswith(f"python -m eval.{start}") for c in table.commands), start


def test_the_commits_that_trained_and_evaluated_stand_under_the_table(tmp_path):
    trained, evaluated = "a" * 40, "b" * 40
    code = {"training_git": f"{trained}-dirty, {evaluated}", "git_hash": evaluated}
    notes = tables.join([{**ROWS[0], **code}], tmp_path).notes
    commits = f"{'a' * 12}-dirty, {'b' * 12}"
    assert (
        notes[-1] == f"Code: trained with {commits} ({ROWS[0]['run']}), evaluated with {'b' * 12}."
    )
    assert not any("Code: " in note for note in tables.join(ROWS, tmp_path).notes)


def test_two_results_for_one_cell_are_refused(tmp_path):
    tables.join([*ROWS, ROWS[0]], tmp_path)
    other = ROWS[0] | {"value": 21.0, "protocol": "another protocol"}
    with pytest.raises(DataError, match=r"20\.0 \(some protocol\) and 21\.0 \(another"):
        tables.join([*ROWS, other], tmp_path)


def test_checkpoints_of_one_run_are_told_apart(tmp_path):
    later = result("unicl", "emoji_twemoji", "zero_shot", "top1", 50.0)
    rows = [*ROWS, later | {"checkpoint_hash": "later", "step": 200}]
    labels = [line.label for line in tables.join(rows, tmp_path).lines]
    assert labels == ["labels", "unicl @ step 100", "unicl @ step 200"]
    rows[-1]["step"] = 100
    labels = [line.label for line in tables.join(rows, tmp_path).lines]
    assert labels[1:] == ["unicl @ step 100 (hash_of_)", "unicl @ step 100 (later)"]


def test_csv_has_a_line_for_each_number_under_the_names_of_the_rows(tmp_path):
    rows = [*ROWS, result("labels", "emoji_twemoji", "zero_shot", "top5", 31.0, ci95=None)]
    lines = list(csv.DictReader(io.StringIO(render.csv(tables.join(rows, tmp_path)))))
    assert len(lines) == len(rows)

    def key(row):
        return row["run"], row["dataset"], row["task"], row["metric"]

    by_key = {key(line): line for line in lines}
    for row in rows:
        line = by_key[key(row)]
        low, high = row["ci95"] or ["", ""]
        assert (float(line["value"]), line["low"], line["high"]) == (
            row["value"],
            str(low),
            str(high),
        )
        for name in ("n", "classes", "step", "checkpoint_hash", "config_name", "protocol"):
            assert line[name] == str(row[name]), name
    assert by_key[key(ROWS[1])]["measure"] == "linear probe top-1"


def test_tex_is_escaped(tmp_path):
    table = tables.join(ROWS, tmp_path)
    text = render.tex(table)
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert not re.search(r"(?<!\\)_", body)
    widths = {line.count(" & ") for line in body.splitlines() if line.endswith(r"\\")}
    assert widths == {len(table.columns)}


def test_command_line_writes_every_format(tmp_path, capsys):
    with pytest.raises(DataError, match="no result rows"):
        tables.main([str(tmp_path)])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tables.main([str(tmp_path)])
    assert "43.2 [40.7, 46.5]" in capsys.readouterr().out
    for form in ("tex", "csv", "html", "png"):
        tables.main(
            [str(tmp_path), "--format", form, "--output", str(tmp_path / f"out/table.{form}")]
        )
    assert Image.open(tmp_path / "out/table.png").width > 800
    assert "43.2<small> [40.7, 46.5]" in (tmp_path / "out/table.html").read_text()
    with pytest.raises(ConfigError, match="needs --output"):
        tables.main([str(tmp_path), "--format", "png"])
    (tmp_path / "b.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match=r"b\.jsonl, line 1: not JSON"):
        tables.main([str(tmp_path)])


def test_plots_make_every_picture_and_one_self_contained_page(world, tmp_path):
    results, output = tmp_path / "results", tmp_path / "plots"
    plain = ["--runs", str(world / "runs/tiny"), "--results", str(results), "--output", str(output)]
    for task in ("zero_shot", "linear_probe", "retrieval"):
        evaluate(task, world, results)
    plots.main(plain, world / "registry.yaml")
    for name in plots.CAPTIONS:
        assert Image.open(output / name).width > 300
    page = (output / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(plots.CAPTIONS)
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    results, facts = Cells(page).tables
    assert results[0][1:] == facts[0][1:] == ["tiny (config_0)"]
    assert dict(facts[1:])["samples seen"] == "448"
    assert "clip art" not in page.lower()  # these are other sets than those of the quickstart
    assert "CC-BY-4.0" not in page


def test_page_of_the_quickstart_says_what_it_is_and_whose_the_drawings_are(tmp_path):
    table = tables.join(ROWS, tmp_path)
    facts = {"time": ["8 s", "9 s"], "commit": ["abc", "<d>"]}
    Image.new("RGB", (960, 30)).save(tmp_path / "bars.png")
    pictures = [tmp_path / "bars.png"]
    path = plots.write_page(table, facts, ["python train.py"], pictures, tmp_path / "x.html")
    page = path.read_text()
    assert tables.QUICKSTART_TITLE in page
    assert "CC-BY-4.0" in page
    assert "Twitter and contributors" in page
    assert Cells(page).tables[1][1:] == [["time", "8 s", "9 s"], ["commit", "abc", "<d>"]]
    assert "<pre>python train.py</pre>" in page
    # Half as many pixels of a page as dots, and never more than there is room for.
    assert page.count("<img ") == 1
    assert 'width="480"' in page
    assert "img{max-width:100%;height:auto}" in page


def test_facts_of_a_run_from_its_folder(tmp_path):
    begin = datetime(2026, 1, 1, 10, tzinfo=UTC)

    def at(minutes):
        return (begin + timedelta(minutes=minutes)).isoformat(timespec="seconds")

    def start(minutes, after_step, ranks, commit):
        return {
            "time": at(minutes), "after_step": after_step, "ranks": ranks,
            "git": {"commit": commit * 40, "changed": commit == "b"},
            "command": f"python train.py {commit}",
            "machines": [{"host": "h", "device": "NVIDIA H100", "ranks": [0]}],
        }  # fmt: skip

    # Step 15 was made by the second start, and again by the third; the fourth came later.
    starts = [start(0, 0, 2, "a"), start(10, 10, 8, "c"), start(100, 10, 4, "b")]
    starts.append(start(500, 30, 1, "d"))
    (tmp_path / "environment.json").write_text(json.dumps({"starts": starts}))
    times = {5: 3, 10: 6, 15: 110, 20: 130, 35: 510}
    log = [{"step": s, "samples": 10 * s, "time": at(m)} for s, m in times.items()]
    facts = run_facts.read(tmp_path, 20, log)
    # 6 minutes on two processes, 30 on four.
    assert facts.seconds == 36 * 60
    assert facts.rank_seconds == 60 * (6 * 2 + 30 * 4)
    table = run_facts.table([facts], [[{"date": at(600), "git_hash": "e" * 40}]])
    assert table == {
        "step": ["20"],
        "samples seen": ["200"],
        "trained": ["2026-01-01 10:00 to 12:10 UTC"],
        "time": ["36 min 00 s"],
        "cost": ["2.20 GPU hours (4 × NVIDIA H100)"],
        "commit": ["aaaaaaaaaaaa, bbbbbbbbbbbb-dirty"],
        "evaluated": ["2026-01-01 20:00 UTC"],
        "evaluated with": ["eeeeeeeeeeee"],
    }
    assert facts.commands == ("python train.py a", "python train.py b")
    # An older folder does not tell.
    bare = run_facts.table([run_facts.read(tmp_path / "none", 20, log)], [[{}]])
    assert bare["time"] == bare["cost"] == bare["commit"] == [run_facts.UNKNOWN]
    assert run_facts.duration(7505) == "2 h 05 min"


def test_chance_of_mean_recall(tmp_path):
    column = Column("toy", "retrieval", "mean_recall", 80, None)
    texts = result("a", "toy", "retrieval", "text_to_image_r1", 1.0, n=50)
    # Six numbers: 1, 5 and 10 of 50, once per direction.
    assert pictures.chance_level(column, [texts]) == pytest.approx((2 + 10 + 20) / 3)
    column = Column("toy", "zero_shot", "top1", 80, 25)
    assert pictures.chance_level(column, []) == 4


def test_shipped_registry_metrics_all_have_names():
    for row in Registry().datasets.values():
        for metrics in row.tasks.values():
            assert set(metrics) <= set(render.METRICS)
