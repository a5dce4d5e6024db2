"""Arrays as members of prepared sets: joined, copied by reshard, checked by verify."""

import json
import subprocess
import sys

import numpy as np
import pytest

from data_prep import annotate
from data_prep.verify import verify
from loaders import arrays
from loaders.errors import ConfigError, DataError
from loaders.manifest import open_shards
from tests.data_prep.test_annotate import ROOT, keys_of, rows_of, write_table
from tests.data_prep.test_reshard import TOTAL, contents, make_set, tars
from tests.data_prep.verify_parts import make, put
from tests.loaders.conftest import sample
from tests.loaders.test_arrays import HOSTILE, npy, table


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three shards whose keys all begin at 0."""
    return make_set(tmp_path_factory.mktemp("sets") / "toy", "toy")


@pytest.fixture
def folder(made, tmp_path):
    """SHARD/KEY.npy of every sample, with as many rows as its number says."""
    for number, key in enumerate(keys_of(made)):
        path = tmp_path / "found" / f"{key}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, table(number % 4, "<f2"))
    return tmp_path / "found"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Function: (input, options) -> the new folder."""

    def call(place, *options, name="new"):
        words = ["annotate.py", place, "--out", tmp_path / name, *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        annotate.main()
        return tmp_path / name

    return call


def test_arrays_come_beside_everything_else_and_pass_verify_and_reshard(
    made, folder, run, tmp_path, capsys
):
    rows = write_table(tmp_path / "table.jsonl", rows_of(made))
    texts = ("--table", rows, "--columns", "summary=summary")
    out = run(made, "--arrays", f"objects={folder}", *texts)
    assert f"objects: {TOTAL} of {TOTAL} samples have an array\n" in capsys.readouterr().out
    assert verify(out).bad == 0
    old, new = contents(made), contents(out)
    assert list(new) == list(old)
    for key, parts in new.items():
        assert parts.pop("objects.npy") == (folder / f"{key}.npy").read_bytes()
        assert json.loads(parts.pop("json"))["summary"] == f"sum {key}"
        assert parts == {name: data for name, data in old[key].items() if name != "json"}
    stated = json.loads((out / "manifest.json").read_bytes())["annotations"]["arrays"]["objects"]
    assert stated == {"folder": "found", "samples": TOTAL, "matched": TOTAL, "unmatched": 0,
                      "unused": 0}  # fmt: skip
    script = ROOT / "data_prep" / "reshard.py"
    command = [sys.executable, script, out, "--out", tmp_path / "half", "--fraction", "0.5"]
    subprocess.run(command, check=True, capture_output=True)
    verify(tmp_path / "half")
    half = open_shards(tmp_path / "half")
    for i in range(len(half)):
        before = half.read_json(i)["origin"]
        assert half.read_array(i, "objects") == (folder / f"{before}.npy").read_bytes()


def test_keys_alone_and_samples_without_an_array(run, tmp_path):
    """A set with keys of its own; two of twelve samples have none, as is allowed."""
    place, found = make(tmp_path / "D"), tmp_path / "found"
    verify(place)
    shards = open_shards(place)
    found.mkdir()
    for i in range(2, len(shards)):
        np.save(found / f"{shards.key(i)}.npy", table(i % 3))
    np.save(found / "stranger.npy", table(1))
    words = r"2 of 12 samples .* no array in the folder.*1 files of the folder fit no sample"
    with pytest.raises(DataError, match=words):
        run(place, "--arrays", f"objects={found}")
    out = run(place, "--arrays", f"objects={found}", "--max-unmatched", "0.2")
    assert verify(out).bad == 0  # a sample may lack an array: training counts it
    joined = open_shards(out)
    for i in range(2, 12):
        assert np.array_equal(arrays.parse(joined.read_array(i, "objects")), table(i % 3))
    with pytest.raises(DataError, match=r"has objects\.npy already, and nothing is overwritten"):
        run(out, "--arrays", f"objects={found}", "--max-unmatched", "0.2", name="twice")


def test_two_parts_are_the_same_bytes_and_other_arrays_are_another_plan(made, folder, run):
    whole = run(made, "--arrays", f"objects={folder}", name="whole")
    for part in (1, 0):
        options = ("--part", part, "--parts", 2)
        parted = run(made, "--arrays", f"objects={folder}", *options, name="parted")
    assert tars(parted) == tars(whole)
    np.save(next(folder.rglob("*.npy")), table(3, "<f4"))
    with pytest.raises(DataError, match="other arrays of objects"):
        run(made, "--arrays", f"objects={folder}", name="whole")


@pytest.mark.parametrize("what", ["pickled objects", "a terabyte that is not there", "nan", "text"])
def test_an_array_that_training_cannot_read_is_refused_with_its_file(made, folder, run, what):
    data, reason = HOSTILE[what]
    bad = sorted(folder.rglob("*.npy"))[5]
    bad.write_bytes(data)
    with pytest.raises(DataError, match=rf"{bad}: {reason}"):
        run(made, "--arrays", f"objects={folder}")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ([], ConfigError, "give --table with --columns, or --arrays"),
        (["--table", "t.csv"], ConfigError, "--table and --columns go together"),
        (["--columns", "a=b"], ConfigError, "--table and --columns go together"),
        (["--arrays", "boxes=F"], ConfigError, "give NAME=FOLDER.*of objects"),
        (["--arrays", "objects"], ConfigError, "give NAME=FOLDER"),
        (["--arrays", "objects=A", "objects=B"], ConfigError, "each NAME once"),
        (["--arrays", "objects=nowhere"], DataError, r"nowhere: no folder with files KEY\.npy"),
    ],
)
def test_wrong_words_of_the_command_line(made, run, options, error, words):
    with pytest.raises(error, match=words):
        run(made, *options)


def test_verify_lists_bad_arrays_and_refuses_several_widths(tmp_path):
    place = make(tmp_path / "D")

    def members(*found):
        return [
            member
            for number, data in enumerate(found)
            for member in [
                *sample(f"{1000 + number:09d}", number, txt=b"a"),
                (f"{1000 + number:09d}.objects.npy", data),
            ]
        ]

    good = npy(table(2))
    put(place, 1, members(good, HOSTILE["pickled objects"][0], npy(table(0))))
    assert verify(place).bad == 1
    line = (place / "bad_samples.tsv").read_text()
    assert line.startswith("00001/000001001\tobjects: array_type: object")
    put(place, 1, members(good, npy(table(1, width=4))))
    with pytest.raises(DataError, match=r"objects\.npy with rows of 3, 4 numbers"):
        verify(place)
    put(place, 1, members(npy(table(1, width=4))))
    put(place, 2, members(npy(table(1, width=5))))
    with pytest.raises(DataError, match=r"rows of 4, 5 numbers"):
        verify(place)
