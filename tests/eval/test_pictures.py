"""What the pictures say: axes, scales, legends, sizes of letters, and examples by rank."""

import shutil
import subprocess

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from eval.report import figure_confusion, figure_curves, figure_retrieval, figures, palette
from eval.report.figure_retrieval import BEST
from eval.report.pictures import EXAMPLES, direction
from eval.sources.registry import REPOSITORY
from eval.tasks.scores import Products


@pytest.fixture(autouse=True)
def closed():
    """No figure stays open; `figures.save` closes those that are written."""
    yield
    figures.plt.close("all")


def texts(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def overlapping(labels: list[Text]) -> list[tuple[str, str]]:
    """Neighbours among `labels` whose boxes share some place."""
    boxes = [label.get_window_extent() for label in labels]
    pairs = zip(labels, labels[1:], boxes, boxes[1:], strict=False)
    return [(a.get_text(), b.get_text()) for a, b, one, two in pairs if one.overlaps(two)]


def check_print(figure: Figure, pixels: int = 500) -> None:
    """Letters of 8 points and more, and no wider than a narrow page."""
    figure.draw_without_rendering()
    assert min(text.get_fontsize() for text in texts(figure)) >= 8
    assert figure.get_tightbbox().width * palette.DOTS <= pixels


def lines_of(steps: int, **values) -> list[dict]:
    """Lines of a log whose values are functions of the step."""
    common = {"lr": lambda s: 1e-3 * s, "scale": lambda s: 14 + s, "loss": lambda s: 6 - s / 2}
    common |= {"samples_per_second": lambda s: 200.0, "floor": lambda s: 0.5}
    every = {**common, **values}
    return [
        {"step": s, "samples": 64 * s} | {key: value(s) for key, value in every.items()}
        for s in range(1, steps + 1)
    ]


BOTH = lines_of(
    9,
    loss_image_label=lambda s: 5 - s / 9,
    floor_image_label=lambda s: 1.5,
    loss_image_text=lambda s: 4 - s / 9,
    floor_image_text=lambda s: 0.25,
)
ALONE = lines_of(5, loss_image_text=lambda s: 3.0)  # as an earlier version logged it


def test_curves_name_their_axes_and_draw_the_floor_of_each_half():
    figure = figure_curves.curves({"both": BOTH, "old": ALONE})
    axes = {axis.get_ylabel(): axis for axis in figure.axes}
    assert list(axes) == [
        "loss", "loss of labels", "loss of captions", "learning rate", "scale\n(1 / temperature)",
        "samples\nper second",
    ]  # fmt: skip
    assert figure.axes[-1].get_xlabel() == "samples seen"
    assert axes["samples\nper second"].get_ylim()[0] == 0

    def drawn(name, style):
        lines = [line for line in axes[name].get_lines() if line.get_linestyle() == style]
        return [(line.get_color(), set(np.round(line.get_ydata(), 6))) for line in lines]

    first, second = palette.COLORS[:2]
    assert drawn("loss of labels", "--") == [(first, {1.5})]
    assert drawn("loss of captions", "--") == [(first, {0.25}), (second, {0.5})]
    assert drawn("loss", "--") == [(first, {0.5}), (second, {0.5})]
    assert drawn("learning rate", "--") == []
    place = axes["scale\n(1 / temperature)"].get_lines()[0].get_xydata()
    assert place.tolist() == [[64 * s, 14 + s] for s in range(1, 10)]
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["both", "old", figure_curves.FLOOR]
    check_print(figure)


def test_curves_leave_out_what_no_run_has():
    figure = figure_curves.curves({"old": ALONE})
    names = [axis.get_ylabel() for axis in figure.axes]
    assert "loss of labels" not in names
    assert "loss" not in names  # it would be the loss of captions once more
    assert names[0] == "loss of captions"


def test_more_runs_than_colours_are_told_apart():
    looks = [palette.look(i) for i in range(20)]
    assert len(set(looks)) == 20
    figure = figure_curves.curves({f"run {i}": ALONE for i in range(9)})
    assert len(figure.legends[0].get_texts()) == 9 + 1


def test_confusion_has_a_scale_and_a_legend_and_no_label_hides_another():
    names = [f"a class of number {i}" for i in range(28)]
    counts = np.random.default_rng(0).integers(0, 9, (28, 28))
    counts[4] = 0
    few = np.array([[8, 2], [0, 5]])
    panels = [("run on set", names, counts), ("run on few", ["b", "c"], few)]
    figure = figure_confusion.confusion(panels)
    scale, large, small = figure.axes
    shown = large.get_images()[0].get_array()
    expected = 100 * counts / np.where(counts.sum(1) > 0, counts.sum(1), 1)[:, None]
    np.testing.assert_allclose(shown, expected)
    for axis in (large, small):
        assert axis.get_xlabel() == "predicted class"
        assert axis.get_ylabel() == "true class (number of samples)"
    labels = large.get_yticklabels()
    assert labels[0].get_text().endswith(f"({counts[0].sum()})")
    assert [text.get_text() for text in small.texts] == ["80", "20", "100"]
    assert scale.get_xlim() == (0, 100)
    said = {text.get_text() for text in texts(figure)}
    assert {"percent of the true class", "run on set", "run on few"} <= said
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [figure_confusion.RIGHT, figure_confusion.EMPTY]
    figure.draw_without_rendering()
    for ticks in (labels, large.get_xticklabels(), scale.get_xticklabels()):
        assert overlapping(ticks) == []
    check_print(figure, 560)


def test_of_many_classes_the_most_confused_are_shown():
    counts = np.diag(np.full(200, 50))
    wrong = np.random.default_rng(0).choice(200, 12, replace=False)
    counts[wrong, (wrong + 1) % 200] = 7
    expected = sorted({*wrong.tolist(), *((wrong + 1) % 200).tolist()})
    kept = figure_confusion.most_confused(counts, len(expected))
    assert kept.tolist() == expected
    figure = figure_confusion.confusion([("x", [f"n{i}" for i in range(200)], counts)])
    axis = figure.axes[1]
    assert len(axis.get_yticklabels()) == figure_confusion.MOST
    assert any("28 of 200 classes" in text.get_text() for text in texts(figure))
    names = {label.get_text() for label in axis.get_xticklabels()}
    assert {f"n{i}" for i in expected} <= names


def scores_of(matrix: torch.Tensor) -> Products:
    """Scores that are `matrix` (n, m)."""
    return Products(matrix, torch.eye(matrix.shape[1], dtype=matrix.dtype))


def test_examples_are_chosen_by_the_rank_of_the_truth():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.rand(40, 12, generator=generator, dtype=torch.float64)
    right = torch.randint(12, (40,), generator=generator)
    matrix[3] = 0.5  # all alike: eleven others are as similar as the right one
    found = direction(
        scores_of(matrix), np.arange(40), right.numpy(), lambda q: q, lambda c: f"candidate {c}"
    )
    dense, truth = matrix.numpy(), right.numpy()
    ranks = np.array([(row >= row[t]).sum() for row, t in zip(dense, truth, strict=True)])
    assert ranks[3] == 12
    assert (found.queries, found.candidates) == (40, 12)
    assert (found.first, found.missed) == ((ranks == 1).sum(), (ranks > BEST).sum())
    assert len(found.successes) == len(found.failures) == EXAMPLES
    for query in found.successes + found.failures:
        q = query.content
        assert query.rank == ranks[q]
        assert query.truth.content == f"candidate {truth[q]}"
        assert query.truth.similarity == dense[q, truth[q]]
        assert query.truth.right
        similar = [answer.similarity for answer in query.best]
        assert similar == sorted(dense[q], reverse=True)[:BEST]
        assert [a.right for a in query.best] == [
            a.content == query.truth.content for a in query.best
        ]
    assert all(query.rank == 1 and query.best[0].right for query in found.successes)
    assert all(query.rank > BEST for query in found.failures)
    assert [q.rank for q in found.failures] == sorted(q.rank for q in found.failures)


def test_of_several_right_answers_the_most_similar_one_counts():
    matrix = torch.tensor([[0.1, 0.9, 0.5]], dtype=torch.float64)
    pairs = np.zeros(2, int), np.array([0, 1])
    found = direction(scores_of(matrix), *pairs, lambda q: "query", lambda c: c)
    (query,) = found.successes
    assert (query.truth.content, query.truth.similarity, query.rank) == (1, 0.9, 1)
    assert [(a.content, a.right) for a in query.best] == [(1, True), (2, False), (0, True)]


def test_retrieval_heads_both_directions_and_shows_ranks_and_similarities():
    image = np.full((8, 8, 3), 200, dtype=np.uint8)
    caption = (
        "a drawing with a long caption that goes on, and on, and on, and on, and on, to its end"
    )
    matrix = torch.tensor([[0.9, 0.5, 0.4, 0.3, 0.2, 0.1], [0.1, 0.9, 0.8, 0.7, 0.6, 0.2]])
    right = np.array([0, 0])
    by_text = direction(scores_of(matrix), np.arange(2), right, lambda q: caption, lambda c: image)
    by_image = direction(scores_of(matrix), np.arange(2), right, lambda q: image, lambda c: caption)
    figure = figure_retrieval.retrieval(by_text, by_image, "run on set")
    said = [text.get_text() for text in texts(figure)]
    heads = ["Caption → images: 2 captions, 6 images", "Image → captions: 2 images, 6 captions"]
    assert [text for text in said if "→" in text] == heads
    for kind in ("image", "caption"):
        assert f"Right {kind} first: 1 of 2 (50 %)" in said
        assert f"Right {kind} (shown last) behind the {BEST} best: 1 of 2 (50 %)" in said
    assert {"1: ✓ 0.90", "2: ✗ 0.50", "1: ✗ 0.90", "6:\n✓ 0.10"} <= set(said)  # of the caption
    assert {"✓ 0.90", "✗ 0.90", "✓ 0.10", "6:"} <= set(said)  # of the image
    assert sum(len(axis.get_images()) for axis in figure.axes) == 2 * BEST + 1 + 2
    figure.draw_without_rendering()
    within = figure.bbox
    for text in texts(figure):
        box = text.get_window_extent()
        assert within.x0 - 1 <= box.x0, text.get_text()
        assert box.x1 <= within.x1 + 1, text.get_text()
    check_print(figure)


def test_a_text_is_cut_by_the_width_of_its_letters():
    for text in ("WIDE LETTERS TAKE MORE ROOM", "illicit little lilies fill it", "a $ sign, a $"):
        for lines in (1, 3):
            part = figures.fitted(text, 1.0, lines)
            assert part.count("\n") < lines
            drawn = figures.plt.figure(dpi=100).text(0, 0, part, fontsize=palette.SMALL)
            assert 0.5 < drawn.get_window_extent().width / 100 <= 1.05
    assert figures.fitted("short", 1.0) == "short"


def test_bars_name_runs_and_groups_and_mark_what_is_missing(tmp_path):
    row = {"value": 50.0, "ci95": [40.0, 60.0]}
    bare = {"value": 20.0, "ci95": None}
    lines = {"first": [row, bare], "second": [None, row]}
    figure = figures.bars(["a (n=3)\ntop-1", "b (n=4)\ntop-1"], lines, [10, 5], "title")
    (axis,) = figure.axes
    assert axis.get_xlabel() == "percent, with 95 % interval"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["first", "second"] * 2
    assert [bar.get_width() for bar in axis.patches] == [50, 20, 50]
    said = {text.get_text() for text in texts(figure)}
    assert {"a (n=3)", "b (n=4)", "50.0", "20.0", "— not evaluated", figures.CHANCE} <= said
    check_print(figure)
    figures.save(figure, tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as image:  # fine enough for print
        assert image.width <= 500 * palette.DENSITY
        assert round(image.info["dpi"][0]) == palette.DOTS * palette.DENSITY


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_last_line_of_the_quickstart_names_the_page():
    listing = subprocess.run(
        ["make", "-n", "quickstart"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    (plots,) = [line for line in listing if "eval.plots" in line]
    folder = plots.split("--output ")[1].split()[0]
    done = subprocess.run(["sh", "-c", listing[-1]], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(f"{REPOSITORY / folder}/index.html\n")
