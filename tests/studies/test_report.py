"""studies/report.py: means, intervals and differences against other sources; what is missing."""

import json
import math
import shutil

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from scipy import stats

from eval.report import palette
from loaders.errors import DataError
from studies import _cells, _costs, _evaluations, _statistics, _study, report
from tests.studies.parts import ROOT, study_file, write_cell

KEY = ("emoji_twemoji", "zero_shot", "mean_per_class")
CLAIM = [{"arms": ["one", "two"], "claim": "labels help"}]


def cells_of(path, output):
    study = _study.read(path)
    return _cells.make(study, path, _evaluations.plan(study), output)


def filled(tmp_path, values, **changes):
    """A study whose cells have these values: (arm, seed) -> percent."""
    path = study_file(tmp_path, comparisons=CLAIM, **changes)
    for cell in cells_of(path, tmp_path / "out"):
        if (cell.arm, cell.seed) in values:
            write_cell(cell, {KEY: values[cell.arm, cell.seed]})
    return path


def show(path, capsys):
    report.main([str(path), "--output", str(path.parent / "out")])
    return capsys.readouterr().out


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_the_interval_is_students_as_scipy_has_it(n):
    values = np.random.default_rng(n).normal(50, 4, n)
    mean = _statistics.mean_of(values.tolist())
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert (mean.mean - mean.half, mean.mean + mean.half) == pytest.approx((low, high))


def test_the_interval_by_the_table_of_a_textbook():
    """t(0.975, 2) = 4.303, as printed in every table."""
    mean = _statistics.mean_of([60.5, 58.2, 60.4])
    deviation = math.sqrt(((0.8) ** 2 + (-1.5) ** 2 + (0.7) ** 2) / 2)
    assert mean.mean == pytest.approx(59.7)
    assert mean.half == pytest.approx(4.303 * deviation / math.sqrt(3), rel=1e-3)


@pytest.mark.parametrize(
    ("gaps", "zero", "two"),
    [
        ([0.5, -0.5, 0.1], "not shown", "shown"),  # within a point of nothing
        ([-1.5, -1.6, -1.4], "shown", "shown"),  # behind, by less than two points
        ([-3, -3.2, -2.9], "shown", "refuted"),
        ([-2.1, -1.7, -2.4], "shown", "not shown"),
        ([5, -9, 2], "not shown", "not shown"),
        ([4], "no interval", "no interval"),
    ],
)
def test_at_least_is_judged_at_the_margin(gaps, zero, two):
    mean = _statistics.mean_of([float(gap) for gap in gaps])
    found = [_statistics.Difference(("a", "b"), "m", "", mean, margin).verdict for margin in (0, 2)]
    assert found == [zero, two]
    if len(gaps) > 1:
        low, high = stats.t.interval(0.95, len(gaps) - 1, loc=np.mean(gaps), scale=stats.sem(gaps))
        judged = "shown" if low > -2 else "refuted" if high < -2 else "not shown"
        assert judged == two


def test_the_table_says_what_the_margin_was(tmp_path, capsys):
    claim = [{"arms": ["one", "two"], "claim": "labels help", "margin": 2}]
    path = study_file(tmp_path, comparisons=claim)
    for cell in cells_of(path, tmp_path / "out"):
        write_cell(cell, {KEY: 50.0 if cell.arm == "one" else 50.2 + 0.1 * (cell.seed == 3)})
    assert "at most 2 behind: shown" in show(path, capsys)


def test_a_difference_is_paired_over_seeds(tmp_path, capsys):
    """The arms spread over 20 points and the pairs over 0.2: only pairs show the difference."""
    seeds = [0, 1, 2]
    two = {0: 40.0, 1: 50.0, 2: 60.0}
    gaps = {0: 1.9, 1: 2.0, 2: 2.1}
    values = {("two", s): v for s, v in two.items()}
    values |= {("one", s): two[s] + gaps[s] for s in seeds}
    text = show(filled(tmp_path, values, seeds=seeds), capsys)
    test = stats.ttest_rel([two[s] + gaps[s] for s in seeds], list(two.values()))
    low, high = test.confidence_interval(0.95)
    line = next(line for line in text.splitlines() if "labels help" in line)
    assert f"+2.00 [{low:+.2f}, {high:+.2f}]" in line
    assert "one higher" in line
    assert "3 of 3" in line


