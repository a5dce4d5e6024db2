"""Folders of a person's own as evaluation sets, and further registries: what is read and said.

Expected scores are computed here from the towers, in float64; nothing of `eval` is asked.
"""

import io
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval import finetune, knn, linear_probe, retrieval, tables, zero_shot
from eval.sources import class_texts, own
from eval.sources.splits import EvalSplit
from loaders import views
from loaders.errors import DataError
from models import weights
from tests.eval import peers
from tests.eval import test_sources_kinds as kinds
from tests.eval.conftest import SIZE, drawing
from tests.eval.own_folders import TEMPLATES, choose, pictures, write_registry

FOLDERS = ["crested_tit", "rook", "wren"]  # as sorted on disk
MAINS = {
    "zero_shot": zero_shot.main, "knn": knn.main, "linear_probe": linear_probe.main,
    "finetune": finetune.main, "retrieval": retrieval.main,
}  # fmt: skip


@pytest.fixture(scope="module")
def birds(tmp_path_factory) -> Path:
    """Class folders in `train` and `test`, with what systems leave there, and two templates."""
    home = tmp_path_factory.mktemp("own") / "birds"
    random = np.random.default_rng(0)
    for (split, n), (label, name) in itertools.product(
        (("train", 6), ("test", 4)), enumerate(FOLDERS)
    ):
        place = home / split / name
        place.mkdir(parents=True)
        for i in range(n):
            (place / f"{i}.png").write_bytes(drawing(label, random))
        (place / "._0.png").write_bytes(b"of a Macintosh")
    (home / "test" / "__MACOSX").mkdir()
    (home / "test" / "rook" / "Thumbs.db").touch()
    (home / "test" / "wren" / "notes.txt").write_text("seen in May")
    (home / "templates.txt").write_text("\r\n".join(TEMPLATES) + "\r\n\r\n")
    return home


def evaluate(task, world, output, *words) -> dict:
    """Rows of `python -m eval.<task>` by (data set, metric)."""
    arguments = ["--checkpoint", world / "runs/tiny", "--output", output, "--workers", "0"]
    MAINS[task]([*map(str, [*arguments, *words])])
    (path,) = Path(output).glob("*.jsonl")
    rows = map(json.loads, path.read_text().splitlines())
    return {(row["dataset"], row["metric"]): row for row in rows}


@torch.no_grad()
def dense_top1(world, images, labels, names, templates) -> float:
    """Percent of images (PIL) whose class has the nearest mean of normalised text features."""
    model, view = weights.load(world / "runs/tiny").model, views.build_eval(SIZE, SIZE)
    pixels = views.normalize(torch.stack([view(i) for i in images]), peers.MEAN, peers.STD)
    x = model.encode_image(pixels)["feature"].double()
    texts = [t.replace("{c}", name) for name in names for t in templates]
    y = model.encode_text(peers.tokenizer()(texts))["feature"].double()
    y = (y / y.norm(dim=1, keepdim=True)).view(len(names), len(templates), -1).mean(1)
    best = (x @ (y / y.norm(dim=1, keepdim=True)).T).argmax(1).numpy()
    return 100 * float((best == np.asarray(labels)).mean())


