"""Tars that attack: refused by name, or a counted bad sample; nothing else is lost or written."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from loaders import tarreader
from loaders.batch import BadSampleCounter, TripletDataset
from loaders.errors import DataError, TooManyBadSamples
from loaders.labels import LabelSpace
from loaders.manifest import OversizedMember, open_shards
from loaders.printable import printable
from loaders.texts import TextOptions
from loaders.views import build_eval
from tests.hostile.parts import END, good_sample, header, member, padded, pax, raw_pax
from tests.loaders.conftest import encoded, sample, write_tar

ROOT = Path(__file__).parents[2]
GB10 = 10 * 2**30
LINKS = (b"1", b"2", b"3", b"4", b"6")  # hard and symbolic link, devices, pipe


def write(path: Path, *parts: bytes, end: bytes = END) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(parts) + end)
    return path


def limited(code: str, *arguments: object, more: int = 600 << 20) -> str:
    """Output of `code` in a process that may reserve `more` bytes beyond its imports."""
    start = "import sys, numpy\nfrom loaders import manifest, tarreader\n"
    start += "from loaders.errors import DataError\nfrom tests.hostile.parts import limit_memory\n"
    start += f"limit_memory({more})\n"
    done = subprocess.run(
        [sys.executable, "-c", start + code, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


OUTSIDE = [b"/etc/cron.d/x.jpg", b"../x.jpg", b"a/../../x.jpg", b"a/..", b"/../x.jpg"]


@pytest.mark.parametrize("way", ["ustar", "prefix", "pax", "gnu"])
@pytest.mark.parametrize("name", OUTSIDE, ids=lambda n: n.decode())
def test_names_that_leave_the_archive_are_refused_however_they_are_written(tmp_path, name, way):
    data = encoded(0)
    if way == "ustar":
        attack = member(name, data)
    elif way == "prefix":
        front, _, back = name.rpartition(b"/")
        attack = member(back, data, at345=front or b"/")
    elif way == "pax":
        attack = pax((b"path", name)) + member(b"innocent.jpg", data)
    else:
        attack = header(b"././@LongLink", len(name) + 1, b"L") + padded(name + b"\0")
        attack += member(b"innocent.jpg", data)
    with pytest.raises(DataError, match=r"a\.tar: member name '.*' leaves the archive"):
        tarreader.open_index(write(tmp_path / "set" / "a.tar", good_sample(), attack))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "set"]


@pytest.mark.parametrize("kind", LINKS)
def test_links_and_devices_are_neither_followed_nor_made(tmp_path, kind):
    """Also where the image of a sample is a link to a file of this machine, or to a later one."""
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(encoded(7))
    link = header(b"stolen.jpg", 0, kind, at157=os.fsencode(secret))
    zero = header(b"zero.jpg", 0, kind, at157=b"../../../dev/zero", at329=b"0000001\0")
    tail = member(b"stolen.txt", b"caption")
    path = write(tmp_path / "set" / "a.tar", link, tail, zero, good_sample())
    shards = open_shards(path)
    assert [shards.key(i) for i in range(2)] == ["stolen", "good"]
    with pytest.raises(LookupError):
        shards.read_image(0)
    assert shards.read_image(1) == encoded(1)
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [".index", "a.tar"]


def test_links_that_claim_data_do_not_hide_the_members_after_them(tmp_path):
    """As in tarfile and GNU tar, links and directories have no data whatever their size says."""
    parts = [header(b"l%s.jpg" % kind, 4096, kind) for kind in (*LINKS, b"5")]
    path = write(tmp_path / "a.tar", *parts, good_sample())
    assert [m.name for m in tarreader.iterate_members(path)] == ["good.jpg", "good.txt"]
    with tarfile.open(path) as tar:
        assert [m.name for m in tar.getmembers() if m.isreg()] == ["good.jpg", "good.txt"]


def sparse_headers() -> dict[str, bytes]:
    data = encoded(0)
    one = pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"))
    old = pax((b"GNU.sparse.size", b"%d" % GB10), (b"GNU.sparse.numblocks", b"0"))
    gnu = header(b"k.jpg", len(data), b"S", at257=b"ustar  \0", at483=b"%011o\0" % GB10)
    everywhere = pax((b"GNU.sparse.map", b"0,1"), kind=b"g")
    return {
        "pax 1.0": one + member(b"k.jpg", data),
        "pax 0.0": old + member(b"k.jpg", data),
        "pax global": everywhere + member(b"k.jpg", data),
        "gnu": gnu + padded(data),
    }


@pytest.mark.parametrize("form", sparse_headers())
def test_sparse_members_are_refused(tmp_path, form):
    path = write(tmp_path / "a.tar", good_sample(), sparse_headers()[form])
    with pytest.raises(DataError, match=r"a\.tar: member 'k\.jpg'.*sparse.*plain files"):
        tarreader.open_index(path)


SIZES = {
    "octal": header(b"k.jpg", b"%012o" % (8**11 * 9 // 10)),
    "base 256": header(b"k.jpg", b"\x80" + GB10.to_bytes(11, "big")),
    "largest base 256": header(b"k.jpg", b"\xfe" + b"\xff" * 11),
    "pax": pax((b"size", b"%d" % GB10)) + member(b"k.jpg", encoded(0)),
    "pax global": pax((b"size", b"%d" % GB10), kind=b"g") + member(b"k.jpg", encoded(0)),
    "long name": header(b"././@LongLink", GB10 % 8**11, b"L"),
    "pax header": header(b"PaxHeaders/0", b"\x80" + GB10.to_bytes(11, "big"), b"x"),
}


@pytest.mark.parametrize("where", SIZES)
def test_a_size_beyond_the_end_of_a_short_file_is_no_sample(tmp_path, where):
    path = write(tmp_path / "a.tar", good_sample(), SIZES[where])
    with pytest.raises(DataError, match=r"a\.tar: truncated: member '.*' \(sample '.*'\) ends at"):
        tarreader.open_index(path)


WRONG_SIZES = {
    "negative base 256": header(b"k.jpg", b"\xff" * 12),
    "negative octal": header(b"k.jpg", b"-0000000001\0"),
    "letters": header(b"k.jpg", b"0000000000x\0"),
    "not octal": header(b"k.jpg", b"00000000089\0"),
    "pax negative": pax((b"size", b"-1")) + header(),
    "pax letters": pax((b"size", b"0x10")) + header(),
    "pax endless": pax((b"size", b"9" * 5000)) + header(),
    "pax other digits": pax((b"size", "٣".encode())) + header(),
    "pax empty": pax((b"size", b"")) + header(),
}


@pytest.mark.parametrize("what", WRONG_SIZES)
def test_impossible_sizes_are_refused(tmp_path, what):
    path = write(tmp_path / "a.tar", good_sample(), WRONG_SIZES[what])
    with pytest.raises(DataError, match=r"a\.tar: member 'k\.jpg' states an impossible size"):
        tarreader.open_index(path)


def test_a_pax_size_overrules_the_header_for_one_member(tmp_path):
    """As in tarfile: the header says 0, the record says 1025, and the next header is found."""
    data = b"x" * 1025
    parts = [pax((b"size", b"1025")), header(b"big.txt"), padded(data), good_sample()]
    path = write(tmp_path / "a.tar", *parts)
    found = [(m.name, m.offset, m.size) for m in tarreader.iterate_members(path)]
    with tarfile.open(path) as tar:
        assert found == [(m.name, m.offset_data, m.size) for m in tar.getmembers()]
    assert found[0] == ("big.txt", 1536, 1025)


DAMAGED_PAX = {
    "length 0": b"0 path=x\n",
    "too short": b"5 path=x\n",
    "beyond the end": b"99 path=x\n",
    "no space": b"11path=xy\n",
    "no equals": b"11 path xyz\n",
    "no newline": b"9 path=xy",
    "endless length": b"1" * 5000 + b" path=x\n",
    "negative": b"-9 path=x\n",
}


@pytest.mark.parametrize("what", DAMAGED_PAX)
def test_damaged_pax_records_are_refused(tmp_path, what):
    path = write(tmp_path / "a.tar", raw_pax(DAMAGED_PAX[what]), good_sample())
    with pytest.raises(DataError, match=r"a\.tar: damaged pax record at byte 512"):
        tarreader.open_index(path)


def test_a_megabyte_of_tiny_pax_records_before_each_member_is_walked_in_linear_time(tmp_path):
    """200,000 records: copied and searched again for each, they would take hours."""
    body = b"5 a=\n" * 200_000
    shared = raw_pax(b"".join(b"13 k%07d=\n" % i for i in range(50_000)), b"g")
    parts = [part for i in range(2) for part in (raw_pax(body), member(b"%d.jpg" % i, b"x"))]
    many = [member(b"m%d.jpg" % i, b"") for i in range(3000)]
    path = write(tmp_path / "a.tar", shared, *parts, *many)
    code = "import signal; signal.alarm(60)\nprint(len(tarreader.build_index(sys.argv[1])))"
    assert limited(code, path) == "3002"


def test_checksums_are_compared(tmp_path):
    for offset, value in ((0, b"K"), (124, b"7"), (156, b"2"), (148, b"999999"), (148, b"\xff")):
        block = bytearray(header(b"k.jpg", 3))
        block[offset : offset + len(value)] = value
        path = write(tmp_path / "a.tar", good_sample(), bytes(block), padded(b"abc"))
        with pytest.raises(DataError, match=r"a\.tar: at byte \d+: header is damaged"):
            tarreader.build_index(path)


@pytest.mark.parametrize("way", ["pax", "gnu"])
def test_a_name_of_a_megabyte_costs_no_memory_for_every_sample(tmp_path, way):
    """One long key would widen each row of the index: 4,000 rows of 1 MB are 4 GB."""
    name = b"n" * (1_000_000) + b".jpg"
    if way == "pax":
        long = pax((b"path", name))
    else:
        long = header(b"././@LongLink", len(name) + 1, b"L") + padded(name + b"\0")
    many = [member(b"m%d.jpg" % i, b"") for i in range(4000)]
    path = write(tmp_path / "a.tar", *many, long, member(b"k.jpg", encoded(0)))
    code = "try: tarreader.build_index(sys.argv[1])\nexcept DataError as error: print(error)"
    message = limited(code, path)
    assert "a.tar: member name 'nnnn" in message
    assert "4096" in message
    assert len(message) < 600
    far = header(b"././@LongLink", 2 << 20, b"L") + bytes(2 << 20)
    with pytest.raises(DataError, match="long-name record of 2097152 bytes"):
        tarreader.build_index(write(tmp_path / "b.tar", far, good_sample()))


ODD_NAMES = [
    b"\xff\xfe\x80",
    b"\x1b[2J\x1b]0;owned\x07",
    "‮gpj".encode(),
    b"a\rb",
    b"two\nlines",
    b"q'\"",
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=repr)
def test_names_that_are_no_text_are_read_and_shown_as_escapes(tmp_path, name):
    parts = [member(name + b".jpg", encoded(3)), pax((b"path", name + b"2.jpg")), header(b"x")]
    path = write(tmp_path / "a.tar", *parts, good_sample())
    shards = open_shards(path)
    assert [os.fsencode(shards.key(i)) for i in range(3)] == [name, name + b"2", b"good"]
    assert shards.read_image(0) == encoded(3)
    broken = write(tmp_path / "b.tar", *parts, *parts)
    with pytest.raises(DataError) as caught:
        open_shards(broken)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_zero_byte_in_a_name_is_refused(tmp_path):
    """The index pads keys with zero bytes: two names would become one."""
    attack = pax((b"path", b"good\0.jpg")) + member(b"x", encoded(0))
    with pytest.raises(DataError, match=r"a\.tar: member name 'good\\x00\.jpg' holds a zero byte"):
        tarreader.build_index(write(tmp_path / "a.tar", good_sample(), attack))


def test_equal_keys_in_one_tar_are_refused_and_over_tars_are_two_samples(tmp_path):
    one = write(tmp_path / "set" / "0.tar", good_sample(jpg=encoded(1)))
    write(tmp_path / "set" / "1.tar", good_sample(jpg=encoded(2)))
    shards = open_shards(one.parent)
    assert [shards.key(i) for i in range(2)] == ["good", "good"]
    assert [shards.read_image(i) for i in range(2)] == [encoded(1), encoded(2)]
    with pytest.raises(DataError, match=r"two\.tar: sample key 'good' occurs twice"):
        open_shards(write(tmp_path / "two.tar", good_sample(), good_sample(b"b"), good_sample()))
    twice = [member(b"k.jpg", encoded(1)), member(b"k.JPG", encoded(2))]
    with pytest.raises(DataError, match=r"a\.tar: sample 'k' has two members '\.jpg'"):
        open_shards(write(tmp_path / "a.tar", *twice))


def with_hole(path: Path, name: bytes, *after: bytes) -> Path:
    """A real tar with a member of 10 GB that occupies no space: a hole in the file."""
    start = good_sample() + header(name, b"\x80" + GB10.to_bytes(11, "big"))
    path.write_bytes(start)
    os.truncate(path, len(start) + GB10)
    with path.open("ab") as file:
        file.write(b"".join(after) + END)
    return path


def test_members_of_ten_gigabytes_that_are_there_are_not_read_into_memory(tmp_path):
    """A file with holes is as long as it says; the sample is bad, those around it are good."""
    ends = ("jpg", "txt", "json", "cls")
    paths = [with_hole(tmp_path / f"{e}.tar", f"k.{e}".encode(), good_sample(b"z")) for e in ends]
    code = """
