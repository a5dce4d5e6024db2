"""own.py list: files and addresses of CSV, TSV, JSONL and parquet, captions, labels, groups."""

import json
import math
import shutil
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import retry_failed
from data_prep.archives.own_lists import Columns, OwnList, Side
from data_prep.download import url_list
from data_prep.download.list_rows import Notes, Rejected
from data_prep.sets import set_folder
from loaders.errors import ConfigError, DataError
from loaders.manifest import open_shards
from loaders.texts import read_captions
from tests.data_prep.downloads import OPTIONS, REPOSITORY, rows
from tests.data_prep.http_server import serve
from tests.data_prep.own_parts import (
    folders,
    manifest,
    opened,
    picture,
    put,
    run,
    sources,
    tars,
    write_csv,
)

CAPTIONS = ['"quoted" and, comma', "tab\tinside", "a cat"]  # of the rows 0, 1, 2
LABELS = ["tabby_cat", "ox", "tabby_cat"]


def write_list(path: Path, names: list[str], captions, labels) -> Path:
    """The same rows in the format of the ending."""
    columns = {"file": names, "words": captions, "kind": labels}
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if path.suffix == ".csv":
        return write_csv(path, list(columns), [list(row.values()) for row in rows])
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        lines = [[cell.replace("\t", " ") for cell in row.values()] for row in rows]
        path.write_text("\n".join(map("\t".join, [list(columns), *lines])))
    return path


FLAGS = ["--image-column", "file", "--caption-column", "words"]


