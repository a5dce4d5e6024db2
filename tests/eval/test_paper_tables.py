"""Published tables: what the files hold, and how result rows fill them."""

import re
from pathlib import Path

import pytest

from engine import config
from eval.report import paper_join, paper_tables, render_paper
from eval.sources.registry import Registry
from loaders.errors import ConfigError, DataError
from tests.eval.paper_rows import EVERY, cell_of, filled, make_registry, result


@pytest.fixture
def registry():
    return make_registry()


def published(paper, table):
    """{row id: {column id: [values]}}."""
    return {
        row.id: {cell.column.id: [p.value for p in cell.published] for cell in row.cells}
        for row in paper_tables.load(paper, table).rows
    }


# --- what the files hold


@pytest.mark.parametrize(("paper", "table"), EVERY)
def test_every_table_is_whole(paper, table):
    content = paper_tables.load(paper, table)
    ids = [row.id for row in content.rows]
    assert len(ids) == len(set(ids))
    assert len({column.title for column in content.columns}) == len(content.columns)
    for row in content.rows:
        assert row.name
        for cell in row.cells:
            assert all(p.source.strip() and "/" + "work" not in p.source for p in cell.published)
            assert cell.column.task is None or cell.column.dataset or cell.column.collection
            if cell.config:
                assert (paper_join.CONFIGS / f"{cell.config}.yaml").exists(), cell.config


def test_sums_and_ratios_of_the_paper():
    claims, five, six = (published("unicl", t) for t in ("abstract", "5", "6"))
    best = six["swin_tiny_in21k_half_yfcc14m_half"]["zero_shot_14"][0]
    gain = best - six["swin_tiny_yfcc14m"]["zero_shot_14"][0]
    assert gain == pytest.approx(9.2) == claims["zero_shot_over_pairs"]["gain"][0]
    probe = {row: values["linear_probe_18"][0] for row, values in five.items()}
    gain = probe["in1k_gcc15m_unicl"] - probe["in1k_cross_entropy"]
    assert gain == pytest.approx(3.4) == claims["probe_over_labels"]["gain"][0]
    for name, row in published("unicl", "1").items():
        images, concepts, ratio = (
            row[key][0] for key in ("images", "concepts", "images_per_concept")
        )
        # Images are printed with two or three digits, the ratio as a whole number.
        assert images / concepts == pytest.approx(ratio, rel=0.03, abs=0.51), name
    two = published("unicl", "2")
    for row, method in (("in1k_cross_entropy", "cross_entropy"), ("in1k_supcon", "supcon")):
        assert five[row]["imagenet1k"] == two[method]["in1k_swin_tiny"]
    assert five["in1k_unicl"]["imagenet1k"] == two["unicl"]["in1k_swin_tiny"]


def test_means_over_sets_are_those_of_their_rows():
    """ALIP and FILIP print the sets and their mean: a slipped digit shows."""
    for paper, table in (("alip", "zero_shot"), ("alip", "linear_probe"), ("filip", "zero_shot")):
        for name, row in published(paper, table).items():
            mean = row.pop("mean")[0]
            values = [value[0] for value in row.values()]
            assert sum(values) / len(values) == pytest.approx(mean, abs=0.11), (paper, name)


@pytest.mark.parametrize("table", ["2", "5", "6"])
def test_every_row_of_the_image_label_tables_has_configurations(table):
    for row in paper_tables.load("unicl", table).rows:
        for cell in row.cells:
            assert bool(cell.config) == cell.applies, (row.id, cell.column.id)


def test_configurations_train_what_the_row_says():
    method = {"CrossEntropy": "cross_entropy", "SupCon": "supcon", "UniCL": "unicl", "CLIP": "clip"}
    folders = {"ImageNet-1K": "imagenet1k", "ImageNet-21K": "imagenet21k", "GCC-3M": "gcc3m"}
    folders |= {"ImageNet-22K": "imagenet22k", "YFCC-14M": "yfcc14m", "GCC-15M": "gcc3m gcc12m"}
    folders |= {"half of ImageNet-21K": "imagenet21k_half", "half of YFCC-14M": "yfcc14m_half"}
    for table in ("5", "6", "readme"):
        for row in paper_tables.load("unicl", table).rows:
            cfg = config.load(paper_join.CONFIGS / f"{row.cells[0].config}.yaml")
            wanted = " ".join(folders[part] for part in row.facts["data"].split(" + ")).split()
            found = config.specs(cfg.data.image_label, "") + config.specs(cfg.data.image_text, "")
            assert sorted(f"data/{name}" for name in wanted) == sorted(found), row.id
            name = method.get(row.facts.get("method", "UniCL"), "multitask")
            assert cfg.loss.name == name, row.id
            size = {"Swin-B": "swin_base", "Focal-B": "focalnet_base"}.get(row.facts.get("model"))
            assert cfg.model.image.name == (size or "swin_tiny"), row.id


