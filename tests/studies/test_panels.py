"""The pictures that a study states itself: what is drawn is what was measured and published."""

import pytest
import yaml
from matplotlib import pyplot as plt
from PIL import Image

from eval.report import palette
from studies import _panels, _study
from tests.studies.parts import ROOT, TINY
from tests.studies.test_report import KEY, filled, show

MEASURES = {"classes": {"task": KEY[1], "datasets": [KEY[0]], "metric": KEY[2]}}
BESIDE = {"paper": "unicl", "table": "2", "rows": ["supcon", "unicl"], "columns": ["in1k_resnet50"]}


@pytest.fixture
def drawn(monkeypatch):
    """Axes of the figures that are saved, which stay open until the test ends."""
    kept, save = [], _panels.figures.save
    monkeypatch.setattr(plt, "close", lambda figure=None: None)

    def keep(figure, path):
        save(figure, path)
        kept.append(figure.axes)

    monkeypatch.setattr(_panels.figures, "save", keep)
    yield kept
    monkeypatch.undo()
    plt.close("all")


def bars(axis):
    """Name -> length, of what a panel shows."""
    names = [label.get_text().replace("\n", " ") for label in axis.get_yticklabels()]
    by_place = {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in axis.patches}
    return {name: by_place.get(place) for place, name in enumerate(names)}


def test_bars_are_our_means_and_the_numbers_of_the_paper(tmp_path, capsys, drawn):
    figure = {"title": "T", "arms": ["two", "one"], "measures": ["classes"], "published": BESIDE}
    path = filled(
        tmp_path, {("one", 3): 50, ("one", 5): 54}, measures=MEASURES, figures={"claim": figure}
    )
    show(path, capsys)
    ours, published = drawn[0]
    assert bars(ours) == {"two": None, "one": pytest.approx(52)}
    table = yaml.safe_load((ROOT / "eval/paper/unicl.yaml").read_text())["tables"]["2"]
    place = list(table["columns"]).index("in1k_resnet50")
    wanted = {row["method"]: row["cells"][place]["value"] for row in table["rows"]}
    assert bars(published) == {name: wanted[name] for name in ("SupCon", "UniCL")}
    said = [text.get_text() for text in ours.texts]
    assert said[0] == "not there yet"
    assert said[1].startswith("52.0 ± ")
    with Image.open(tmp_path / "out/report/claim.png") as image:
        assert image.width <= 500 * palette.DENSITY


def test_lines_go_over_the_variants_in_their_order(tmp_path, capsys, drawn):
    variants = {
        "b8": {"overrides": ["train.global_batch=8"], "label": "8"},
        "b16": {"overrides": ["train.global_batch=16"], "label": "16"},
    }
    values = {(f"{arm}-{v}", seed): 40 + 8 * (arm == "one") + 2 * (v == "b16") + seed
              for arm in ("one", "two") for v in variants for seed in (3, 5)}  # fmt: skip
    figure = {"title": "batch", "arms": ["one", "two"], "measures": ["classes"]}
    path = filled(
        tmp_path, values, measures=MEASURES, figures={"claim": figure}, variants=variants,
        arms={"one": {"config": TINY, "label": "UniCL"}, "two": {"config": TINY}},
    )  # fmt: skip
    show(path, capsys)
    (axis,) = drawn[0]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["8", "16"]
    heights = [container.lines[0].get_ydata().tolist() for container in axis.containers]
    assert heights == [[52, 54], [44, 46]]
    legend = axis.figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["UniCL", "two"]


def test_the_figures_of_the_claims_name_arms_and_tables_that_are_there():
    for name in ("claims", "batch_size", "cifar10"):
        study = _study.read(ROOT / f"studies/{name}.yaml")
        assert study.figures, name


def test_what_is_not_measured_by_an_arm_is_said(tmp_path, capsys, drawn):
    figure = {"title": "T", "arms": ["one", "two"], "measures": ["classes"]}
    arms = {"one": {"config": TINY}, "two": {"config": TINY, "without": ["zero_shot"]}}
    path = filled(
        tmp_path, {("one", 3): 50}, measures=MEASURES, figures={"claim": figure}, arms=arms
    )
    show(path, capsys)
    (axis,) = drawn[0]
    assert [text.get_text() for text in axis.texts] == ["50.0", "sees no texts"]
