"""studies/_study.py and _evaluations.py: what a YAML file may say, and what is refused at once."""

import pytest

import losses
from engine import config
from eval.sources import registry
from eval.sources.registry import Registry
from loaders.errors import ConfigError
from studies import _cells, _evaluations, _study
from studies import run as command
from tests.studies.parts import ROOT, TINY, study_file


def load(tmp_path, **changes):
    """Study, its evaluations and cells; raises what `studies.run` would before anything runs."""
    path = study_file(tmp_path, **changes)
    study = _study.read(path)
    planned = _evaluations.plan(study)
    _evaluations.measures(study, planned)
    return study, _cells.make(study, path, planned, tmp_path / "out")


def test_a_cell_is_an_arm_with_a_seed_and_its_overrides_in_order(tmp_path):
    arms = {
        "one": {"config": TINY, "overrides": ["train.steps=7"]},
        "two": {"config": TINY, "overrides": ["loss.name=clip", "data.image_label=null"]},
    }
    _, cells = load(tmp_path, arms=arms, overrides=["train.steps=9", "optim.lr=0.25"])
    assert [cell.name for cell in cells] == ["one-seed3", "two-seed3", "one-seed5", "two-seed5"]
    first, second = cells[2], cells[3]
    assert (first.cfg.train.steps, first.cfg.seed, first.cfg.optim.lr) == (7, 5, 0.25)
    assert (second.cfg.train.steps, second.cfg.loss.name) == (9, "clip")
    assert second.cfg.output_dir == str(tmp_path / "out/runs/two-seed5")


def test_variants_multiply_arms_and_comparisons_of_bare_arms(tmp_path):
    study, cells = load(
        tmp_path,
        variants={
            "b8": {"overrides": ["train.global_batch=8"]},
            "b16": {"overrides": ["train.global_batch=16"], "label": "batch 16"},
        },
        comparisons=[{"arms": ["one", "two"]}, {"arms": ["one-b8", "one-b16"]}],
    )
    assert list(study.arms) == ["one-b8", "one-b16", "two-b8", "two-b16"]
    assert study.arms["two-b16"].label == "two, batch 16"
    assert [c.cfg.train.global_batch for c in cells[:4]] == [8, 16, 8, 16]
    assert [entry.arms for entry in study.comparisons] == [
        ["one-b8", "two-b8"], ["one-b16", "two-b16"], ["one-b8", "one-b16"]
    ]  # fmt: skip


def figure(**changes):
    """Keys of a study whose figure has one thing changed."""
    measures = {"m": {"task": "zero_shot", "datasets": ["emoji_twemoji"], "metric": "top1"}}
    right = {"title": "T", "arms": ["one", "two"], "measures": ["m"]}
    return {"measures": measures, "figures": {"f": {**right, **changes}}}


