"""Published tables beside our numbers in every format, and the command line."""

import csv
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from eval import tables
from eval.report import render_bars, render_paper
from loaders.errors import ConfigError, DataError
from tests.eval.paper_rows import EVERY, filled, make_registry, result


@pytest.fixture
def registry():
    return make_registry()


def test_conflicting_values_stand_side_by_side_with_their_sources(registry):
    name = "unicl_swin_base_in21k_gcc15m_yfcc14m"
    found = [result(name, "imagenet1k", "zero_shot", "top1", 52.0)]
    table = filled("unicl", "readme", found, registry)
    text = render_paper.md(table)
    line = next(line for line in text.splitlines() if "57.9" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[-3:] == ["52.0†", "52.2 [a] / 52.3 [b] / 57.9 [c]", "−0.2 / −0.3 / −5.9"]
    legend = next(line for line in text.splitlines() if line.startswith("- Published"))
    assert re.search(r"\[a\] README of microsoft/UniCL.*\[b\] README of microsoft/klite", legend)


def test_recipes_and_second_hand_numbers_are_marked(registry):
    name = "unicl_swin_tiny_in1k"
    row = result(name, "imagenet1k", "zero_shot", "top1", 78.0)
    for recipe, sign in (({}, "†"), ({"recipe": "ours"}, "†"), ({"recipe": "paper"}, "")):
        text = render_paper.md(filled("unicl", "5", [row | recipe], registry))
        assert f" 78.0{sign} |" in text
        assert ("† The run's recipe" in text) == bool(sign)
    open_recipe = result("unicl_resnet101_cifar10", "cifar-10", "zero_shot", "top1", 90.0)
    assert "not recorded" in render_paper.md(filled("unicl", "2", [open_recipe], registry))
    assert "20.6‡" in render_paper.md(filled("declip", "ablation", [], registry))
    assert "‡" not in render_paper.md(filled("declip", "88m", [], registry))


def test_cifar10_with_our_recipe_stands_marked_beside_the_published_numbers(registry):
    runs = {"cross_entropy": "linear_probe", "supcon": "linear_probe", "unicl": "zero_shot"}
    found = [
        result(f"{name}_resnet50_cifar10", "cifar-10", task, "top1", 90.0)
        for name, task in runs.items()
    ]
    text = render_paper.md(filled("unicl", "2", found, registry))
    for number in ("95.0", "96.0", "96.8"):
        assert re.search(rf"\| CIFAR-10 ResNet-50 +\| +90\.0† \| +{number} ", text)
    assert "not the paper's: ours (chosen" in text


def test_csv_has_a_line_per_published_number(registry):
    found = [result("unicl_swin_tiny_in1k", "imagenet1k", "zero_shot", "top1", 78.4321)]
    table = filled("unicl", "5", found, registry)
    lines = list(csv.DictReader(io.StringIO(render_paper.csv(table))))
    assert len(lines) == len(table.rows) * len(table.columns)
    line = next(x for x in lines if (x["row"], x["measure"]) == ("in1k_unicl", "ImageNet-1K top-1"))
    assert (line["ours"], line["published"], line["recipe"]) == (
        "78.4321",
        "79.9",
        "release_defaults",
    )
    assert float(line["difference"]) == pytest.approx(-1.4679)
    assert sum(1 for x in lines if x["difference"]) == 1


def test_tex_has_the_shape_of_the_paper(registry):
    found = [result("unicl_swin_tiny_in1k", "imagenet1k", "zero_shot", "top1", 78.4)]
    table = filled("unicl", "5", found, registry)
    body = [x for x in render_paper.tex(table).splitlines() if not x.startswith("%")]
    widths = {line.count(" & ") for line in body[4:] if line.endswith(r"\\")}
    assert widths == {1 + 3 * len(table.columns)}
    assert r"78.4$^\dagger$ & 79.9 & $-$1.5" in "\n".join(body)
    assert "\n".join(body).isascii()


class Cells(HTMLParser):
    """Rows of `data-value` attributes, and every attribute that could load something."""

    def __init__(self):
        super().__init__()
        self.rows, self.loads, self.viewport = [], [], False

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.rows += [[]] if tag == "tr" else []
        if "data-value" in attributes:
            self.rows[-1].append(attributes["data-value"])
        self.loads += [v for k, v in attributes.items() if k in ("src", "href")]
        self.viewport |= attributes.get("name") == "viewport"


def test_html_is_one_sortable_page(registry):
    found = [result("unicl_swin_tiny_in1k", "imagenet1k", "zero_shot", "top1", 78.4)]
    table = filled("unicl", "5", found, registry)
    text, cells = render_paper.html(table), Cells()
    cells.feed(text)
    rows = cells.rows[1:]
    assert len(rows) == 6
    assert {len(row) for row in rows} == {3 * len(table.columns)}
    assert [float(x) for x in rows[2][:3]] == [78.4, 79.9, pytest.approx(-1.5)]
    assert rows[0][3:6] == ["", "", ""]  # n/a has no place in the order
    assert cells.viewport
    assert not cells.loads
    assert "position:sticky" in text
    assert "onclick" in text


@pytest.mark.parametrize(("paper", "table"), EVERY)
def test_every_table_is_shown_in_every_text_format(paper, table, registry):
    content = filled(paper, table, [], registry)
    for form in ("md", "tex", "csv", "html"):
        text = getattr(render_paper, form)(content)
        shown = text.replace("&#x27;", "'")
        for cell in (c for row in content.rows for c in row.cells):
            for p in cell.published:
                places = render_paper.decimals(content, cell.column)
                number = f"{p.value}" if form == "csv" else f"{p.value:,.{places}f}"
                assert number in shown, (form, number)
    assert ("ours" in render_paper.md(content).splitlines()[2]) == content.joined


def test_picture_has_a_bar_for_every_number(registry, tmp_path):
    name = "unicl_swin_base_in21k_gcc15m_yfcc14m"
    found = [result(name, "imagenet1k", "zero_shot", "top1", 52.0)]
    render_bars.png(filled("unicl", "readme", found, registry), tmp_path / "out/bars.png")
    with Image.open(tmp_path / "out/bars.png") as image:
        assert image.width > 700
        colors = {color for _, color in image.convert("RGB").getcolors(2**20)}
    shades = {tuple(bytes.fromhex(c[1:])) for c in (render_bars.BLUE, *render_bars.GREYS)}
    assert shades <= colors


def test_command_line(tmp_path, capsys):
    rows = [result("unicl_swin_tiny_in1k", "imagenet1k", "zero_shot", "top1", 78.4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(tmp_path), "--paper", "unicl", "--table"]
    tables.main([*arguments, "5"])
    assert "78.4†" in capsys.readouterr().out
    for form in ("tex", "csv", "html", "png"):
        tables.main([*arguments, "5", "--format", form, "--output", str(tmp_path / f"o/t.{form}")])
    assert Image.open(tmp_path / "o/t.png").height > 400
    assert "78.4" in (tmp_path / "o/t.html").read_text()
    other = rows[0] | {"prompt_digest": "other", "config_name": "unicl_swin_tiny_in1k_gcc3m"}
    (tmp_path / "b.jsonl").write_text(json.dumps(other) + "\n")
    with pytest.raises(DataError, match="different prompts"):
        tables.main([*arguments, "5"])
    tables.main([*arguments, "2"])  # the other run is not in this table
    (tmp_path / "b.jsonl").unlink()
    for wrong, words in (
        ([str(tmp_path), "--paper", "unicl"], "needs --table, one of abstract, 1, 2, 5, 6, readme"),
        ([str(tmp_path), "--table", "5"], "--table needs --paper"),
        ([str(tmp_path), "--paper", "unicle", "--table", "5"], "did you mean unicl"),
        ([*arguments, "3"], "ablation of the training objective"),
        ([*arguments, "9"], "unknown; there are"),
        ([*arguments, "5", "--format", "png"], "needs --output"),
    ):
        with pytest.raises(ConfigError, match=words):
            tables.main(wrong)