def test_an_interval_with_zero_is_not_shown_and_never_equal(tmp_path, capsys):
    values = {("one", 3): 50, ("two", 3): 49, ("one", 5): 52, ("two", 5): 53}
    text = show(filled(tmp_path, values), capsys)
    line = next(line for line in text.splitlines() if "labels help" in line)
    assert "not shown" in line
    assert "higher" not in line
    assert "equal" not in text


def test_one_seed_has_no_interval_and_says_so(tmp_path, capsys):
    text = show(filled(tmp_path, {("one", 3): 50, ("two", 3): 49}, seeds=[3]), capsys)
    assert " 50.0 / 4.0 |" in text  # half of [47, 55], of the test samples
    assert "One seed: there is no interval over seeds." in text
    line = next(line for line in text.splitlines() if "labels help" in line)
    assert "+1.00 " in line
    assert "one seed: no interval" in line


def test_a_missing_cell_is_left_out_and_has_its_command(tmp_path, capsys):
    values = {("one", 3): 50, ("one", 5): 52, ("two", 5): 53}
    path = filled(tmp_path, values)
    text = show(path, capsys)
    assert "53.0 (1 of 2 seeds, no interval)" in text
    command = f"python -m studies.run {path} --output {tmp_path / 'out'} --only two --seeds 3"
    assert text.count("python -m studies.run") == 1
    assert command in text
    line = next(line for line in text.splitlines() if "labels help" in line)
    assert "-1.00 " in line  # seed 5 alone: 52 - 53
    assert "1 of 2" in line
    assert command in (tmp_path / "out/report/index.html").read_text()


def test_nothing_there_is_a_table_of_dashes(tmp_path, capsys):
    text = show(filled(tmp_path, {}), capsys)
    assert text.count(" — |") >= 10
    assert text.count("python -m studies.run") == 1
    assert not list((tmp_path / "out/report").glob("*.png"))


def test_rows_of_an_earlier_checkpoint_do_not_count(tmp_path, capsys):
    path = filled(tmp_path, {("one", 3): 50, ("one", 5): 52})
    weights = tmp_path / "out/runs/one-seed3/checkpoints/step_0000020/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "--only one --seeds 3" in show(path, capsys)


def test_a_run_of_another_configuration_is_named_and_left_out(tmp_path, capsys):
    path = filled(tmp_path, {("one", 3): 50, ("one", 5): 52})
    study_file(tmp_path, comparisons=CLAIM, overrides=["data.workers=1", "train.steps=20"])
    assert "left out" not in show(path, capsys)  # workers decide nothing
    study_file(tmp_path, comparisons=CLAIM, overrides=["optim.lr=0.5", "train.steps=20"])
    text = show(path, capsys)
    assert "one-seed3 is left out: its run is not that of this file (optim.lr: there 0.001" in text
    assert "50.0" not in text


def test_an_arm_that_a_task_says_nothing_about(tmp_path, capsys):
    arms = {
        "one": {"config": "tests/engine/tiny.yaml"},
        "two": {"config": "tests/engine/tiny.yaml", "without": ["zero_shot"]},
    }
    text = show(filled(tmp_path, {("one", 3): 50, ("one", 5): 52}, arms=arms), capsys)
    two = next(line for line in text.splitlines() if line.startswith("| two"))
    assert " · |" in two
    assert "labels help" not in text


def test_a_measure_may_be_a_mean_over_sets(tmp_path, capsys):
    sets = ["emoji_twemoji", "openclipart_classes"]
    measure = {"task": "zero_shot", "datasets": [*sets], "metric": "top1", "label": "both"}
    path = study_file(
        tmp_path, seeds=[3], measures={"both": measure},
        evaluations=[{"task": "zero_shot", "datasets": sets}],
    )  # fmt: skip
    one = cells_of(path, tmp_path / "out")[0]
    values = {(name, "zero_shot", "top1"): 40 + 20 * i for i, name in enumerate(sets)}
    write_cell(one, values)
    # Two independent intervals of ± 4: sqrt(4² + 4²) / 2.
    assert " 50.0 / 2.8 |" in show(path, capsys)