@pytest.mark.parametrize("end", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_images_captions_and_labels(tmp_path, monkeypatch, end):
    put(tmp_path / "a/1.jpg", picture(1))
    put(tmp_path / "2 ü%20.png", picture(2, "PNG"))
    put(tmp_path / "b/3.bmp", picture(3, "BMP"))
    names = ["a/1.jpg", str(tmp_path / "2 ü%20.png"), "b\\3.bmp"]
    path = write_list(tmp_path / f"list.{end}", names, CAPTIONS, LABELS)
    words = ["list", path, *FLAGS, "--out", tmp_path / "D", "--label-column", "kind"]
    run(monkeypatch, *words)
    shards = opened(tmp_path / "D")
    assert shards.kind == "image_label"
    assert [entry.names for entry in shards.classes] == [("ox",), ("tabby cat",)]
    found = sources(shards)
    assert sorted(found) == ["2 ü%20.png", "a/1.jpg", "b/3.bmp"]
    order = [found[name] for name in ("a/1.jpg", "2 ü%20.png", "b/3.bmp")]
    captions = [text.replace("\t", " ") if end == "tsv" else text for text in CAPTIONS]
    assert [shards.read_text(i) for i in order] == captions
    assert [shards.label(i) for i in order] == [1, 0, 1]
    assert [shards.read_image(i) for i in order[:2]] == [picture(1), picture(2, "PNG")]
    as_captions = open_shards(tmp_path / "D", kind="image_text")  # as data.image_text reads it
    assert read_captions(as_captions, order[2], "txt") == ["a cat"]


def test_captions_alone_make_a_set_of_captions(tmp_path, monkeypatch):
    put(tmp_path / "in/1.jpg", picture(1))
    path = write_list(tmp_path / "list.csv", ["1.jpg"], ["a\r\ncat"], [""])
    run(monkeypatch, "list", path, *FLAGS, "--root", tmp_path / "in", "--out", tmp_path / "D")
    shards = opened(tmp_path / "D")
    assert (shards.kind, shards.read_text(0)) == ("image_text", "a cat")
    assert manifest(tmp_path / "D")["list"]["notes"] == {
        "captions with a line break, now a blank": 1
    }


@pytest.mark.parametrize("end", ["parquet", "jsonl", "csv"])
def test_several_captions(tmp_path, monkeypatch, end):
    """A cell that is a list, or several columns."""
    texts = [["one", "two\nlines", " "], ["three", None, "four"]]
    for number in range(2):
        put(tmp_path / f"{number}.jpg", picture(number))
    names, words = ["0.jpg", "1.jpg"], list(FLAGS)
    if end == "csv":
        cells = [[name, *texts[number][:2], "five"] for number, name in enumerate(names)]
        path = write_csv(tmp_path / "list.csv", ["file", "words", "more", "last"], cells)
        words += ["--caption-column", "more", "--caption-column", "last"]
        expected = [["one", "two lines", "five"], ["three", "five"]]
    else:
        path = write_list(tmp_path / f"list.{end}", names, texts, ["", ""])
        expected = [["one", "two lines"], ["three", "four"]]
    run(monkeypatch, "list", path, *words, "--out", tmp_path / "D")
    shards = opened(tmp_path / "D")
    found = sources(shards)
    assert [read_captions(shards, found[name], "txt") for name in names] == expected
    assert manifest(tmp_path / "D")["caption_lines"] is True


def read(path: Path, columns: Columns, **more) -> tuple[list, Notes]:
    notes = Notes()
    return list(OwnList((path,), columns, **more).read_rows(notes)), notes


def test_rows_that_cannot_be_used_are_kept_with_their_reason(tmp_path):
    """And the others are all there."""
    put(tmp_path / "1.jpg", picture(1))
    put(tmp_path / "empty.jpg", b"")
    (tmp_path / "folder.jpg").mkdir()
    cells = [
        ("1.jpg", "a", 3, None),
        ("none.jpg", "a", 3, "no file: No such file or directory"),
        ("empty.jpg", "a", 3, "no file: empty, or a folder"),
        ("folder.jpg", "a", 3, "no file: empty, or a folder"),
        ("", "a", 3, "no image"),
        (None, "a", 3, "no image"),
        ("s3://bucket/1.jpg", "a", 3, "scheme is not http or https"),
        ("https://host/1.jpg", "a", 3, "address in a list of files"),
        ("1.jpg", 5, 3, "caption is no text"),
        ("1.jpg", "a", None, "no label"),
        ("1.jpg", "a", math.nan, "no label"),
        ("1.jpg", "a", " ", "no label"),
        ("1.jpg", "a", [1, 2], "label is no text or whole number"),
        ("1.jpg", "a", 1.5, "label is no text or whole number"),
        ("1.jpg", "a", True, "label is no text or whole number"),
        ("1.jpg", "b", 1.0, None),
        ("1.jpg", None, "3", None),
    ]
    path = tmp_path / "list.jsonl"
    lines = [dict(zip(("file", "words", "kind"), row, strict=False)) for row in cells]
    path.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "names.txt").write_text("zero\none\ntwo\nthree\n")
    columns = Columns("file", ("words",), "kind")
    found, notes = read(path, columns, names=tmp_path / "names.txt")
    assert [row.row for row in found] == list(range(len(cells)))
    assert [row.reason if isinstance(row, Rejected) else None for row in found] == [
        reason for *_, reason in cells
    ]
    good = [row for row in found if not isinstance(row, Rejected)]
    assert [(row.caption, row.extra) for row in good] == [("a", (3,)), ("b", (1,)), ("", (3,))]
    assert [entry["names"] for entry in notes.facts["classes"]][1] == ["one"]
    with pytest.raises(DataError, match=r"the 2 classes are numbers \('1', '3'\).*--names"):
        read(path, columns)