def test_zero_shot_of_class_folders_says_its_protocol(world, birds, tmp_path, capsys):
    names = {"wren": "winter wren", "rook": "rook, black", "crested_tit": "crested tit"}
    table = tmp_path / "names.tsv"
    table.write_text("".join(f"{folder}\t{name}\n" for folder, name in names.items()))
    found = evaluate("zero_shot", world, tmp_path, "--datasets", birds, "--classnames", table)
    name = next(iter(found))[0]
    assert name.startswith("birds@")
    row = found[name, "top1"]
    assert [metric for _, metric in found] == ["top1", "mean_per_class"]  # top-5 of 3 says nothing
    assert (row["n"], row["classes"], row["split"]) == (12, 3, "test")
    images = [
        Image.open(path).convert("RGB")
        for folder in FOLDERS
        for path in sorted((birds / "test" / folder).glob("[0-9].png"))
    ]
    spoken = [names[folder].replace(",", "") for folder in FOLDERS]
    expected = dense_top1(world, images, np.repeat(range(3), 4), spoken, TEMPLATES)
    assert row["value"] == pytest.approx(expected)
    facts = row["set"]
    assert (facts["folder"], facts["source"]) == (str(birds), "folder")
    assert (facts["images"], facts["resize_ratio"]) == ({"train": 18, "test": 12}, 1.0)
    assert facts["arguments"] == ["--datasets", str(birds), "--classnames", str(table)]
    assert facts["templates"] == str(birds / "templates.txt")
    plain = [template.replace("{c}", "{}") for template in TEMPLATES]
    assert facts["templates_digest"] == class_texts.digest(plain)
    assert facts["class_names_digest"] == class_texts.digest([names[f] for f in FOLDERS])
    assert list(facts["splits"]) == ["train", "test"]
    told = "class folders of split test), resize ratio 1, class names of names.tsv (sha256 "
    assert f"{told}{facts['class_names_digest'][:8]})" in row["protocol"]
    said = capsys.readouterr().out
    assert said.startswith(f"{name}: {birds}; class folders; 18 images in train; 12 images in test")
    assert "files passed over in test: 1 that are no images" in said
    assert row["protocol"] in said


@pytest.mark.parametrize(
    "task", ["knn", "finetune", pytest.param("linear_probe", marks=pytest.mark.soak)]
)
def test_a_folder_and_a_row_of_a_registry_give_the_same(task, world, birds, tmp_path):
    registry = write_registry(birds.parent / f"{task}.yaml")
    words = ["--datasets", "mine", birds, "--registry", registry]
    words += ["--epochs", "1"] if task == "finetune" else []
    found = evaluate(task, world, tmp_path, *words)
    by_name = {name: row for (name, metric), row in found.items() if metric == "top1"}
    (folder,) = by_name.keys() - {"aviary"}
    assert by_name[folder]["value"] == by_name["aviary"]["value"]
    assert by_name[folder]["n"] == by_name["aviary"]["n"] == 12
    facts = by_name["aviary"]["set"]
    assert facts["registry"] == str(registry)
    assert facts["row"]["splits"]["test"] == {"path": "birds/test", "samples": None}
    assert "row aviary of" in by_name["aviary"]["protocol"]


def test_captions_of_a_prepared_set_are_retrieved(world, tmp_path):
    found = evaluate("retrieval", world, tmp_path / "a", "--datasets", world / "drawn_test")
    words = [str(world / "runs/tiny"), "--datasets", "toy_captions", "--workers", "0"]
    arguments = ["--checkpoint", *words, "--output", str(tmp_path / "b")]
    retrieval.main(arguments, world / "registry.yaml")
    (path,) = (tmp_path / "b").glob("*.jsonl")
    known = {row["metric"]: row["value"] for row in map(json.loads, path.open())}
    assert {metric: row["value"] for (_, metric), row in found.items()} == known
    assert {row["set"]["source"] for row in found.values()} == {"shards"}


def test_hugging_faces_folder_takes_names_in_the_order_of_its_ids(tmp_path):
    kinds.write_huggingface(tmp_path)
    names = [f"{name} x" for name in kinds.NAMES]
    (tmp_path / "toy" / "classnames.txt").write_text("\n".join(names))
    row = choose(tmp_path, "zero_shot", tmp_path / "toy")
    split = EvalSplit(row, "test", 8)
    assert split.class_names()[1] == names
    assert split.image(3).getpixel((5, 5))[0] == split.labels[3] == 3
    kinds.write_parquet(tmp_path / "tables")
    home = tmp_path / "tables/toy/test"
    (home / "part.parquet").rename(home / "train-0.parquet")
    shutil.copy(home / "train-0.parquet", home / "test-0.parquet")
    with pytest.raises(DataError, match="tables of test and train in one folder would be read as"):
        choose(tmp_path, "zero_shot", home)


