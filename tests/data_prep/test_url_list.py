"""The list as parquet: what is kept, what is rejected, restart, race, kill, append."""

import hashlib
import http.client
import json
import random
from collections import Counter
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.download import url_list
from data_prep.download.list_input import identify
from data_prep.download.list_rows import Rejected, Row, Seen, encode_url
from loaders.errors import ConfigError, DataError
from tests.data_prep.list_parts import build, make_rows, read_rejected, read_table

# --- urls -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "encoded"),
    [
        ("http://a.example/b.jpg?x=1&y=%20#f", "http://a.example/b.jpg?x=1&y=%20#f"),
        ("https://a.example/%E4%BD%A0.jpg", "https://a.example/%E4%BD%A0.jpg"),
        ("http://a.example/ä b.jpg", "http://a.example/%C3%A4%20b.jpg"),
        ("http://a.example/ä%20b.jpg", "http://a.example/%C3%A4%20b.jpg"),
        ("http://a.example/你.jpg", "http://a.example/%E4%BD%A0.jpg"),
        ("http://bücher.example/x", "http://xn--bcher-kva.example/x"),
        ("http://u:p@bücher.example:8080/x", "http://u:p@xn--bcher-kva.example:8080/x"),
        ("  HTTPS://A.example/x \r", "HTTPS://A.example/x"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
        ("http://a.example/\x01\x7f", "http://a.example/%01%7F"),
    ],
)
def test_encode_url(url, encoded):
    assert encode_url(url) == encoded


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "missing url"),
        ("  ", "missing url"),
        ("not a url", "not a url"),
        ("www.example.org/x.jpg", "not a url"),
        ("//a.example/x", "not a url"),
        ("http://", "not a url"),
        ("http:///x.jpg", "not a url"),
        ("http://a b/x.jpg", "not a url"),
        ("http://[::1/ä", "not a url"),
        ("file:///etc/passwd", "scheme is not http or https"),
        ("ftp://a.example/x.jpg", "scheme is not http or https"),
        ("data:image/png;base64,AAAA", "scheme is not http or https"),
        ("javascript:alert(1)", "scheme is not http or https"),
    ],
)
def test_url_refused(url, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        encode_url(url)


def test_file_url_needs_leave():
    assert encode_url("file:///d/ä.jpg", ["file"]) == "file:///d/%C3%A4.jpg"
    with pytest.raises(ValueError, match="scheme is not file"):
        encode_url("http://a.example/x", ["file"])


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], min_codepoint=32)))
def test_encoded_urls_can_be_requested_and_mean_the_same(path):
    encoded = encode_url("http://a.example/" + path)
    connection = http.client.HTTPConnection("a.example")
    connection._validate_path(encoded)  # what img2dataset's urlopen would refuse
    encoded.encode("ascii")
    assert encode_url(encoded) == encoded
    assert unquote(encoded, errors="surrogateescape") == unquote(
        ("http://a.example/" + path).strip(), errors="surrogateescape"
    )


# --- repeated rows --------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), max_size=20), max_size=8))
def test_seen_is_a_set(batches):
    seen, known = Seen(), set()
    for batch in batches:
        wanted = []
        for value in batch:
            wanted.append(value not in known)
            known.add(value)
        assert seen.first(np.array(batch, dtype=np.uint64)).tolist() == wanted
    assert seen.hashes.tolist() == sorted(known)


def test_repeated_rows_over_batches_and_files(tmp_path):
    """130,000 rows, more than one batch, against plain Python."""
    draw = random.Random(0)
    pairs = [
        (f"http://h/{draw.randrange(40_000)}", f"c{draw.randrange(3)}") for _ in range(130_000)
    ]
    index = build(tmp_path / "d", [Row(i, *p, b"") for i, p in enumerate(pairs)], size=500)
    kept, urls, same_url = {}, set(), 0
    for i, pair in enumerate(pairs):
        if pair not in kept:
            same_url += pair[0] in urls
            kept[pair] = i
            urls.add(pair[0])
    table = read_table(tmp_path / "d")
    found = list(zip(table["url"].to_pylist(), table["caption"].to_pylist(), strict=True))
    assert found == list(kept)
    assert table["row"].to_pylist() == list(kept.values())
    assert index["rows"] == len(kept)
    assert index["duplicates"] == len(pairs) - len(kept)
    assert index["same_url_other_caption"] == same_url
    assert index["rejected"] == {}


