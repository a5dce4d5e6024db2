"""What is no set, flag, registry or class name: refused with what was found and what to do.

Nothing here loads a model or decodes a picture.
"""

import numpy as np
import pytest

from eval import finetune, linear_probe, zero_shot
from eval.sources import class_texts
from eval.sources.registry import Registry
from loaders.errors import ConfigError, DataError
from tests.eval.conftest import drawing, write_set
from tests.eval.own_folders import choose, picture, pictures, write_registry
from tests.eval.test_sources_kinds import write_tar


def empty_class(home):
    (home / "cat").mkdir(parents=True)
    picture(home / "dog")


def flat(home):
    picture(home)
    (home / "list.csv").write_text("-")


def unfinished(home):
    (home / "shards").mkdir(parents=True)
    (home / "run.yaml").write_text("-")


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
    "deep": (pictures("a/b", "c"), "zero_shot", r"a/b/0.png lies deeper.*class may be a or a/b"),
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
        choose(tmp_path, task, tmp_path / "set")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["aviary", "--templates", "simple"], "--templates is for a folder of --datasets"),
        (["@birds", "@tits", "--classnames", "x"], "--classnames with 2 folders"),
        (["@birds", "--classnames", "@no"], "no: no such file; class names are read"),
        (["@birds", "--templates", "sample"], "--templates sample: neither a file nor one of"),
        (["@birds", "--registry", "@no"], "no: cannot be read as YAML"),
        (["birdz"], "unknown data set 'birdz'.*no such folder either; a set of your own is named"),
        (["s3://x/y"], "nothing is read from the network"),
    ],
)
def test_flags_that_cannot_be_meant(words, message, tmp_path):
    pictures("birds/a", "birds/b", "tits/a", "tits/b")(tmp_path)
    with pytest.raises((ConfigError, DataError), match=message):
        choose(tmp_path, "zero_shot", *[word.replace("@", f"{tmp_path}/") for word in words])


def test_flags_of_texts_are_refused_where_no_text_is_read(tmp_path):
    pictures("train/a", "train/b", "test/a", "test/b")(tmp_path / "set")
    words = ["--checkpoint", ".", "--output", "out", "--datasets", f"{tmp_path}/set"]
    for main, more in (
        (linear_probe.main, ["--templates", "simple"]),
        (linear_probe.main, ["--templates", "simple", "--protocol", "clip"]),
        (finetune.main, ["--templates", "simple", "--head-init", "random"]),
    ):
        with pytest.raises(ConfigError, match="--templates is for a head from text"):
            main([*words, *more])
    with pytest.raises(ConfigError, match="--protocol unicl is for sets that state it; of /"):
        zero_shot.main([*words, "--protocol", "unicl"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "taken"}, "taken: this name has a set or collection already"),
        ({"tasks": {"zero_shot": ["accuracy"]}}, "aviary: zero_shot has no metric 'accuracy'"),
        ({"tasks": {"zeroshot": ["top1"]}}, "unknown task 'zeroshot'"),
        ({"templats": "simple"}, "unknown key 'templats'; the nearest is 'templates'"),
        ({"origin": "me"}, "unknown key 'origin'"),
        ({"splits": {"train": {"samples": None}}}, "`splits` is a mapping with `test`"),
        ({"splits": {"test": {"path": "x"}}}, "split test lacks `samples`"),
    ],
)
def test_rows_of_a_further_registry_are_checked(changes, message, tmp_path):
    ours = write_registry(tmp_path / "ours.yaml", "taken", "all")
    with pytest.raises((ConfigError, DataError), match=message):
        Registry(ours).add(write_registry(tmp_path / "own.yaml", **changes))


def test_a_registry_has_the_form_of_ours(tmp_path):
    ours = Registry(write_registry(tmp_path / "ours.yaml"))
    for text in ("- a\n", "datasets: [a]\n", "dataset: {}\n", "datasets: {}\ncollections: {a: }\n"):
        (tmp_path / "own.yaml").write_text(text)
        with pytest.raises(ConfigError, match="not a registry of data sets"):
            ours.add(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("datasets: {}\ncollections: {a: [lost]}\n")
    with pytest.raises(ConfigError, match="collection a has unknown sets: lost"):
        ours.add(tmp_path / "own.yaml")


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
