"""Conceptual Captions lists: the two column orders, every kind of bad line, the command line."""

import bz2
import gzip
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import gcc
from data_prep.download import url_list
from data_prep.download.list_rows import Notes, Rejected, Row
from data_prep.sets import set_folder
from loaders.errors import DataError
from tests.data_prep.list_parts import read_rejected

SCRIPT = Path(gcc.__file__)


def write_list(path: Path, pairs, url_first: bool, end: str = "\n") -> Path:
    """A list in the layout of GCC-12M (`url_first`) or of GCC-3M."""
    lines = [(u, c) if url_first else (c, u) for u, c in pairs]
    path.write_bytes("".join("\t".join(line) + end for line in lines).encode())
    return path


def make_pairs(count: int, first: int = 0) -> list[tuple[str, str]]:
    return [(f"http://host/{i}.jpg", f"caption {i}") for i in range(first, first + count)]


def build(out: Path, path: Path, url_first: bool, size: int = 10) -> dict:
    def read(notes):
        return gcc.read_pairs([path], url_first, notes)

    return url_list.build(out, read, [path], {}, size)


def read_table(out: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(p) for p in sorted((out / "list").glob("*.parquet")))


ANY_CAPTION = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n")).filter(
    lambda text: text.strip()
)


@pytest.mark.parametrize("url_first", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@settings(max_examples=30, deadline=None)
@given(captions=st.lists(ANY_CAPTION, max_size=5))
def test_any_caption_survives(tmp_path_factory, url_first, end, captions):
    """Exactly: quotes, commas, backslashes, odd line separators and blanks at the ends."""
    if url_first and end == "\n":  # a carriage return at the end of a line belongs to the line end
        captions = [text.removesuffix("\r") for text in captions]
        captions = [text for text in captions if text.strip()]
    captions = ['"begins with a quote', *captions, '"', 'a""b', "'", "a\\tb"]
    pairs = [(f"http://host/{i}", caption) for i, caption in enumerate(captions)]
    home = tmp_path_factory.mktemp("any")
    path = write_list(home / "list.tsv", pairs, url_first, end)
    index = build(home / "d", path, url_first)
    table = read_table(home / "d")
    assert table["caption"].to_pylist() == captions
    assert table["url"].to_pylist() == [url for url, _ in pairs]
    assert table["row"].to_pylist() == list(range(len(pairs)))
    assert index["rejected"] == index["notes"] == {}


def test_bad_lines_lose_no_good_ones(tmp_path):
    """Line by line; good lines stand between all of them."""
    good, bad = "http://host/{}.jpg", Rejected
    cases: list[tuple[bytes, object]] = [
        (b"", bad(0, "blank line", b"")),
        (b"only a caption", bad(0, "one column only", b"only a caption")),
        (b"http://host/x.jpg", bad(0, "one column only", b"http://host/x.jpg")),
        (b"c\xff\thttp://host/x", bad(0, "not UTF-8", b"c\xff\thttp://host/x")),
        (b"c\thttp://host/\xe4", bad(0, "not UTF-8", b"c\thttp://host/\xe4")),
        (b"caption\t", bad(0, "missing url", b"caption\t")),
        (b"  \thttp://host/x", bad(0, "empty caption", b"  \thttp://host/x")),
        (b"\thttp://host/x", bad(0, "empty caption", b"\thttp://host/x")),
        (b"c\tfile:///etc/passwd", bad(0, "scheme is not http or https", b"c\tfile:///etc/passwd")),
        (b"c\tftp://host/x", bad(0, "scheme is not http or https", b"c\tftp://host/x")),
        (b"http://host/x\tother order", bad(0, "not a url", b"http://host/x\tother order")),
        (b"a\tb\thttp://host/tab", ("http://host/tab", "a b")),
        (b"\ta\t\tb\thttp://host/tabs\t", ("http://host/tabs", "a  b")),
        (b'"a\tb" c\thttp://host/quoted tab', ("http://host/quoted%20tab", '"a b" c')),
        ("ü\thttp://host/ü".encode(), ("http://host/%C3%BC", "ü")),
        (b"caption\turl", None),
        (b"URL\tCaption", None),
    ]
    lines, kept, rejected = [], [], []
    for line, wanted in cases:
        kept.append((good.format(len(lines)), "good", len(lines)))
        lines.append(b"good\t" + kept[-1][0].encode())
        if isinstance(wanted, Rejected):
            rejected.append(wanted._replace(row=len(lines)))
        elif wanted:
            kept.append((*wanted, len(lines)))
        lines.append(line)
    path = tmp_path / "list.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    index = build(tmp_path / "d", path, False)
    columns = ("url", "caption", "row")
    assert read_table(tmp_path / "d").to_pylist() == [
        dict(zip(columns, row, strict=True)) for row in kept
    ]
    assert [Rejected(*fields) for fields in read_rejected(tmp_path / "d")] == rejected
    assert sum(index["rejected"].values()) == len(rejected)
    assert index["notes"] == {
        "captions with a tab, now a blank": 3,
        "header lines skipped": 2,
        "urls percent-encoded": 2,
    }


def test_tabs_with_the_url_in_front(tmp_path):
    path = tmp_path / "list.tsv"
    path.write_bytes(b'http://host/1\ta\tb\nhttp://host/2\t"x\t\n')
    assert list(gcc.read_pairs([path], True, Notes())) == [
        Row(0, "http://host/1", "a b", b"http://host/1\ta\tb"),
        Row(1, "http://host/2", '"x', b'http://host/2\t"x\t'),
    ]


def test_header_is_named(tmp_path, capsys):
    path = tmp_path / "list.tsv"
    path.write_bytes(b"caption\turl\nc\thttp://host/1\n")
    assert len(list(gcc.read_pairs([path], False, Notes()))) == 1
    assert "line 1: a header (caption\turl), skipped" in capsys.readouterr().err


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress])
def test_packed_list_gives_the_same_files(tmp_path, pack):
    plain = write_list(tmp_path / "plain.tsv", make_pairs(3000), True)
    (tmp_path / "packed").write_bytes(pack(plain.read_bytes()))
    assert gcc.find_order(tmp_path / "packed")
    build(tmp_path / "d", plain, True)
    build(tmp_path / "e", tmp_path / "packed", True)
    assert url_list.digest(tmp_path / "d") == url_list.digest(tmp_path / "e")