for path in sys.argv[1:]:
    try:
        shards = manifest.open_shards(path, "image_text")
    except DataError as error:
        print(error)
        continue
    found = [len(shards), len(shards.read_image(2)), shards.read_text(2)]
    for read in (shards.read_image, shards.read_text, shards.read_json):
        try: read(1)
        except manifest.OversizedMember as error: found.append(error.reason)
        except manifest.MissingMember: pass
    print(*found)
"""
    *lines, last = limited(code, *paths).splitlines()
    assert lines == [f"3 {len(encoded(1))} a caption member_too_large"] * 3
    assert "cls.tar: sample 'k': .cls must hold one class number" in last


def test_a_stored_index_that_lies_is_made_again(tmp_path):
    """`.index` may have come with the tars: offsets outside, huge sizes, other columns, pickles."""
    path = write(tmp_path / "a.tar", good_sample())
    good = np.array(tarreader.open_index(path))
    stored = next((tmp_path / ".index").iterdir())
    lies = []
    for column, value in (
        ("image_offset", -7), ("image_offset", 10**9), ("image_size", GB10),
        ("text_size", 2**63 - 1), ("json_offset", -(2**63)), ("text_offset", -1),
    ):  # fmt: skip
        lie = good.copy()
        lie[column] = value
        lies.append(lie)
    lies += [good[["key", "label"]], np.zeros(3), np.array([{"a": 1}], object), good.reshape(1, 1)]
    for lie in lies:
        np.save(stored, lie, allow_pickle=True)
        assert np.array_equal(tarreader.open_index(path), good), lie


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, kind):
    path = tmp_path / "0.tar"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    for read in (tarreader.build_index, tarreader.open_index, open_shards):
        with pytest.raises(DataError, match=r"0\.tar|neither"):
            read(path)
    with pytest.raises(DataError, match=r"0\.tar"):
        open_shards(tmp_path)


def test_a_json_nested_too_deeply_is_a_bad_sample(tmp_path):
    deep = b'{"label": ' + b"[" * 200_000
    path = write_tar(tmp_path / "a.tar", sample("a", json=deep) + sample("b", json=b"{}"))
    shards = open_shards(path)
    assert shards.labels.tolist() == [-1, -1]
    with pytest.raises(ValueError, match="deep"):
        shards.read_json(0)


def test_training_counts_hostile_samples_and_goes_on(tmp_path):
    """All kinds in one tar, around good samples: each costs itself, and the report is printable."""
    evil = b"\x1b[31mevil\xff"
    parts = [
        member(evil + b".jpg", b"no image"), member(evil + b".txt", b"caption"),
        header(b"link.jpg", 0, b"2", at157=b"/etc/passwd"), member(b"link.txt", b"caption"),
        member(b"latin.jpg", encoded(4)), member(b"latin.txt", b"\xff\xfe"),
        *(good_sample(b"g%d" % i) for i in range(6)),
    ]  # fmt: skip
    path = tmp_path / "a.tar"
    write(path, *parts)
    shards = open_shards(path)
    options = TextOptions(["a {}"])
    view = build_eval(16, 16)
    tokens = lambda texts: torch.zeros((len(texts), 2), dtype=torch.int64)  # noqa: E731
    dataset = TripletDataset([shards], LabelSpace([shards]), [view], options, tokens, seed=0)
    counter = BadSampleCounter(max_fraction=0.1, min_samples=1)
    for i in range(len(shards)):
        found = dataset[0, i, i]
        assert found["uid"] >= 3
        counter.update(found["bad"], 1)
    reasons = {reason for _, reason in counter.counts}
    assert reasons == {"not_an_image", "no_image", "caption_not_utf8"}
    with pytest.raises(TooManyBadSamples) as caught:
        counter.check(counter.bad, counter.seen)
    text = printable(str(caught.value))
    assert "\\x1b[31mevil" in text
    assert "\x1b" not in text
    io.StringIO().write(text)
    text.encode()


def test_a_tar_cut_after_indexing_names_shard_and_key(tmp_path):
    path = write(tmp_path / "a.tar", good_sample(b"a"), good_sample(b"\x1bb"))
    shards = open_shards(path)
    shards.read_image(0)
    os.truncate(path, 700)
    with pytest.raises(DataError, match=r"a\.tar: shorter.*found at sample '\\x1bb'"):
        shards.read_image(1)


def test_an_oversized_image_is_a_missing_one_to_callers_that_know_no_better():
    assert OversizedMember("x").reason == "member_too_large"
    assert isinstance(OversizedMember("x"), LookupError)