def test_columns_are_named_as_in_the_registry():
    known = Registry()
    for paper, table in EVERY:
        for cell in (c for row in paper_tables.load(paper, table).rows for c in row.cells):
            column = cell.column
            if column.task and column.dataset:
                row = known.datasets[column.dataset]
                assert column.metric in row.tasks[column.task], column
                assert column.protocol is None or column.protocol in row.protocols, column
            elif column.task:
                assert column.collection in known.collections, column


def test_recipe_of_a_configuration_is_what_training_reads():
    names = {c.config for p, t in EVERY for r in paper_tables.load(p, t).rows for c in r.cells}
    recipes = {name: paper_join.settings(name).get("recipe", "ours") for name in names - {None}}
    for name, recipe in recipes.items():
        path = paper_join.CONFIGS / f"{name}.yaml"
        if recipe is None:
            with pytest.raises(ConfigError, match=r"\n  recipe: "):
                config.load(path)
        else:
            cfg = config.load(path, ["data.augmentation=unicl_release"])
            assert cfg.recipe == recipe, name
    assert set(recipes.values()) == {None, "release_defaults", "ours"}


# --- joining


def test_a_cell_takes_the_result_of_its_configuration_and_measure(registry):
    own = "unicl_swin_tiny_in1k"
    found = [
        result(own, "imagenet1k", "zero_shot", "top1", 78.43),
        result(own, "imagenet1k", "linear_probe", "top1", 1.0),
        result(own, "coco_detection", "detection", "mask_map", 39.9),
        result("unicl_swin_tiny_in1k_gcc3m", "imagenet1k", "zero_shot", "top1", 80.61),
        result("cross_entropy_swin_tiny_in1k", "imagenet1k", "linear_probe", "top1", 76.0),
        result("supcon_swin_tiny_in1k", "imagenet1k", "zero_shot", "top1", 2.0),
    ]
    table = filled("unicl", "5", found, registry)
    ours = {(r.id, c.column.id): c.ours for r in table.rows for c in r.cells if c.ours is not None}
    assert ours == {
        ("in1k_unicl", "imagenet1k"): 78.43,
        ("in1k_unicl", "coco_mask"): 39.9,
        ("in1k_gcc3m_unicl", "imagenet1k"): 80.61,
        ("in1k_cross_entropy", "imagenet1k"): 76.0,
    }
    differences = cell_of(table, "in1k_unicl", "imagenet1k").differences()
    assert differences == [pytest.approx(78.43 - 79.9)]


def test_the_last_step_is_shown_and_checkpoints_are_never_mixed(registry):
    name = "unicl_swin_tiny_in1k"
    early = {"step": 50, "checkpoint_hash": "early", "date": "2027-01-01T00:00:00+00:00"}
    found = [
        result(name, "imagenet1k", "zero_shot", "top1", 60.0, **early),
        result(name, "imagenet1k", "zero_shot", "top1", 70.0),
        result(name, "coco_detection", "detection", "box_map", 40.0, **early),
    ]
    table = filled("unicl", "5", found, registry)
    assert cell_of(table, "in1k_unicl", "imagenet1k").ours == 70.0
    assert cell_of(table, "in1k_unicl", "coco_box").ours is None
    assert any(f"{name}: results of 2 checkpoints" in n and "step 100" in n for n in table.notes)
    assert not any("2 checkpoints" in n for n in filled("unicl", "5", found[1:2], registry).notes)


def test_a_mean_needs_every_member(registry):
    name = "unicl_swin_base_in21k_gcc15m_yfcc14m"
    found = [
        result(name, "first", "zero_shot", "top1", 40.0),
        result(name, "second", "zero_shot", "mean_per_class", 50.0),
        result(name, "second", "zero_shot", "top1", 99.0),
        result(name, "third", "zero_shot", "top1", 61.5),
    ]
    assert cell_of(
        filled("unicl", "readme", found, registry), "swin_base", "zero_shot_20"
    ).ours == pytest.approx((40 + 50 + 61.5) / 3)
    table = filled("unicl", "readme", [found[0], found[2], found[3]], registry)
    assert cell_of(table, "swin_base", "zero_shot_20").ours is None
    assert any("--datasets imagenet1k second " in command for command in table.commands)
    command = next(c for c in table.commands if "focalnet" in c and "zero_shot" in c)
    assert "--datasets imagenet1k elevater20 --output" in command


def test_collections_without_known_members_say_so(registry):
    table = filled("unicl", "5", [], registry)
    notes = "\n".join(table.notes)
    both = "zero-shot mean of 14 sets; linear probe mean of 18 sets"
    assert f"No run can fill {both}: its members are not known." in notes
    assert "holds no result" in notes
    assert not any("unicl14" in command or "unicl18" in command for command in table.commands)


def test_two_protocols_are_not_mixed(registry):
    first = result("unicl_swin_tiny_in1k", "imagenet1k", "zero_shot", "top1", 70.0)
    second = first | {"protocol": "other prompts", "value": 71.0, "prompt_digest": "other"}
    with pytest.raises(DataError, match=r"2 results of unicl_swin_tiny_in1k.*other prompts"):
        filled("unicl", "5", [first, second], registry)