@pytest.mark.parametrize("url_first", [False, True])
@pytest.mark.parametrize("captions", ["plain", "http://in.a/caption or file://x"])
def test_order_is_found(tmp_path, url_first, captions):
    """Also when captions look like urls, a row is turned round, lines are bad, with a header."""
    pairs = make_pairs(20)
    pairs[3] = (pairs[3][0], captions)
    pairs[0] = pairs[0][::-1]
    path = write_list(tmp_path / "list.tsv", pairs, url_first, "\r\n")
    path.write_bytes(b"url\tcaption\n\n\xff\n" + path.read_bytes())
    assert gcc.find_order(path) is url_first
    key = "gcc12m" if url_first else "gcc3m"
    assert gcc.find_dataset([path], None) == key
    assert gcc.find_dataset([path], key) == key


def test_wrong_order_is_named(tmp_path):
    path = write_list(tmp_path / "list.tsv", make_pairs(5), True)
    with pytest.raises(DataError, match=r"url, caption: this is the order of GCC-12M, but GCC-3M"):
        gcc.find_dataset([path], "gcc3m")
    path = write_list(tmp_path / "list.tsv", make_pairs(5), False)
    with pytest.raises(DataError, match=r"caption, url: this is the order of GCC-3M.*gcc3m for it"):
        gcc.find_dataset([path], "gcc12m")


def test_files_of_both_orders(tmp_path):
    paths = [write_list(tmp_path / f"{o}.tsv", make_pairs(5), o) for o in (False, True)]
    with pytest.raises(
        DataError, match=r"True\.tsv: .*GCC-12M, but GCC-3M is that of .*False\.tsv"
    ):
        gcc.find_dataset(paths, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"http://host/1\t5f0a\t9bcd", "3 of the first 3 lines have more than two columns"),
        (b"caption\tlabels", "neither column holds the urls"),
        (b"http://a/1\thttp://b/1", "neither column holds the urls"),
        (b"no tab at all", "neither column holds the urls in the first 0 lines"),
        (b"\x00\x01\xff", "neither column holds the urls in the first 0 lines"),
    ],
)
def test_other_files_are_refused(tmp_path, line, message):
    (tmp_path / "list.tsv").write_bytes((line + b"\n") * 3)
    with pytest.raises(DataError, match=message):
        gcc.find_dataset([tmp_path / "list.tsv"], None)


