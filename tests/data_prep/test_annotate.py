"""annotate.py: what is joined, what stays, what is refused, restart after kill -9."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_prep import annotate
from data_prep.verify import verify
from loaders.errors import ConfigError, DataError
from loaders.manifest import open_shards
from tests.data_prep.test_reshard import SHARDS, TOTAL, contents, make_set, tars
from tests.loaders.conftest import encoded, sample, write_tar

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three shards whose keys all begin at 0; every third sample has no json."""
    return make_set(tmp_path_factory.mktemp("sets") / "toy", "toy")


def keys_of(place):
    """shard/key of all samples, in order."""
    return list(contents(place))


def rows_of(place):
    """A row of two rewrites and a summary for each sample."""
    return [
        {"key": key, "rewrites": [f"first of {key}", f"second of {key}"], "summary": f"sum {key}"}
        for key in keys_of(place)
    ]


def write_table(path, rows):
    """A table in the format of the path's ending; a list becomes one cell of several lines."""
    flat = [
        {k: "\n".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
        for row in rows
    ]
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(flat)
    else:
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in flat)]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Function: (input, table, options) -> the new folder."""

    def call(place, table, *options, name="new"):
        words = ["annotate.py", place, "--table", table, "--out", tmp_path / name, *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        annotate.main()
        return tmp_path / name

    return call


REWRITES = ("--columns", "rewrites=rewrites", "--lines", "rewrites=2")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_fields_come_into_the_json_and_everything_else_stays(made, run, tmp_path, ending, capsys):
    table = write_table(tmp_path / f"table.{ending}", rows_of(made)[::-1])
    out = run(made, table, "--columns", "rewrites=rewrites", "short=summary", *REWRITES[2:])
    said = capsys.readouterr().out
    assert f"{TOTAL} of {TOTAL} samples have a row" in said
    assert said.endswith(f"next: python data_prep/verify.py {out}\n")
    verify(out)
    old, new = contents(made), contents(out)
    assert list(new) == list(old)  # shards, keys and order
    for key, parts in new.items():
        about = json.loads(parts.pop("json"))
        assert about.pop("rewrites") == [f"first of {key}", f"second of {key}"]
        assert about.pop("short") == f"sum {key}"
        before = dict(old[key])
        assert about == json.loads(before.pop("json", b"{}"))
        assert parts == before
    first, second = open_shards(made), open_shards(out)
    assert (second.kind, second.classes) == (first.kind, first.classes)
    assert second.labels.tolist() == first.labels.tolist()
    assert second.read_json(4)["rewrites"][1].startswith("second of 00000/")


def test_tabs_and_several_columns_of_a_list(made, run, tmp_path):
    """LaCLIP's files as columns: one rewrite each. A quote in TSV is a character."""
    rows = [{"id": key, "a": f'"{key}', "b": "two"} for key in keys_of(made)]
    table = write_table(tmp_path / "table.tsv", rows)
    options = ("--key-column", "id", "--columns", "rewrites=a+b", "--lines", "rewrites=2")
    out = run(made, table, *options)
    for key, parts in contents(out).items():
        assert json.loads(parts["json"])["rewrites"] == [f'"{key}', "two"]


def test_bare_keys_fit_a_set_that_has_each_once(run, tmp_path):
    members = [sample(f"{n:09d}", n, jpg=encoded(n, (4, 4), "JPEG")) for n in range(4)]
    write_tar(tmp_path / "tars/0.tar", [m for s in members for m in s])
    rows = [{"key": f"{n:09d}", "text": f"number {n}"} for n in range(4)]
    out = run(tmp_path / "tars", write_table(tmp_path / "t.csv", rows), "--columns", "s=text")
    found = [json.loads(parts["json"])["s"] for parts in contents(out).values()]
    assert found == [f"number {n}" for n in range(4)]