def test_the_column_says_which_protocol_counts(registry):
    name = "unicl_swin_tiny_in1k"
    found = [
        result(name, "imagenet1k", "zero_shot", "top1", value, protocol=f"x; protocol {key}: y")
        for key, value in (("elevater", 71.0), ("unicl", 70.0))
    ]
    assert cell_of(filled("unicl", "5", found, registry), "in1k_unicl", "imagenet1k").ours == 70.0
    table = filled("unicl", "5", found[:1], registry)
    assert cell_of(table, "in1k_unicl", "imagenet1k").ours is None


def test_commands_train_and_evaluate_what_is_missing(registry, tmp_path):
    found = [result("unicl_swin_tiny_in1k", "imagenet1k", "zero_shot", "top1", 70.0)]
    commands = filled("unicl", "5", found, registry, tmp_path / "results").commands
    text = "\n".join(commands)
    assert "train.py --config configs/unicl_swin_tiny_in1k.yaml" not in text
    place = (
        "--checkpoint runs/run_unicl_swin_tiny_in1k --train data/eval/train --val data/eval/test"
    )
    assert f"python -m eval.detection {place} --output {tmp_path / 'results'}" in commands
    assert "deepspeed train.py --config configs/unicl_swin_tiny_in1k_gcc15m.yaml" in commands
    wanted = "eval.zero_shot --checkpoint runs/unicl_swin_tiny_in1k_gcc15m --datasets imagenet1k "
    assert wanted in text
    # Models without a text tower: n/a for zero-shot, ImageNet through a linear classifier.
    assert "eval.zero_shot --checkpoint runs/supcon" not in text
    assert "eval.linear_probe --checkpoint runs/supcon_swin_tiny_in1k --datasets imagenet1k" in text
    (tmp_path / "run_unicl_swin_tiny_in1k").mkdir()
    commands = filled("unicl", "5", found, registry, tmp_path / "results").commands
    assert any(f"--checkpoint {tmp_path / 'run_unicl_swin_tiny_in1k'} " in c for c in commands)


def test_commands_of_configurations_that_are_open(registry):
    commands = filled("unicl", "2", [], registry).commands
    opened = next(c for c in commands if "configs/unicl_resnet101_cifar10.yaml" in c)
    assert opened.startswith("deepspeed train.py")
    assert "# first decide" in opened
    mixed = [c for c in commands if "unicl_swin_tiny_in1k_mixup_cutmix" in c]
    assert mixed[0] == "deepspeed train.py --config configs/unicl_swin_tiny_in1k_mixup_cutmix.yaml"
    assert "eval.zero_shot --checkpoint runs/unicl_swin_tiny_in1k_mixup_cutmix" in mixed[1]


# --- adding a paper

NEW = """
title: New
where: a journal
tables:
  "1":
    caption: something
    source: New paper, Table 1
    verified: true
    columns:
      a: {title: A, dataset: imagenet1k, task: zero_shot, metric: top1}
      b: {title: B}
    rows:
      - {id: x, label: X, config: unicl_swin_tiny_in1k, cells: [CELLS]}
"""


def test_a_paper_is_one_file(tmp_path, registry):
    folder = tmp_path / "paper"
    folder.mkdir()
    (folder / "new.yaml").write_text(NEW.replace("CELLS", "1.5, [2, {value: 3, source: S}]"))
    assert paper_tables.papers(folder) == ["new"]
    table = paper_tables.load("new", "1", folder)
    found = [result("unicl_swin_tiny_in1k", "imagenet1k", "zero_shot", "top1", 2.5)]
    text = render_paper.md(paper_join.join(table, found, Path("results"), registry))
    assert re.search(r"X +\| A +\| 2.5† \| +1.5 \[a\] \| +\+1.0 \|", text)
    assert re.search(r"\| B +\| +— \| 2 \[a\] / 3 \[b\] \| +— \|", text)


@pytest.mark.parametrize(
    ("cells", "old", "new", "words"),
    [
        ("1.5", "", "", r"row x: 1 cells for 2 columns"),
        ("1.5, yes please", "", "", r"column b: 'yes please' is no number"),
        ("1.5, {valu: 2}", "", "", r"column b: a cell needs value"),
        ("1.5, 2", "verified: true", "", r"column a: no source, or verified"),
        ("1.5, 2", "source: New paper, Table 1", "", r"column a: no source"),
        ("1.5, 2", "label: X", "lable: X", r"row x: unknown keys lable"),
        ("1.5, 2", "dataset:", "datset:", r"table 1: missing or unknown key.*datset"),
        ("1.5, 2", "caption:", "text:", r"missing or unknown key 'caption'"),
        ("1.5, 2", "tables:", "tables: [", r"new\.yaml: "),
    ],
)
def test_broken_files_are_refused_in_words(tmp_path, cells, old, new, words):
    text = NEW.replace("CELLS", cells)
    assert old in text
    (tmp_path / "new.yaml").write_text(text.replace(old, new, 1) if old else text)
    with pytest.raises(DataError, match=words):
        paper_tables.load("new", "1", tmp_path)