def test_rows_run_on_over_files(tmp_path):
    paths = [
        write_list(tmp_path / "1.tsv", make_pairs(3), False),
        write_list(tmp_path / "2.tsv", make_pairs(3, first=3), False),
    ]
    rows = list(gcc.read_pairs(paths, False, Notes()))
    assert [(row.row, row.url) for row in rows] == [(i, f"http://host/{i}.jpg") for i in range(6)]


def test_byte_order_marks_and_empty_lines_at_the_end_are_no_rows(tmp_path):
    """Of each file; rejected lines are named as an editor does."""
    paths = [tmp_path / "1.tsv", tmp_path / "2.tsv"]
    paths[0].write_bytes("\ufeffa\thttp://host/1\r\n\r\nbad\r\n\r\n\r\n".encode())
    paths[1].write_bytes("\ufeffcaption\turl\nbad\n\ufeffb\thttp://host/2\n\n".encode())
    index = url_list.build(
        tmp_path / "d", lambda notes: gcc.read_pairs(paths, False, notes), paths, {}, 10
    )
    table = read_table(tmp_path / "d")
    assert table["caption"].to_pylist() == ["a", "\ufeffb"]
    assert table["row"].to_pylist() == [0, 7]
    assert index["rejected"] == {"one column only": 2, "blank line": 1}
    assert (tmp_path / "d/list/rejected.tsv").read_text().splitlines() == [
        "line\treason\ttext",
        f"{paths[0]}:2\tblank line\t",
        f"{paths[0]}:3\tone column only\tbad",
        f"{paths[1]}:2\tone column only\tbad",
    ]


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def test_command_line_refuses_the_wrong_list(tmp_path):
    path = write_list(tmp_path / "list.tsv", make_pairs(5), True)
    result = run("--tsv", path, "--dataset", "gcc3m", "--out", tmp_path / "d")
    assert result.returncode == 3
    assert "use --dataset gcc12m" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "d").exists()


def test_command_line_begins_the_set_and_names_the_plan(tmp_path):
    """As the task of an array that has no shard of its own, so nothing is downloaded."""
    pairs = make_pairs(7)
    path = write_list(tmp_path / "list.tsv", [*pairs, ("ftp://host/x", "c"), pairs[0]], False)
    out = tmp_path / "d"
    result = run("--tsv", path, "--out", out, "--samples-per-shard", 7, "--part", 1, "--parts", 2)
    assert result.returncode == 0, result.stderr
    assert f"{path}: columns caption, url, the order of GCC-3M" in result.stdout
    assert "list.tsv: 7 rows to download" in result.stdout
    assert "rejected, scheme is not http or https: 1" in result.stdout
    assert "dropped, same url and caption as an earlier row: 1" in result.stdout
    assert "1 shards of 7 rows; part 1 of 2 has 0 of them" in result.stdout
    assert result.stdout.endswith(f"next: python data_prep/verify.py {out}\n")
    preparation = set_folder.load(out)
    assert (preparation.name, preparation.kind) == ("gcc3m", "image_text")
    assert (preparation.shards, preparation.attempted) == (1, 7)
    assert preparation.identity["list_sha256"] == url_list.digest(out)
    assert preparation.extra["list"]["duplicates"] == 1

    other = write_list(tmp_path / "other.tsv", make_pairs(5), False)
    result = run("--tsv", other, "--out", out, "--samples-per-shard", 7)
    assert result.returncode == 3
    assert "made from list.tsv, now asked for other.tsv" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--part", 2, "--parts", 2], "parts are numbered 0 to 1"),
        (["--samples-per-shard", 0], "must be at least 1"),
    ],
)
def test_wrong_flags(tmp_path, flags, message):
    path = write_list(tmp_path / "list.tsv", make_pairs(5), True)
    result = run("--tsv", path, "--out", tmp_path / "d", *flags)
    assert result.returncode == 2
    assert message in result.stderr