@pytest.fixture
def tars(tmp_path) -> Path:
    """CLIP_benchmark's layout: the class `none` has no picture."""
    random, home = np.random.default_rng(3), tmp_path / "wds"
    samples = [{"png": drawing(i % 3, random), "cls": i % 3} for i in range(9)]
    kinds.write_tar(home / "test/0.tar", samples)
    (home / "classnames.txt").write_text("\ufeffrook\nwren\ntit\nnone\n")
    (home / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    return home


def test_every_class_of_clip_benchmarks_layout_is_a_candidate(world, tars, tmp_path, capsys):
    found = evaluate("zero_shot", world, tmp_path, "--datasets", tars)
    row = next(iter(found.values()))
    random = np.random.default_rng(3)
    pictures = [Image.open(io.BytesIO(drawing(i % 3, random))) for i in range(9)]
    names = ["rook", "wren", "tit", "none"]
    expected = dense_top1(world, pictures, np.arange(9) % 3, names, TEMPLATES)
    assert (row["value"], row["classes"]) == (pytest.approx(expected), 4)
    assert "candidates without an image in test: none (1)" in capsys.readouterr().out
    (tars / "classnames.txt").unlink()
    with pytest.raises(DataError, match=r"classnames.txt"):
        choose(tmp_path, "zero_shot", tars)
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"labels go up to 2, and 2 classes have names"):
        choose(tmp_path, "zero_shot", tars, "--classnames", tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert choose(tmp_path, "zero_shot", tars, "--classnames", tmp_path / "names.txt").all_classes


def test_a_name_follows_the_content(birds, tmp_path, monkeypatch):
    name = choose(tmp_path, "zero_shot", birds).name
    moved = tmp_path / "elsewhere" / "birds"
    shutil.copytree(birds, moved)
    assert choose(tmp_path, "knn", moved).name == name
    monkeypatch.chdir(moved)
    assert own.describe(".", "zero_shot").name == name
    assert own.describe("test", "zero_shot").name.startswith("birds/test@")
    (moved / "train" / "rook" / "0.png").unlink()
    changed = own.describe(str(moved), "knn").name
    assert changed != name
    for split in ("train", "test"):
        (moved / split / "rook").rename(moved / split / "crow")
    assert own.describe(str(moved), "knn").name not in (name, changed)


def test_other_templates_are_another_column(world, birds, tmp_path):
    for extra in ((), ("--templates", "simple")):
        evaluate("zero_shot", world, tmp_path / "rows", "--datasets", birds, *extra)
    rows = tables.load_folder(tmp_path / "rows")
    other = [
        row | {"run": "x", "checkpoint_hash": "y"} for row in rows if "simple" in row["protocol"]
    ]
    table = tables.join([*rows, *other], tmp_path / "rows")
    columns = [column for column in table.columns if column.metric == "top1"]
    assert len(columns) == len({column.protocol for column in columns}) == 2
    assert "simple" in {column.protocol for column in columns}
    command = f"--checkpoint FOLDER_OF_RUN/x --datasets {birds} --output {tmp_path / 'rows'}"
    assert [line for line in table.commands if str(birds) in line] == [
        f"python -m eval.zero_shot {command}"
    ]


def test_a_class_may_be_called_train(tmp_path):
    """A vehicle among others: no splits are there."""
    pictures("car", "train", "tram")(tmp_path / "set")
    facts = choose(tmp_path, "zero_shot", tmp_path / "set").origin.facts
    assert (facts["classes"], facts["images"]) == (3, {"test": 3})


def test_validation_is_tested_where_nothing_else_is(tmp_path):
    pictures(*(f"{split}/{name}" for split in ("train", "val") for name in "ab"))(tmp_path / "set")
    row = choose(tmp_path, "knn", tmp_path / "set")
    assert (row.split_name("test"), list(row.splits)) == ("val", ["train", "test"])


def test_what_only_sources_see_is_said_before_a_model_is_loaded(
    birds, tmp_path, monkeypatch, world
):
    home = tmp_path / "birds"
    shutil.copytree(birds, home)
    (home / "train" / "rook").rename(home / "train" / "Rook")
    monkeypatch.setattr(weights, "load", lambda path: pytest.fail("a model was loaded"))
    for task in ("knn", "finetune"):
        with pytest.raises(DataError, match=r"no sample of the classes \['rook'\].*give equal cl"):
            evaluate(task, world, tmp_path / "out", "--datasets", home)