TABLE = {"paper": "unicl", "table": "2", "rows": ["unicl"], "columns": ["in1k_resnet50"]}
PROBE = {"task": "linear_probe", "datasets": ["openclipart_classes"]}
WRONG = {
    "seed": ({"seed": [1]}, r"unknown key 'seed'; the nearest is 'seeds'"),
    "key of an arm": (
        {"arms": {"one": {"config": TINY, "override": []}}},
        r"unknown key 'arms.one.override'; the nearest is 'overrides'",
    ),
    "no seeds": ({"seeds": []}, r"need at least one entry"),
    "seed twice": ({"seeds": [1, 2, 1]}, r"seeds=\[1, 2, 1\]: give each once"),
    "seed is a word": ({"seeds": ["one"]}, r"seeds\[0\]"),
    "name with a slash": ({"arms": {"a/b": {"config": TINY}}}, r"arm 'a/b': a name has letters"),
    "config nowhere": ({"arms": {"one": {"config": "no.yaml"}}}, r"arm one: config=no.yaml is now"),
    "override": (
        {"overrides": ["train.step=3"]},
        r"arm one: .*unknown key 'train.step'; the nearest is 'train.steps'",
    ),
    "method": ({"overrides": ["loss.name=unicle", "train.steps=2"]}, r"arm one: .*unicle"),
    "task": ({"evaluations": [{"task": "zeroshot", "datasets": ["x"]}]}, r"'zero_shot'"),
    "set": (
        {"evaluations": [{"task": "zero_shot", "datasets": ["emoji_twemoj"]}]},
        r"unknown data set 'emoji_twemoj'; did you mean emoji_twemoji",
    ),
    "set without the task": (
        {"evaluations": [{"task": "retrieval", "datasets": ["emoji_twemoji"]}]},
        r"emoji_twemoji has no task retrieval",
    ),
    "evaluation twice": (
        {"evaluations": [PROBE, {**PROBE, "datasets": ["quickstart"]}]},
        r"linear_probe on openclipart_classes stands twice",
    ),
    "without": (
        {"arms": {"one": {"config": TINY, "without": ["zero_shots"]}}},
        r"arms.one.without: no evaluation 'zero_shots'; the nearest is 'zero_shot'",
    ),
    "arm of a comparison": (
        {"comparisons": [{"arms": ["one", "tow"]}]},
        r"no arm 'tow'; the nearest is 'two'",
    ),
    "one arm": ({"comparisons": [{"arms": ["one", "one"]}]}, r"not two different arms"),
    "measure of a comparison": (
        {"comparisons": [{"arms": ["one", "two"], "measures": ["x"]}]},
        r"no measure 'x'; the nearest is",
    ),
    "margin": ({"comparisons": [{"arms": ["one", "two"], "margin": -2}]}, r"margin=-2 is below 0"),
    "arm of a figure": (figure(arms=["one", "tow"]), r"figures.f: no arm 'tow'; the nearest is"),
    "measure of a figure": (figure(measures=["n"]), r"figures.f: no measure 'n'; the nearest"),
    "row beside a figure": (
        figure(published={**TABLE, "rows": ["uncl"]}),
        r"figures.f.published: no row 'uncl'; the nearest is 'unicl'",
    ),
    "table beside a figure": (
        figure(published={**TABLE, "table": "4"}),
        r"table 4: the numbers of the batch size study were in no source",
    ),
    "measure that nobody makes": (
        {"measures": {"m": {"task": "knn", "datasets": ["emoji_twemoji"], "metric": "top1"}}},
        r"measures.m: no evaluation 'knn on emoji_twemoji'",
    ),
    "metric": (
        {"measures": {"m": {"task": "zero_shot", "datasets": ["emoji_twemoji"], "metric": "top"}}},
        r"measures.m: no metric 'top'; the nearest is 'top",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_anything_runs(case, tmp_path):
    changes, words = WRONG[case]
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, **changes)
    assert not (tmp_path / "out").exists()


def test_an_arm_that_stands_twice_is_refused(tmp_path):
    path = study_file(tmp_path)
    path.write_text(path.read_text().replace("  two:", "  one:"))
    with pytest.raises(ConfigError, match="one"):
        _study.read(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "thre"], "no arm 'thre'"),
        (["--seeds", "4"], "has 3, 5"),
        (["--set", "optim.lrr=1"], "'optim.lr'"),
        (["--launcher", " "], "a launcher is empty"),
    ],
)
def test_wrong_words_of_the_command_line(arguments, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        command.main([str(study_file(tmp_path)), "--output", str(tmp_path / "out"), *arguments])


@pytest.mark.parametrize("task", ["3/3", "-1/3", "1", "1/0", "a/b"])
def test_a_task_is_one_of_n(task, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main([str(study_file(tmp_path)), f"--task={task}"])
    assert "is not I/N" in capsys.readouterr().err


def test_tasks_share_out_the_cells(tmp_path, capsys):
    names = []
    for task in range(3):
        command.main(
            [str(study_file(tmp_path)), "--output", str(tmp_path / "out"), "--dry-run",
             "--task", f"{task}/3"]
        )  # fmt: skip
        lines = capsys.readouterr().out.splitlines()
        names.append([line.split()[0] for line in lines if "-seed" in line])
    assert names == [["one-seed3", "two-seed5"], ["two-seed3"], ["one-seed5"]]


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_studies_say_what_they_cost_and_all_their_runs_load(path, tmp_path, monkeypatch):
    """Sets are looked for and not read: empty ones will do, also for those that are not shipped."""
    text = path.read_text()
    assert "\n# Command: " in text
    assert "\n# Cost: " in text
    study = _study.read(path)
    monkeypatch.setenv("UNICL_EVAL_DATA", str(tmp_path / "sets"))
    monkeypatch.setattr(registry, "REPOSITORY", tmp_path / "repository")
    for entry in study.evaluations:
        for row in Registry().select(entry.datasets, entry.task):
            for split in row.splits:
                folder = row.folder(split)
                assert folder.is_relative_to(tmp_path)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "manifest.json").touch()
    assert study.name == path.stem
    planned = _evaluations.plan(study)
    assert _evaluations.measures(study, planned)
    cells = _cells.make(study, path, planned, tmp_path, seeds=study.seeds[:1])  # others load alike
    assert len(cells) == len(study.arms)


def test_the_family_holds_every_method_and_sees_each_source_equally_often():
    """A balanced sampler gives half of the samples to each of two sources."""
    study = _study.read(ROOT / "studies/family.yaml")
    assert set(losses.names()) <= study.arms.keys()
    for name, arm in study.arms.items():
        cfg = config.load(ROOT / arm.config, [*study.overrides, *arm.overrides])
        assert cfg.loss.name == name or name not in losses.names()
        sources = [cfg.data.image_label, cfg.data.image_text]
        assert cfg.data.sampler == "balanced"
        assert cfg.train.samples / sum(source is not None for source in sources) == 16_640