def test_cells_measured_on_different_samples_are_refused(tmp_path):
    path = study_file(tmp_path)
    first, second = cells_of(path, tmp_path / "out")[:2]
    write_cell(first, {KEY: 50})
    write_cell(second, {KEY: 50}, n=99)
    with pytest.raises(DataError, match="one-seed3 and two-seed3 were measured on different"):
        report.main([str(path), "--output", str(tmp_path / "out")])


def test_costs_come_from_the_folders(tmp_path):
    cell = cells_of(study_file(tmp_path), tmp_path / "out")[0]
    assert _costs.cost_of([cell]) == _costs.Cost(None, None, None, None)
    write_cell(cell, {KEY: 50})
    lives = [  # killed once after step 8; an evaluation does not count
        {"what": "train", "from_step": 0, "to_step": 8, "cpu_seconds": 3.0, "peak_bytes": 70},
        {"what": "train", "from_step": 8, "to_step": 20, "cpu_seconds": 2.0, "peak_bytes": 90},
        {"what": "zero_shot", "from_step": 20, "to_step": 20, "cpu_seconds": 9.0, "peak_bytes": 99},
    ]
    cell.notes.mkdir(parents=True)
    (cell.notes / "usage.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lives))
    batch = 8
    assert _costs.cost_of([cell]) == _costs.Cost(20 * batch, 20 * batch / 5.0, 90, 3 * 4 + 5)
    assert cell.training_seconds() == 20 * batch / 40.0


def test_pictures_fit_500_pixels(tmp_path, capsys):
    values = {(arm, seed): 40 + seed for arm in ("one", "two") for seed in (3, 5)}
    path = filled(tmp_path, values)
    for cell in cells_of(path, tmp_path / "out"):
        cell.notes.mkdir(parents=True)
        life = {"what": "train", "from_step": 0, "to_step": 20, "cpu_seconds": 9 + cell.seed}
        (cell.notes / "usage.jsonl").write_text(json.dumps({**life, "peak_bytes": 7}) + "\n")
    show(path, capsys)
    for name in ("measures", "costs", "differences"):
        with Image.open(tmp_path / f"out/report/{name}.png") as image:
            assert image.width <= 500 * palette.DENSITY
            assert len(image.convert("RGB").getcolors(1 << 20)) > 5


def test_a_finished_cell_outlives_its_run_folder(tmp_path, capsys):
    path = filled(tmp_path, {("one", 3): 50, ("two", 3): 49, ("one", 5): 52, ("two", 5): 53})
    cells = cells_of(path, tmp_path / "out")
    for cell in cells:
        cell.notes.mkdir(parents=True)
        cell.finish()
    before = show(path, capsys)
    seconds = [cell.training_seconds() for cell in cells]
    shutil.rmtree(tmp_path / "out/runs")
    assert show(path, capsys) == before
    assert "51.0" in before
    after = cells_of(path, tmp_path / "out")
    assert all(cell.trained() and not cell.lacking() for cell in after)
    assert [cell.training_seconds() for cell in after] == seconds
    # Of another configuration it is no cell of the study.
    path = study_file(tmp_path, comparisons=CLAIM, overrides=["data.workers=0", "train.steps=19"])
    for cell in cells_of(path, tmp_path / "out"):
        assert not cell.trained()
        assert cell.differing() == {"train.steps": (20, 19)}


def test_a_run_may_say_which_reference_it_found(tmp_path):
    """RUN/config.yaml has the checksum of the folder; a study that states another differs."""
    arm = {"config": str(ROOT / "configs/quickstart_raclip.yaml")}
    for stated in ([], ["model.reference.checksum=b"]):
        arms = {"one": arm | {"overrides": stated}}
        path = study_file(tmp_path, arms=arms, comparisons=[], overrides=[])
        cell = cells_of(path, tmp_path / "out")[0]
        found = OmegaConf.merge(cell.cfg, {"model": {"reference": {"checksum": "a"}}})
        cell.run.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(found, cell.run / "config.yaml")
        expected = {"model.reference.checksum": ("a", "b")} if stated else {}
        assert cell.differing() == expected
