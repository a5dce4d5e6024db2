"""own.py huggingface: columns by their type, labels, captions, splits, and a hub out of reach."""

import json

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value

from data_prep.archives import hugging_face
from loaders.errors import ConfigError, DataError
from loaders.texts import read_captions
from tests.data_prep.own_parts import manifest, opened, picture, put, run, sources

COUNT = 6


def dataset(**columns) -> Dataset:
    """Pictures 0 to 5 in the column `picture`, and columns given as (type, cells)."""
    features = {"picture": Image(), **{name: kind for name, (kind, _) in columns.items()}}
    cells = {name: cells for name, (_, cells) in columns.items()}
    cells["picture"] = [{"bytes": picture(i), "path": None} for i in range(COUNT)]
    return Dataset.from_dict(cells, features=Features(features))


LABELS = (ClassLabel(names=["tabby_cat", "ox", "dog"]), [2, 0, 2, -1, 0, 2])
ONE_TEXT = (Value("string"), ["a", "b\nc", " ", "d", "e", "f"])
TEXTS = (List(Value("string")), [["a", "b"], ["c\nd"], [], ["e", None], ["f"], ["g", " "]])


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Function: (set, options) -> folder of the shards; the set is saved to disk first."""

    def call(data, *options, name="D"):
        data.save_to_disk(tmp_path / f"{name}_saved")
        words = ["huggingface", tmp_path / f"{name}_saved", "--out", tmp_path / name]
        run(monkeypatch, *words, *options)
        return tmp_path / name

    return call


def test_labels_are_found_by_type_and_keep_their_numbers(make, capsys):
    shards = opened(make(dataset(number=(Value("int64"), range(COUNT)), kind=LABELS)))
    assert shards.kind == "image_label"
    assert [entry.names for entry in shards.classes] == [("tabby cat",), ("ox",), ("dog",)]
    found = sources(shards)
    assert {name: (shards.read_image(i), shards.label(i)) for name, i in found.items()} == {
        f"row/{row}": (picture(row), label) for row, label in enumerate(LABELS[1]) if label >= 0
    }
    printed = capsys.readouterr().out
    assert "images in picture, labels in kind, captions in []" in printed
    assert "rows left out, no label: 1" in printed
    assert "without an image: 1 classes, ox" in printed


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (ONE_TEXT, [["a"], ["b c"], None, ["d"], ["e"], ["f"]]),
        (TEXTS, [["a", "b"], ["c d"], None, ["e"], ["f"], ["g"]]),
    ],
)
def test_captions_are_found_by_type(make, texts, expected):
    out = make(DatasetDict({"train": dataset(words=texts), "test": dataset(words=texts)}),
               "--split", "test")  # fmt: skip
    shards = opened(out)
    assert shards.kind == "image_text"
    found = {name: read_captions(shards, i, "txt") for name, i in sources(shards).items()}
    assert found == {f"test/{row}": texts for row, texts in enumerate(expected) if texts}
    assert manifest(out)["left_out"] == {"empty caption": 1}
    assert manifest(out).get("caption_lines", False) is (texts is TEXTS)


def test_named_columns_names_and_groups(make, tmp_path):
    people = (Value("int64"), [1, 2, 3, 1, 2, 3])
    data = dataset(kind=LABELS, other=LABELS, words=ONE_TEXT, who=people)
    (tmp_path / "names.tsv").write_text("dog\thound\nox\tox\ntabby_cat\tcat\n")
    out = make(
        data, "--label-column", "other", "--caption-column", "words", "--group-column", "who",
        "--validation", "0.4", "--names", tmp_path / "names.tsv",
    )  # fmt: skip
    sides = [opened(out / side) for side in ("train", "validation")]
    rows = [{int(name.rpartition("/")[2]) for name in sources(side)} for side in sides]
    assert sorted([*rows[0], *rows[1]]) == [0, 1, 2, 4, 5]  # row 3 has no label
    assert not {people[1][row] for row in rows[0]} & {people[1][row] for row in rows[1]}
    for side in sides:
        assert [entry.names[0] for entry in side.classes] == ["hound", "ox", "cat"]
        for name, i in sources(side).items():
            row = int(name.rpartition("/")[2])
            assert side.label(i) == {2: 0, 0: 2}[LABELS[1][row]]
            assert side.read_image(i) == picture(row)
            caption = " ".join(ONE_TEXT[1][row].split("\n")).strip()
            assert (side.read_text(i) or "").strip() == caption


def test_rows_without_an_image_and_broken_ones(make, capsys):
    data = dataset(kind=LABELS)
    cells = [*data.cast_column("picture", Image(decode=False))["picture"]]
    cells[0], cells[1] = None, {"bytes": b"<html>", "path": None}
    features = Features({"picture": Image(), "kind": LABELS[0]})
    shards = opened(
        make(Dataset.from_dict({"picture": cells, "kind": LABELS[1]}, features=features))
    )
    assert sorted(sources(shards)) == ["row/2", "row/4", "row/5"]
    printed = capsys.readouterr().out
    assert "left out, no image: 1\n" in printed
    assert "row/1: not a jpeg, png or webp image; left out\n" in printed


def test_which_split_or_column_has_to_be_named(make):
    both = DatasetDict({"train": dataset(kind=LABELS), "test": dataset(kind=LABELS)})
    for number, (data, options, message) in enumerate((
        (both, [], "it has the splits train, test; name one: --split"),
        (both, ["--split", "val"], "--split val: .* has train, test"),
        (dataset(a=LABELS, b=LABELS), [], "Class labels are in a, b, texts in none"),
        (dataset(a=ONE_TEXT, b=TEXTS), [], "Class labels are in none, texts in a, b"),
        (dataset(), [], "labels are in none, texts in none"),
        (dataset(a=LABELS), ["--label-column", "b"], "no column b; it has a, picture"),
    )):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            make(data, *options, name=f"D{number}")


def test_a_folder_of_parquet_files(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for number in range(2):
        part = dataset(kind=LABELS).shard(2, number)
        part.to_parquet(tmp_path / f"in/train-0000{number}-of-00002.parquet")
    put(tmp_path / "in/README.md")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    run(monkeypatch, "huggingface", tmp_path / "in", "--out", tmp_path / "D")
    shards = opened(tmp_path / "D")
    assert len(shards) == 5
    assert json.loads((tmp_path / "D/manifest.json").read_bytes())["split"] == "train"


def test_a_hub_that_is_not_asked_or_not_reached(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    said = hugging_face._what_failed("a/b", ConnectionError("Couldn't reach"))
    assert "the hub is not asked (HF_HUB_OFFLINE set)" in said
    assert "datasets.load_dataset('a/b').save_to_disk(DIR)" in said
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert "the hub cannot be reached" in hugging_face._what_failed("a/b", ConnectionError("x"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="no-such/set: Hugging Face datasets cannot load it"):
        hugging_face.load("no-such/set")