# --- what build writes ----------------------------------------------------------------------


def test_rejected_rows_are_kept_with_their_reason(tmp_path):
    raws = [bytes(range(256)), b"tab\there", "ä\\n\n".encode(), b""]
    rows = [
        Row(0, "http://a.example/1", "kept", b""),
        Row(1, "", "no url", raws[0]),
        Row(2, "http://a.example/2", " \u3000", raws[1]),
        Rejected(7, "of the reader", raws[2]),
        Row(8, "http://a.example/3", "\ud800", raws[3]),
        Row(9, "http://a.example/\ud800", "x", b"9"),
        Row(10, "http://a.example/ä", "encoded", b""),
    ]
    index = build(tmp_path / "d", rows)
    wanted = [
        (1, "missing url", raws[0]),
        (2, "empty caption", raws[1]),
        (7, "of the reader", raws[2]),
        (8, "not UTF-8", raws[3]),
        (9, "not UTF-8", b"9"),
    ]
    assert read_rejected(tmp_path / "d") == wanted
    assert index["rejected"] == Counter(why for _, why, _ in wanted)
    assert index["notes"] == {"urls percent-encoded": 1}
    assert read_table(tmp_path / "d").to_pylist() == [
        {"url": "http://a.example/1", "caption": "kept", "row": 0},
        {"url": "http://a.example/%C3%A4", "caption": "encoded", "row": 10},
    ]


def test_files_hold_whole_shards(tmp_path):
    """Shard numbers as img2dataset counts them: each file by itself, on over the sorted files."""
    index = build(tmp_path / "d", make_rows(1057), size=5)
    assert [entry["rows"] for entry in index["files"]] == [500, 500, 57]
    assert [entry["file"] for entry in index["files"]] == [f"{i:05d}.parquet" for i in range(3)]
    starts = []
    for entry in index["files"]:
        rows = pq.read_table(tmp_path / "d/list" / entry["file"])["row"].to_pylist()
        starts += rows[::5]
    assert starts == list(range(0, 1057, 5))
    assert url_list.shard_count(index, 5) == len(starts)


def test_index_and_digest(tmp_path):
    out = tmp_path / "d"
    index = build(out, make_rows(1057), size=5, extra_columns=())
    assert index == url_list.read_index(out) == json.loads((out / "list/index.json").read_text())
    hashes = []
    for entry in index["files"]:
        hashes.append(hashlib.sha256((out / "list" / entry["file"]).read_bytes()).hexdigest())
        assert entry["sha256"] == hashes[-1]
    assert url_list.digest(out) == hashlib.sha256("".join(hashes).encode()).hexdigest()
    assert index["input_sha256"] == hashlib.sha256(b"source").hexdigest()
    assert sorted(p.name for p in (out / "list").iterdir()) == [
        ".lock", "00000.parquet", "00001.parquet", "00002.parquet", "index.json", "rejected.tsv",
    ]  # fmt: skip


def test_extra_columns(tmp_path):
    rows = [
        Row(0, "http://a/0", "c", b"", ("17", None)),
        Row(1, "http://a/1", "c", b"", ("18", "by")),
    ]
    index = build(tmp_path / "d", rows, extra_columns=("photoid", "licenseurl"))
    table = read_table(tmp_path / "d")
    assert (
        table.column_names == index["columns"] == ["url", "caption", "row", "photoid", "licenseurl"]
    )
    assert table["row"].type == pa.int64()
    assert table["photoid"].to_pylist() == ["17", "18"]
    assert table["licenseurl"].to_pylist() == [None, "by"]


def test_no_usable_row(tmp_path):
    with pytest.raises(DataError, match=r"d\.tsv: no usable row: .*missing url.*2"):
        build(tmp_path / "d", [Row(0, "", "a", b""), Row(1, "", "b", b"")])
    assert not (tmp_path / "d/list/index.json").exists()
    assert build(tmp_path / "d", make_rows(3))["rows"] == 3