def test_line_numbers_are_those_of_an_editor(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        put(tmp_path / f"{folder}/1.jpg", picture(1))
        names = ["1.jpg", "none.jpg"]
        write_list(tmp_path / f"{folder}/list.csv", names, ["x", "x"], ["", ""])
    files = [tmp_path / "a/list.csv", tmp_path / "b/list.csv"]
    run(monkeypatch, "list", *files, *FLAGS, "--out", tmp_path / "D")
    lines = (tmp_path / "D/list/rejected.tsv").read_text().splitlines()[1:]
    assert [line.split("\t")[0] for line in lines] == [f"{path}:3" for path in files]
    assert len(opened(tmp_path / "D")) == 2  # each list has its own folder


def test_lists_that_make_no_set(tmp_path, monkeypatch):
    put(tmp_path / "1.jpg", picture(1))
    out = ["--out", tmp_path / "D"]
    path = write_list(tmp_path / "list.csv", ["none.jpg"], ["a"], [""])
    with pytest.raises(
        DataError, match=r"no usable row: .*'no file: No such file or directory': 1"
    ):
        run(monkeypatch, "list", path, *FLAGS, *out)
    with pytest.raises(DataError, match="no column word; it has file, words, kind"):
        run(monkeypatch, "list", path, *FLAGS[:-1], "word", *out)
    with pytest.raises(ConfigError, match="needs --caption-column, --label-column, or both"):
        run(monkeypatch, "list", path, *FLAGS[:2], *out)
    with pytest.raises(ConfigError, match=r"--image-size: about downloads, but .*list\.csv names"):
        run(monkeypatch, "list", path, *FLAGS, *out, "--image-size", 128)
    with pytest.raises(ConfigError, match="--group-column is about --validation"):
        run(monkeypatch, "list", path, *FLAGS, *out, "--group-column", "kind")
    pq.write_table(pa.table({"file": [{"bytes": b"x"}], "words": ["a"]}), tmp_path / "i.parquet")
    with pytest.raises(DataError, match=r"holds dict, not paths .*own\.py huggingface"):
        run(monkeypatch, "list", tmp_path / "i.parquet", *FLAGS, *out)
    assert not (tmp_path / "D/run.yaml").exists()


def test_parts_and_a_restart_give_the_bytes_of_one_run(tmp_path, monkeypatch):
    names = list(folders(tmp_path, {"x": 7}))
    path = write_list(tmp_path / "list.csv", names, names, ["x"] * 7)
    words = ["list", path, *FLAGS, "--samples-per-shard", 3, "--name", "own", "--out"]
    run(monkeypatch, *words, tmp_path / "D")
    for part in (2, 0, 1):
        run(monkeypatch, *words, tmp_path / "E", "--part", part, "--parts", 3)
    assert tars(tmp_path / "E") == tars(tmp_path / "D")
    with pytest.raises(DataError, match=r"captions: \['words'\] there, \[\] now"):
        run(
            monkeypatch,
            "list",
            path,
            *FLAGS[:2],
            "--label-column",
            "kind",
            *words[-5:],
            tmp_path / "E",
        )
    for stats in (tmp_path / "D/shards").glob("*_stats.json"):
        stats.unlink()  # what a kill may leave
    (tmp_path / "x/3.jpg").unlink()
    with pytest.raises(DataError, match=r"x/3\.jpg: No such file .* it was there when"):
        run(monkeypatch, *words, tmp_path / "D")


def test_groups_stay_on_one_side(tmp_path, monkeypatch):
    names = list(folders(tmp_path, {"x": 12}))
    who = [f"p{number % 5}" for number in range(12)]
    path = write_list(tmp_path / "list.csv", names, names, who)
    words = ["list", path, *FLAGS, "--group-column", "kind", "--validation", "1/3"]
    run(monkeypatch, *words, "--out", tmp_path / "D")
    sides = [set(sources(opened(tmp_path / "D" / side))) for side in ("train", "validation")]
    assert sorted([*sides[0], *sides[1]]) == sorted(names)
    people = [{who[names.index(name)] for name in side} for side in sides]
    assert people[0] | people[1] == set(who)
    assert not people[0] & people[1]
    assert {len(sides[1])} <= {3, 4, 5}  # groups of two and three, a third of twelve
    assert set_folder.load(tmp_path / "D/train").identity["groups"] == "kind"


def test_an_image_with_several_rows_stays_on_one_side(tmp_path):
    names = [f"{number}.jpg" for number in range(6)]
    for number, name in enumerate(names):
        put(tmp_path / name, picture(number))
    texts = [f"{name} {k}" for k in range(3) for name in names]
    path = write_list(tmp_path / "list.csv", names * 3, texts, [""] * 18)
    found = {}
    for side in ("train", "validation"):
        found[side], _ = read(
            path, Columns("file", ("words",)), side=Side(side, Fraction("0.3"), 0)
        )
    assert sorted(row.caption for side in found.values() for row in side) == sorted(texts)
    assert len({row.url for row in found["validation"]}) == 2
    assert len(found["validation"]) == 6


def test_an_image_with_two_labels_is_two_samples_and_an_equal_row_none(tmp_path, monkeypatch):
    put(tmp_path / "1.jpg", picture(1))
    path = write_list(tmp_path / "list.csv", ["1.jpg"] * 4, ["", "x", "", ""], ["a", "a", "b", "a"])
    words = ["list", path, "--label-column", "kind", "--out", tmp_path / "D", *FLAGS]
    run(monkeypatch, *words)
    shards = opened(tmp_path / "D")
    assert len(shards) == 3
    pairs = {(shards.label(i), shards.read_text(i)) for i in range(3)}
    assert pairs == {(0, None), (0, "x"), (1, None)}
    assert manifest(tmp_path / "D")["list"]["duplicates"] == 1


# Addresses: one download of real files over loopback.


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """A labelled list of addresses, its set, and the requests that the server saw."""
    home = tmp_path_factory.mktemp("own")
    patch = pytest.MonkeyPatch()
    # Without torch img2dataset starts in half the time.
    patch.setenv("PYTHONPATH", str(REPOSITORY / "tests/data_prep/without_torch"))
    with serve() as server:
        paths = ["/jpeg/0.jpg", "/missing.jpg", "/jpeg/1.jpg", "/html.jpg", "/jpeg/2.jpg"]
        names = ["n/a", *(server.url(path) for path in paths), "ftp://host/x.jpg"]
        labels = ["c", "b", "b", "a", "a", "b", "c"]
        path = write_list(home / "list.csv", names, [""] * 7, labels)
        options = {**OPTIONS, "--processes": 1, "--samples-per-shard": 3}
        flags = [word for pair in options.items() for word in pair]
        words = ["list", path, "--image-column", "file", "--label-column", "kind", *flags]
        words += ["--allow-private-addresses", "--out", home / "D"]
        run(patch, *words)
        before = dict(server.requests)
        run(patch, *words)  # the same again has nothing to do
        assert dict(server.requests) == before
        patch.undo()
        yield home, before


def test_addresses_go_through_the_download_wrapper(fetched):
    home, requests = fetched
    out = home / "D"
    assert requests["/jpeg/1.jpg"] == requests["/missing.jpg"] == 1
    in_order = sorted(rows(out), key=lambda row: row["row"])
    assert [row["row"] for row in in_order] == [2, 3, 4, 5, 6]  # lines from 0, a header among them
    what = [(row["label"], row["status"] == "success") for row in in_order]
    assert what == [(1, True), (1, False), (0, True), (0, False), (1, True)]
    shards = opened(out)
    assert (shards.kind, [entry.names for entry in shards.classes]) == (
        "image_label", [("a",), ("b",)],
    )  # fmt: skip
    names = [shards.read_json(i)["url"].rpartition("/")[2] for i in range(3)]
    assert dict(zip(names, shards.labels.tolist(), strict=True)) == {
        "0.jpg": 1, "1.jpg": 0, "2.jpg": 1,
    }  # fmt: skip
    assert [shards.read_text(i) for i in range(3)] == [None] * 3
    about = manifest(out)
    assert about["tool"] == "data_prep/own.py"
    assert about["yield"] == {"attempted": 5, "kept": 3}
    assert about["list"]["rejected"] == {
        "file in a list of addresses": 1,
        "scheme is not http or https": 1,
    }


def test_an_unfinished_download_goes_on(fetched, tmp_path):
    """What a kill between two shards leaves is a set with one missing, for any number of tasks."""
    home, _ = fetched
    shutil.copytree(home / "D", tmp_path / "D")
    (tmp_path / "D/shards/00001_stats.json").unlink()
    assert set_folder.missing(tmp_path / "D") == [1]
    assert set_folder.missing(tmp_path / "D", 0, 2) == []
    index = url_list.read_index(tmp_path / "D")
    assert index["columns"] == ["url", "row", "label"]
    chosen = retry_failed.select(tmp_path / "D", index, retry_failed.failed_rows(home / "D")[0])
    assert [address.rpartition("/")[2] for address in chosen["url"].to_pylist()] == [
        "missing.jpg", "html.jpg",
    ]  # fmt: skip
    assert chosen["label"].to_pylist() == [1, 0]
