"""Folders of a person's own as evaluation sets, and further registries: what is read, said, refused.

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
import yaml
from PIL import Image

from eval import cli, finetune, knn, linear_probe, retrieval, tables, zero_shot
from eval.sources import class_texts, own
from eval.sources.registry import Registry
from loaders import views
from loaders.errors import ConfigError, DataError
from models import weights
from tests.eval import peers
from tests.eval.conftest import SIZE, drawing, write_set
from tests.eval.test_sources_kinds import write_tar

FOLDERS = ["crested_tit", "rook", "wren"]  # as sorted on disk
TEMPLATES = ["a {c} in a tree", "the {c}."]
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
        place = home / split / name / ("deep" if label else "")
        place.mkdir(parents=True)
        for i in range(n):
            (place / f"{i}.png").write_bytes(drawing(label, random))
        (place / "._0.png").write_bytes(b"of a Macintosh")
    (home / "test" / "__MACOSX").mkdir()
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


def choose(task, *words, checkpoint="."):
    """The row of one set, as a command finds it before anything is loaded."""
    parser = cli.parser(task, "", templates=True)
    arguments = ["--checkpoint", checkpoint, "--output", "out", "--datasets"]
    args = parser.parse_args([*arguments, *map(str, words)])
    listed = "linear_probe" if task == "finetune" else task
    return cli.choose(args, task, Path("eval/datasets.yaml"), listed=listed)[0]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])


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
        for path in sorted((birds / "test" / folder).rglob("[0-9].png"))
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
    told = "class folders of split test), resize ratio 1, class names of names.tsv (sha256 "
    assert f"{told}{facts['class_names_digest'][:8]})" in row["protocol"]
    said = capsys.readouterr().out
    assert said.startswith(f"{name}: {birds}; class folders; 18 images in train; 12 images in test")
    assert "1 files that are no images passed over in test" in said
    assert row["protocol"] in said


def write_registry(path: Path, name="aviary", **changes) -> Path:
    """A further registry with the class folders beside it."""
    row = {
        "source": "folder",
        "splits": {s: {"path": f"birds/{s}", "samples": None} for s in ("train", "test")},
        "tasks": {task: ["top1"] for task in ("zero_shot", "linear_probe", "knn")},
        "classes": 3,
        "templates": [template.replace("{c}", "{}") for template in TEMPLATES],
        "labelled_only": True,
        "resize_ratio": 1.0,
        "optional": False,
        "obtain": "-",
    } | changes
    content = {"collections": {"mine": [name]}, "datasets": {name: row}}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("task", ["knn", "linear_probe", "finetune"])
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


@pytest.fixture
def tars(tmp_path) -> Path:
    """CLIP_benchmark's layout: the class `none` has no picture."""
    random, home = np.random.default_rng(3), tmp_path / "wds"
    samples = [{"png": drawing(i % 3, random), "cls": i % 3} for i in range(9)]
    write_tar(home / "test/0.tar", samples)
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
        choose("zero_shot", tars)
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"labels go up to 2, and 2 classes have names"):
        choose("zero_shot", tars, "--classnames", tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert choose("zero_shot", tars, "--classnames", tmp_path / "names.txt").all_classes


def test_a_name_follows_the_content(birds, tmp_path, monkeypatch):
    name = choose("zero_shot", birds).name
    moved = tmp_path / "elsewhere" / "birds"
    shutil.copytree(birds, moved)
    assert choose("knn", moved).name == name
    monkeypatch.chdir(moved)
    assert own.describe(".", "zero_shot").name == name
    assert own.describe("test", "zero_shot").name.startswith("birds/test@")
    (moved / "train" / "rook" / "deep" / "0.png").unlink()
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


def empty_class(home):
    (home / "cat").mkdir(parents=True)
    picture(home / "dog")


def picture(folder):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "0.png")


def flat(home):
    picture(home)
    (home / "list.csv").write_text("-")


def unfinished(home):
    (home / "shards").mkdir(parents=True)
    (home / "run.yaml").write_text("-")


def pictures(*names):
    def make(home):
        for name in names:
            picture(home / name)

    return make


def captions_only(home):
    samples = [{"png": drawing(0, np.random.default_rng(0)), "txt": "a"} for _ in range(3)]
    write_set(home, "image_text", samples)


def two_kinds(home):
    pictures("a", "b")(home)
    write_tar(home / "0.tar", [{"png": b"-", "cls": 0}])