def test_a_field_of_the_json_may_be_the_key(run, tmp_path):
    """As an address in place of a key; two samples with one address get the same text."""
    members = []
    for n, url in enumerate(("a", "b", "a")):
        about = json.dumps({"url": f"http://x/{url}", "n": n}).encode()
        members += sample(f"{n:09d}", n, jpg=encoded(n, (4, 4), "JPEG"), json=about)
    write_tar(tmp_path / "tars/0.tar", members)
    rows = [{"url": "http://x/a", "text": "A"}, {"url": "http://x/b", "text": "B"}]
    options = ("--key-column", "url", "--sample-key", "json.url", "--columns", "s=text")
    out = run(tmp_path / "tars", write_table(tmp_path / "t.csv", rows), *options)
    about = [json.loads(parts["json"]) for parts in contents(out).values()]
    assert [(a["s"], a["n"]) for a in about] == [("A", 0), ("B", 1), ("A", 2)]


def test_samples_without_a_row_are_counted_and_stay_to_the_byte(made, run, tmp_path, capsys):
    rows = rows_of(made)[: TOTAL - 3]
    rows[0] = {"key": rows[0]["key"], "rewrites": []}  # an empty cell is no text
    rows.append({"key": "nowhere", "rewrites": ["x", "y"]})
    table = write_table(tmp_path / "table.jsonl", rows)
    with pytest.raises(DataError, match=rf"4 of {TOTAL} samples of toy have no text in the table"):
        run(made, table, *REWRITES, "--max-unmatched", (4 - 0.01) / TOTAL)
    assert not (tmp_path / "new").exists()
    out = run(made, table, *REWRITES, "--max-unmatched", (4 + 0.01) / TOTAL)
    said = capsys.readouterr().out
    assert f"{TOTAL - 4} of {TOTAL} samples have a row" in said
    assert "4 have none, or an empty one" in said
    assert "rows of the table that fit no sample: 1" in said
    old, new = contents(made), contents(out)
    for key in [keys_of(made)[0], *keys_of(made)[-3:]]:
        assert new[key] == old[key]
    verify(out)
    stated = json.loads((out / "manifest.json").read_text())["annotations"]
    assert (stated["matched"], stated["unmatched"], stated["unused"]) == (TOTAL - 4, 4, 1)


def change(row=5, **values):
    """A change of one row of the table."""
    return lambda rows: rows[row].update(values)