def test_shard_size_is_checked(tmp_path):
    with pytest.raises(ConfigError, match="--samples-per-shard 0"):
        build(tmp_path / "d", make_rows(3), size=0)


def test_describe(tmp_path):
    rows = [*make_rows(25), Row(30, "", "x", b""), Row(31, "http://host/1.jpg", "caption 1", b"")]
    text = url_list.describe(build(tmp_path / "d", rows), 1, 2)
    assert "d.tsv: 25 rows to download" in text
    assert "rejected, missing url: 1" in text
    assert "same url and caption as an earlier row: 1" in text
    assert "3 shards of 10 rows; part 1 of 2 has 1 of them" in text


# --- again, another list, races, kills ------------------------------------------------------


def test_same_list_is_reused(tmp_path):
    first = build(tmp_path / "d", make_rows(30))
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "d/list").glob("*[!k]")}

    def never(notes):
        raise AssertionError("read again")

    again = url_list.build(tmp_path / "d", never, [tmp_path / "d.tsv"], {"a": 1}, 10)
    assert again == first
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "d/list").glob("*[!k]")}


@pytest.mark.parametrize("what", ["input", "parameters", "size", "columns"])
def test_other_list_is_refused_naming_both(tmp_path, what):
    out, path, other = tmp_path / "d", tmp_path / "d.tsv", tmp_path / "other.tsv"
    build(out, make_rows(30))
    other.write_bytes(b"another")
    shas = [hashlib.sha256(text).hexdigest() for text in (b"source", b"another")]
    arguments = {
        "input": ([other], {"a": 1}, 10, ()),
        "parameters": ([path], {"a": 2}, 10, ()),
        "size": ([path], {"a": 1}, 11, ()),
        "columns": ([path], {"a": 1}, 10, ("photoid",)),
    }[what]
    named = {
        "input": [*shas, "d.tsv", "other.tsv"],
        "parameters": ["a: 1 there, 2 now"],
        "size": ["samples_per_shard: 10 there, 11 now"],
        "columns": ["'row'] there", "'photoid'] now"],
    }[what]
    with pytest.raises(DataError) as caught:
        url_list.build(out, lambda notes: make_rows(3), *arguments)
    assert all(text in str(caught.value) for text in named), caught.value
    assert read_table(out).num_rows == 30


def test_input_with_new_content_of_equal_size_is_noticed(tmp_path):
    build(tmp_path / "d", make_rows(3))
    (tmp_path / "d.tsv").write_bytes(b"SOURCE")
    with pytest.raises(DataError, match=r"made from d\.tsv, now asked for d\.tsv"):
        build(tmp_path / "d", make_rows(3))


def test_input_that_grows_while_it_is_read(tmp_path):
    def grow(notes):
        yield from make_rows(3)
        with open(tmp_path / "d.tsv", "ab") as file:
            file.write(b"more")

    (tmp_path / "d.tsv").write_bytes(b"source")
    with pytest.raises(DataError, match="changed while it was read"):
        url_list.build(tmp_path / "d", grow, [tmp_path / "d.tsv"], {}, 10)
    assert not (tmp_path / "d/list/index.json").exists()


def test_known_files_are_not_hashed_again(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"x")
    [entry] = identify([path])
    assert entry["sha256"] == hashlib.sha256(b"x").hexdigest()
    assert identify([path], [entry | {"sha256": "stated"}])[0]["sha256"] == "stated"
    assert identify([path], [entry | {"bytes": 2, "sha256": "stated"}])[0] == entry


def test_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/thesis.tex").touch()
    with pytest.raises(DataError, match=r"not empty \(thesis.tex\)"):
        build(tmp_path / "d", make_rows(3))
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["thesis.tex"]


def test_missing_or_damaged_list(tmp_path):
    out = tmp_path / "d"
    with pytest.raises(DataError, match="the list is not built"):
        url_list.read_index(out)
    build(out, make_rows(3))
    (out / "list/00000.parquet").rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"00000\.parquet are gone"):
        url_list.read_index(out)
    (out / "list/index.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        build(out, make_rows(3))