REFUSED = {
    "nothing": (lambda home: home.mkdir(), "zero_shot", r"holds nothing.*Accepted are a set of"),
    "no folder": (lambda home: None, "zero_shot", "set: no such folder; accepted are"),
    "a file": (lambda home: home.write_text("-"), "zero_shot", "a file, and a folder is needed"),
    "flat": (flat, "zero_shot", r"1 images that lie in no class folder and 1 other files \(list"),
    "unfinished": (unfinished, "zero_shot", "not finished; close it with: python data_prep/verify"),
    "empty class": (empty_class, "zero_shot", r"no image in the class folders cat \(1 of 2\)"),
    "one class": (pictures("cat"), "zero_shot", r"one class only \(cat\)"),
    "train alone": (pictures("train/a", "train/b"), "zero_shot", "`train` alone"),
    "no train": (pictures("test/a", "test/b"), "knn", "no training split"),
    "no splits": (pictures("a", "b"), "finetune", "no training split"),
    "one trained": (pictures("train/a", "test/a", "test/b"), "linear_probe", "split train: one cl"),
    "splits or classes": (pictures("test/a", "train/a", "c"), "knn", "c beside them like classes"),
    "twice": (pictures("test/a", "val/a", "valid/a"), "zero_shot", "name one split twice"),
    "no labels": (captions_only, "zero_shot", r"no image has a label \(.cls"),
    "no captions": (pictures("a", "b"), "retrieval", "class folders have no captions"),
    "tars and folders": (two_kinds, "zero_shot", "tars and folders of images"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_set_is_refused_with_what_was_found(case, tmp_path):
    make, task, words = REFUSED[case]
    make(tmp_path / "set")
    with pytest.raises(DataError, match=words):
        choose(task, tmp_path / "set")


def test_a_class_may_be_called_train(tmp_path):
    """A vehicle among others: no splits are there."""
    pictures("car", "train", "tram")(tmp_path / "set")
    facts = choose("zero_shot", tmp_path / "set").origin.facts
    assert (facts["classes"], facts["images"]) == (3, {"test": 3})


def test_validation_is_tested_where_nothing_else_is(tmp_path):
    pictures(*(f"{split}/{name}" for split in ("train", "val") for name in "ab"))(tmp_path / "set")
    row = choose("knn", tmp_path / "set")
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["emoji_twemoji", "--templates", "simple"], "--templates is for a folder of --datasets"),
        (["{birds}", "{birds}/test", "--classnames", "x"], "--classnames with 2 folders"),
        (["{birds}", "--classnames", "{birds}/no"], "no: no such file; class names are read"),
        (["{birds}", "--templates", "sample"], "--templates sample: neither a file nor one of"),
        (["{birds}", "--registry", "{birds}/no"], "no: cannot be read as YAML"),
        (["birdz"], "unknown data set 'birdz'.*no such folder either; a set of your own is named"),
        (["s3://x/y"], "nothing is read from the network"),
    ],
)
def test_flags_that_cannot_be_meant(words, message, birds):
    with pytest.raises((ConfigError, DataError), match=message):
        choose("zero_shot", *[word.replace("{birds}", str(birds)) for word in words])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "cifar-10"}, "cifar-10: this name has a set or collection already"),
        ({"tasks": {"zero_shot": ["accuracy"]}}, "aviary: zero_shot has no metric 'accuracy'"),
        ({"tasks": {"zeroshot": ["top1"]}}, "unknown task 'zeroshot'"),
        ({"templats": "simple"}, "unknown key 'templats'; the nearest is 'templates'"),
        ({"origin": "me"}, "unknown key 'origin'"),
        ({"splits": {"train": {"samples": None}}}, "`splits` is a mapping with `test`"),
        ({"splits": {"test": {"path": "x"}}}, "split test lacks `samples`"),
    ],
)
def test_rows_of_a_further_registry_are_checked(changes, message, tmp_path):
    registry = Registry()
    with pytest.raises((ConfigError, DataError), match=message):
        registry.add(write_registry(tmp_path / "own.yaml", **changes))


def test_a_registry_has_the_form_of_ours(tmp_path):
    for text in ("- a\n", "datasets: [a]\n", "dataset: {}\n", "datasets: {}\ncollections: {a: }\n"):
        (tmp_path / "own.yaml").write_text(text)
        with pytest.raises(ConfigError, match="not a registry of data sets"):
            Registry().add(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("datasets: {}\ncollections: {a: [lost]}\n")
    with pytest.raises(ConfigError, match="collection a has unknown sets: lost"):
        Registry().add(tmp_path / "own.yaml")


def test_names_fit_folders_by_name_number_or_table_and_never_by_order(tmp_path):
    def read(text):
        (tmp_path / "names.txt").write_text(text)
        return class_texts.read_names(tmp_path / "names.txt")

    assert read("Wren\nCrested Tit\n").of_folders(["crested_tit", "wren"], "d") == [
        "Crested Tit", "Wren",
    ]  # fmt: skip
    ten = "".join(f"n{i}\n" for i in range(11))
    assert read(ten).of_folders(["0", "1", "10", "2"], "d") == ["n0", "n1", "n10", "n2"]
    assert read("b\tB\na\tA\n").of_folders(["a", "b"], "d") == ["A", "B"]
    with pytest.raises(DataError, match=r"order of lines alone proves nothing; write FOLDER, a ta"):
        read("tench\ngoldfish\n").of_folders(["n01440764", "n01443537"], "d")
    with pytest.raises(DataError, match=r"no class folder in d for rook \(1 names\)"):
        read("wren\nrook\n").of_folders(["wren"], "d", complete=True)
    assert read("a\nb\n").of_ids(["x", "y"], "d") == ["a", "b"]
    with pytest.raises(DataError, match="2 class names, but d has 3 classes"):
        read("a\nb\n").of_ids(["x", "y", "z"], "d")
    with pytest.raises(DataError, match=r"in another order than that of its ids \(wren, rook\)"):
        read("Rook\nWren\n").of_ids(["wren", "rook"], "d")
    for text, words in (("a\n\nb", "line 2"), ("a\tb\nc", "line 2"), ("a\tb\na\tc", "twice")):
        with pytest.raises(DataError, match=words):
            read(text)