WRONG = {
    "key twice": (lambda rows: rows.append(rows[2]), r"row 24: key '00000/000000002' stands twice"),
    "key is a number": (change(key=5), r"row 6: key 5 is a number, and keys have leading zeros"),
    "no key": (change(key=""), r"row 6: key='' is no key"),
    "one line less": (change(rewrites=["a"]), r"row 6, rewrites: 1 texts where --lines says 2"),
    "one line more": (change(rewrites=[*"abc"]), r"row 6, rewrites: 3 texts where --lines says 2"),
    "number in a list": (change(rewrites=["a", 7]), r"row 6, rewrites: 7 is no text"),
    "blank in a list": (change(rewrites=["a", " "]), r"row 6, rewrites: ' ' is no text"),
    "a mapping": (change(rewrites={"a": 1}), r"row 6, rewrites: {'a': 1} is no text"),
    "true": (change(rewrites=True), r"row 6, rewrites: True is no text"),
    "bare key of several": (
        lambda rows: [rows.pop(9), rows[0].update(key="000000000")],
        r"key '000000000' of the table fits several samples, in .*00000.tar and .*00001.tar",
    ),
    "two rows of a sample": (
        lambda rows: rows.append({**rows[0], "key": "000000000"}),
        r"sample '000000000' has two rows, 000000000 and 00000/000000000",
    ),
    "nothing fits": (
        lambda rows: [row.update(key=row["key"] + "x") for row in rows],
        r"23 of 23 samples of toy have no text .* A key of the table: '00000/000000000x'; of a sa",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_table_is_refused_before_the_set_is_begun(made, run, tmp_path, case):
    alter, words = WRONG[case]
    rows = rows_of(made)
    alter(rows)
    with pytest.raises(DataError, match=words):
        run(made, write_table(tmp_path / "table.jsonl", rows), *REWRITES)
    assert not (tmp_path / "new").exists()


FILES = {
    "a.txt": (b"key\n", r"a table is one of .csv, .tsv, .jsonl, .parquet"),
    "a.csv": (b"key,other\nx,y\n", r"no column rewrites; it has key, other"),
    "b.csv": (b"key,rewrites\nx,y,z\n", r"row 1: 3 cells under 2 columns"),
    "c.csv": (b"key,rewrites\n", r"no rows"),
    "d.csv": (b"key,rewrites\nx,\xff\n", r"not UTF-8"),
    "e.csv": (b'key,rewrites\nx,"a\n', r"not CSV"),
    "a.tsv": (b"key\trewrites\nx\n", r"row 1: 1 cells under 2 columns"),
    "a.jsonl": (b'{"key": "x"\n', r"row 1: not JSON"),
    "b.jsonl": (b"[1]\n", r"row 1: not a JSON object"),
    "c.jsonl": (b'{"rewrites": "x"}\n', r"no column key"),
    "a.parquet": (b"PAR1", r"not parquet"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_table(made, run, tmp_path, name):
    data, words = FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=words):
        run(made, tmp_path / name, "--columns", "rewrites=rewrites")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--columns", "rewrites"], "give FIELD=COLUMN"),
        (["--columns", "a=b+"], "give FIELD=COLUMN"),
        (["--columns", "a=b", "a=c"], "a stands twice"),
        (["--columns", "a=b", "--lines", "b=2"], "one of the fields a"),
        (["--columns", "a=b", "--lines", "a=0"], "one of the fields a"),
        (["--columns", "a=b", "--max-unmatched", "1.5"], "between 0 and 1"),
        (["--columns", "a=b", "--sample-key", "url"], "give key or json.FIELD"),
        (["--columns", "a=b", "--part", "2", "--parts", "2"], "numbered 0 to 1"),
    ],
)
def test_wrong_words_of_the_command_line(made, run, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        run(made, tmp_path / "none.csv", *options)


def test_a_field_that_is_there_is_not_overwritten(made, run, tmp_path):
    """Sample 0 has no json, so the second shows it; nothing that was written is taken for whole."""
    rows = [{"key": key, "t": "new"} for key in keys_of(made)]
    table = write_table(tmp_path / "table.csv", rows)
    with pytest.raises(DataError, match=r"sample '000000001': its json has caption already"):
        run(made, table, "--columns", "caption=t")


def test_the_set_itself_is_no_place_to_write_into(made, run, tmp_path):
    before = tars(made)
    table = write_table(tmp_path / "table.jsonl", rows_of(made))
    with pytest.raises((ConfigError, DataError)):
        run(made, table, *REWRITES, "--out", made)
    assert tars(made) == before


def test_another_table_in_the_same_folder_is_refused(made, run, tmp_path):
    rows = rows_of(made)
    out = run(made, write_table(tmp_path / "a.jsonl", rows), *REWRITES)
    before = tars(out)
    rows[3]["rewrites"] = ["x", "y"]
    with pytest.raises(DataError, match="another table"):
        run(made, write_table(tmp_path / "a.jsonl", rows), *REWRITES)
    assert tars(out) == before


def test_two_parts_are_the_same_bytes_as_one(made, run, tmp_path):
    table = write_table(tmp_path / "a.jsonl", rows_of(made))
    whole = run(made, table, *REWRITES, name="whole")
    for part in (1, 0):
        parted = run(made, table, *REWRITES, "--part", part, "--parts", 2, name="parted")
    assert len(tars(whole)) == len(SHARDS)
    assert tars(parted) == tars(whole)


def test_killed_and_repeated_it_is_the_same_bytes(made, run, tmp_path):
    """SIGKILL as soon as the first shard is finished; finished shards are not made again."""
    table = write_table(tmp_path / "a.jsonl", rows_of(made))
    whole = run(made, table, *REWRITES, name="whole")
    out = tmp_path / "killed"
    words = ["annotate.py", str(made), "--table", str(table), "--out", str(out), *REWRITES]
    code = (
        "import sys, time; from data_prep import annotate; from data_prep.sets import set_folder\n"
        "real = set_folder.publish\n"
        "def slow(*a): real(*a); time.sleep(60)\n"
        "set_folder.publish = slow\n"
        f"sys.argv = {words}\n"
        "annotate.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (out / "shards/00000_stats.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = (out / "shards/00000.tar").stat().st_mtime_ns
    assert len(tars(out)) == 1
    run(made, table, *REWRITES, name="killed")
    assert tars(out) == tars(whole)
    assert (out / "shards/00000.tar").stat().st_mtime_ns == first
    verify(out)
