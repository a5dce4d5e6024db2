"""YFCC lists: the join with the metadata in both forms, captions, the three lists, a real run."""

import bz2
import gzip
import hashlib
import io
import json
import pickle
import random
import re
import sqlite3
import subprocess
import sys
import tarfile
import urllib.parse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import folder, url_list, yfcc, yfcc_metadata
from data_prep.list_rows import WEB, Notes
from data_prep.yfcc_metadata import clean, join_caption, photo_hash
from loaders.errors import ConfigError, DataError

SCRIPT = Path(yfcc.__file__)
# fmt: off
COLUMNS = [
    "photoid", "uid", "unickname", "datetaken", "dateuploaded", "capturedevice",
    "title", "description", "usertags", "machinetags", "longitude", "latitude",
    "accuracy", "pageurl", "downloadurl", "licensename", "licenseurl", "serverid",
    "farmid", "secret", "secretoriginal", "ext", "marker",
]
# fmt: on
LICENSE = "http://creativecommons.org/licenses/by/2.0/"


def make_photo(photo_id: int, title: str = "", description: str = "", marker: str = "0") -> dict:
    """A row of the metadata with its texts encoded as they are published."""
    photo = dict.fromkeys(COLUMNS, "")
    url = f"http://farm2.staticflickr.com/1436/{photo_id}_6e440ad92f.jpg"
    return photo | {
        "photoid": str(photo_id),
        "title": urllib.parse.quote_plus(title),
        "description": urllib.parse.quote_plus(description),
        "downloadurl": url,
        "licenseurl": LICENSE,
        "marker": marker,
    }


def make_photos(count: int) -> list[dict]:
    """Photos with ids in no order; every third has no title, every fifth no description."""
    draw = random.Random(0)
    ids = draw.sample(range(1, 10**10), count)
    return [
        make_photo(
            photo_id,
            "" if i % 3 == 2 else f"<b>Title</b> {i}\n& more, 100%",
            "" if i % 5 == 4 else f"Über {i}  http://x.org/a?b see\twww.y.org",
        )
        for i, photo_id in enumerate(ids)
    ]


def write_sqlite(path: Path, photos, kind: str = "INTEGER") -> Path:
    database = sqlite3.connect(path)
    types = ", ".join(f"{name} {kind if name == 'photoid' else 'TEXT'}" for name in COLUMNS)
    database.execute(f"CREATE TABLE yfcc100m_dataset ({types})")
    marks = ", ".join("?" * len(COLUMNS))
    rows = [tuple(photo[name] for name in COLUMNS) for photo in photos]
    database.executemany(f"INSERT INTO yfcc100m_dataset VALUES ({marks})", rows)
    database.commit()
    database.close()
    return path


def tsv_line(number: int, photo: dict) -> bytes:
    values = [photo[name] for name in COLUMNS]
    fields = [str(number), values[0], photo_hash(photo["downloadurl"]), *values[1:]]
    assert len(fields) == 25
    return "\t".join(fields).encode()


def write_tsv(path: Path, photos, pack=bytes) -> Path:
    path.write_bytes(pack(b"".join(tsv_line(i, p) + b"\n" for i, p in enumerate(photos))))
    return path


def write_ids(path: Path, photos, numbers, pack=bytes) -> Path:
    """A list like OpenAI's of the photos `numbers`: line number, photo id, hash."""
    lines = [b"\t".join(tsv_line(i, photos[i]).split(b"\t")[:3]) + b"\n" for i in numbers]
    path.write_bytes(pack(b"".join(lines)))
    return path


def make_job(ids: Path, m: Path | None, expected: int, **changes) -> yfcc.Job:
    fields = {
        "list_name": "openai",
        "ids": ids,
        "unique_ids": None,
        "metadata": m,
        "captions": "title_description",
        "images": "bucket",
        "expected": expected,
    }
    return yfcc.Job(**fields | changes)


def build(out: Path, job: yfcc.Job, read=yfcc.read_metadata_rows) -> tuple[list[dict], dict]:
    """Rows and index of a list."""
    index = url_list.build(
        out,
        lambda notes: read(job, notes),
        job.inputs,
        {"list": job.list_name, "captions": job.captions, "images": job.images},
        10,
        yfcc.EXTRA_COLUMNS,
        WEB if job.local_root is None else ("file",),
    )
    files = sorted((out / "list").glob("*.parquet"))
    return pa.concat_tables(pq.read_table(path) for path in files).to_pylist(), index


# --- texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("published", "wanted"),
    [
        ("Banana+Penguin", "Banana Penguin"),  # a real row of the metadata
        ("Note+the+egg.", "Note the egg."),
        ("C%2B%2B+%26+C", "C++ & C"),
        ("%C3%9Cber+100%25", "Über 100%"),
        ("100% real", "100% real"),
        ("a%0Ab%09c++d%0D%0A+", "a b c d"),
        ("<a+href=%22http://x.org%22+rel=%22nofollow%22>a+link</a>", "a link"),
        ("<B>bold</B>+<i>i</i><br+/>+x", "bold i x"),
        ("I+<3+you+and+2+>+1", "I <3 you and 2 > 1"),
        ("see+http://x.org/a?b=c,+HTTPS://y.org/+www.z.org+now", "see now"),
        ("awww+http+stays", "awww http stays"),
        ("http://x.org", ""),
        ("%FF", "\ufffd"),
    ],
)
def test_clean(published, wanted):
    assert clean(published) == wanted


@given(st.text())
def test_clean_text_is_one_line_without_double_blanks(text):
    cleaned = clean(urllib.parse.quote_plus(text, errors="replace"))
    assert cleaned == " ".join(cleaned.split())
    assert not re.search(r"https?://\S", cleaned) or "<" in text


@given(st.text(st.characters(categories=["L", "N", "P"], exclude_characters="<>:.")))
@settings(deadline=None)
def test_plain_text_survives_its_encoding(text):
    assert clean(urllib.parse.quote_plus(text)) == " ".join(text.split())


def test_caption_rules():
    assert join_caption("t", "d", "title", 1) == "t"
    assert join_caption("", "d", "title", 1) == ""
    assert join_caption("t", "d", "description", 1) == "d"
    assert join_caption("t", "d", "title_description", 1) == "t. d"
    assert join_caption("t", "", "title_description", 1) == "t"
    assert join_caption("", "d", "title_description", 1) == "d"
    assert join_caption("", "", "random", 1) == ""
    assert {join_caption("t", "", "random", i) for i in range(50)} == {"t"}
    assert {join_caption("", "d", "random", i) for i in range(50)} == {"d"}


def test_random_caption_is_fair_and_stays():
    draws = [join_caption("t", "d", "random", i) for i in range(10_000)]
    assert draws == [join_caption("t", "d", "random", i) for i in range(10_000)]
    assert abs(draws.count("t") - 5000) < 200  # 4 standard deviations


def test_photo_hash_of_a_published_photo():
    """Photo 1474437500: its row of the metadata and its name in PASS (yukimasano/PASS, issue 4)."""
    url = "http://farm2.staticflickr.com/1436/1474437500_6e440ad92f.jpg"
    assert photo_hash(url) == "d37c5aaffa6bd2992b576f6d88678d1"


# --- the join -------------------------------------------------------------------------------


def expected_rows(photos, numbers, rule: str, images: str) -> list[dict]:
    """The same list by plain Python, in the order of the metadata."""
    rows = []
    place = {number: row for row, number in enumerate(numbers)}
    for number, photo in enumerate(photos):
        texts = []
        for name in ("title", "description"):
            text = urllib.parse.unquote_plus(photo[name])
            text = re.sub("</?b>", "", text)
            text = re.sub(r"(http://x|www\.y)\S+", "", text)
            texts.append(" ".join(text.split()))
        caption = {
            "title": texts[0],
            "description": texts[1],
            "title_description": ". ".join(text for text in texts if text),
        }[rule]
        digest = photo_hash(photo["downloadurl"])
        url = {
            "bucket": "https://multimedia-commons.s3-us-west-2.amazonaws.com/data/images/"
            f"{digest[0:3]}/{digest[3:6]}/{digest}.jpg",
            "urls": photo["downloadurl"],
        }[images]
        if number in place and caption:
            row = {"url": url, "caption": caption, "row": place[number]}
            rows.append(row | {"photoid": photo["photoid"], "licenseurl": LICENSE})
    return rows


@pytest.mark.parametrize("rule", ["title", "description", "title_description"])
@pytest.mark.parametrize("images", ["bucket", "urls"])
def test_both_forms_of_metadata_give_the_same_rows(tmp_path, rule, images):
    photos = make_photos(300)
    numbers = random.Random(1).sample(range(300), 120)
    ids = write_ids(tmp_path / "ids.tsv.bz2", photos, numbers, bz2.compress)
    forms = [
        write_sqlite(tmp_path / "integer.sql", photos),
        write_sqlite(tmp_path / "text.sql", photos, "TEXT"),
        write_sqlite(tmp_path / "key.sql", photos, "TEXT PRIMARY KEY"),
        write_tsv(tmp_path / "plain", photos),
        write_tsv(tmp_path / "gz", photos, gzip.compress),
        write_tsv(tmp_path / "bz2", photos, bz2.compress),
    ]
    wanted = expected_rows(photos, numbers, rule, images)
    for path in forms:
        job = make_job(ids, path, 120, captions=rule, images=images)
        rows, index = build(tmp_path / f"{path.name}.d", job)
        assert rows == wanted, path
        empty = 120 - len(wanted)
        assert index["rejected"] == ({"empty caption": empty} if empty else {})
        assert index["notes"] == {}
        ordered = sorted(int(photos[i]["photoid"]) for i in numbers)
        text = "".join(f"{photo_id}\n" for photo_id in ordered).encode()
        assert index["facts"] == {
            "photos": 120,
            "ids": 120,
            "ids_sha256": hashlib.sha256(text).hexdigest(),
        }
    assert len({url_list.digest(tmp_path / f"{path.name}.d") for path in forms}) == 1


@pytest.mark.parametrize("form", ["sqlite", "tsv"])
def test_bad_rows_lose_no_good_ones(tmp_path, form):
    photos = make_photos(12)
    photos[2]["marker"] = "1"
    photos[3] |= {"title": "<b></b>", "description": "http%3A//x.org/"}
    numbers = [*range(10), 11]
    good = write_ids(tmp_path / "ids", photos, numbers).read_bytes().splitlines(keepends=True)
    bad = [b"line\tphotoid\thash\n", b"\n", b"1\t2\n", b"7\t8\tnot-hex\n", good[1]]
    (tmp_path / "ids").write_bytes(b"".join([bad[0], *good[:5], *bad[1:4], *good[5:], bad[4]]))
    stored = [*photos[:11], photos[4]]  # 11 is not there, 4 is there twice
    if form == "sqlite":
        path = write_sqlite(tmp_path / "m", stored)
        database = sqlite3.connect(path)
        for number, text in ((7, "x'ff'"), (6, "NULL")):
            command = "UPDATE yfcc100m_dataset SET title = CAST({} AS TEXT) WHERE photoid = ?"
            database.execute(command.format(text), (photos[number]["photoid"],))
        database.commit()
        database.close()
        reasons = {"not UTF-8": 1, "empty caption": 1}
    else:
        lines = [tsv_line(i, photo) for i, photo in enumerate(stored)]
        lines[7] = lines[7].replace(photos[7]["title"].encode(), b"\xff")
        lines[6] = lines[6].replace(b"\t" + photos[6]["title"].encode(), b"\t")
        lines[3] = lines[3].rpartition(b"\t")[0]
        lines[7:7] = [b"", b"1", b"1\tx\ty", b"\xff" * 10, b"1\t" + b"9" * 5000 + b"\t"]
        (tmp_path / "m").write_bytes(b"\n".join(lines))
        path = tmp_path / "m"
        reasons = {"not UTF-8": 1, "damaged line of the metadata": 1}
    rows, index = build(tmp_path / "d", make_job(tmp_path / "ids", path, 11))
    wanted_ids = [photos[i]["photoid"] for i in (0, 1, 4, 5, 6, 8, 9)]
    assert [row["photoid"] for row in rows] == wanted_ids
    assert [row["row"] for row in rows] == [1, 2, 5, 9, 10, 12, 13]
    assert rows[4]["caption"].startswith("Über 6")  # its title is missing
    assert index["rejected"] == reasons | {
        "not a line of the list": 4,
        "photo id again": 1,
        "a video": 1,
        "not in the metadata": 1,
    }
    assert index["notes"] == {"photos twice in the metadata, the first was taken": 1}
    rejected = (tmp_path / "d/list/rejected.tsv").read_text()
    assert f"14\tnot in the metadata\t{photos[11]['photoid']}\n" in rejected
    assert f"15\tphoto id again\t{photos[1]['photoid']}\n" in rejected


def test_join_over_batches(tmp_path):
    """More lines than one batch of look-ups, listed photos all over them."""
    lines = 50_000
    numbers = random.Random(2).sample(range(lines), 3000)
    photos = {i: make_photo(10**9 - i, f"title {i}") for i in range(lines)}
    ids = write_ids(tmp_path / "ids", photos, numbers)
    write_tsv(tmp_path / "m", photos.values())
    photo_list = yfcc_metadata.read_photos(ids, None, [])
    found = list(yfcc_metadata.join(tmp_path / "m", photo_list, Notes()))
    assert [clean(item.title) for item in found] == [f"title {i}" for i in sorted(numbers)]
    assert [int(photo_list.ids[item.position]) for item in found] == [
        10**9 - i for i in sorted(numbers)
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"SQLite format 3\0 but cut short", "wanted is SQLite with the table yfcc100m_dataset"),
        (b"1\t2\t3\n", r"no line of the first 1000 has 25 columns \(the first has 3\)"),
        (b"\n", "no line of the first 1000 has 25 columns"),
        (bz2.compress(b"x" * 100_000)[:-20], "damaged or ends early"),
    ],
)
def test_other_metadata_is_refused(tmp_path, content, message):
    photos = make_photos(3)
    ids = write_ids(tmp_path / "ids", photos, range(3))
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(DataError, match=message):
        build(tmp_path / "d", make_job(ids, tmp_path / "m", 3))


def test_other_id_list_is_refused_early(tmp_path):
    """A garbage file is not read to its end."""
    (tmp_path / "ids").write_bytes(b"http://host/1.jpg\tcaption\n" * 2000)
    rejected = []
    with pytest.raises(DataError, match=r"first 1000 lines are not \(line number, photo id, hash"):
        yfcc_metadata.read_photos(tmp_path / "ids", None, rejected)
    assert len(rejected) == 1000


def test_sqlite_of_another_kind_is_refused(tmp_path):
    ids = write_ids(tmp_path / "ids", make_photos(3), range(3))
    sqlite3.connect(tmp_path / "m").execute("CREATE TABLE other (x)").connection.close()
    with pytest.raises(DataError, match=r"no such table: metadata\.yfcc100m_dataset; wanted"):
        build(tmp_path / "d", make_job(ids, tmp_path / "m", 3))


def test_damaged_sqlite_is_refused(tmp_path):
    photos = make_photos(2000)
    ids = write_ids(tmp_path / "ids", photos, range(2000))
    path = write_sqlite(tmp_path / "m", photos)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 8192] = bytes(8192)
    path.write_bytes(data)
    with pytest.raises(DataError, match="malformed"):
        build(tmp_path / "d", make_job(ids, path, 2000))
    assert not (tmp_path / "d/list/index.json").exists()


def test_metadata_is_not_written(tmp_path):
    photos = make_photos(5)
    path = write_sqlite(tmp_path / "odd name #?%20.sql", photos)
    before = path.read_bytes()
    path.chmod(0o400)
    job = make_job(write_ids(tmp_path / "ids", photos, range(5)), path, 5)
    assert len(build(tmp_path / "d", job)[0]) > 0
    assert path.read_bytes() == before


# --- the three lists ------------------------------------------------------------------------


def test_published_counts():
    assert {key: (entry.name, entry.photos) for key, entry in yfcc.LISTS.items()} == {
        "openai": ("yfcc14m_openai", 14_829_396),
        "slip": ("yfcc15m_slip", 14_689_580),
        "declip": ("yfcc15m_declip_v2", 15_388_848),
    }


@pytest.mark.parametrize("list_name", ["openai", "slip"])
def test_count_of_the_list_is_checked_before_the_join(tmp_path, list_name):
    """The metadata here is no metadata, which would be noticed first otherwise."""
    ids = write_ids(tmp_path / "ids", make_photos(20), range(20))
    (tmp_path / "m").write_bytes(b"x")
    np.save(tmp_path / "u.npy", np.arange(15))
    unique = tmp_path / "u.npy" if list_name == "slip" else None
    total = yfcc.LISTS[list_name].photos
    job = make_job(ids, tmp_path / "m", total, list_name=list_name, unique_ids=unique)
    found = 15 if unique else 20
    with pytest.raises(
        DataError, match=f"{found} photos, but {list_name} has {total}.*-rows {found}"
    ):
        build(tmp_path / "d", job)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint32])
def test_slip_keeps_the_lines_of_its_images(tmp_path, dtype):
    photos = make_photos(60)
    numbers = list(range(0, 60, 2))
    unique = np.array([59, 4, 0, 8, 8, 58, 1000, 3], dtype=dtype)
    np.save(tmp_path / "u.npy", unique)
    job = make_job(
        write_ids(tmp_path / "ids", photos, numbers),
        write_sqlite(tmp_path / "m", photos),
        4,
        list_name="slip",
        unique_ids=tmp_path / "u.npy",
    )
    rows, index = build(tmp_path / "d", job)
    assert [row["photoid"] for row in rows] == [photos[i]["photoid"] for i in (0, 4, 8, 58)]
    assert [row["row"] for row in rows] == [0, 2, 4, 29]
    assert index["facts"]["photos"] == 4


class Trap:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(tmp_path):
    ids = write_ids(tmp_path / "ids", make_photos(3), range(3))
    sprung = tmp_path / "sprung"
    np.save(tmp_path / "trap.npy", np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    (tmp_path / "trap.pkl").write_bytes(pickle.dumps(Trap(sprung)))
    for name in ("trap.npy", "trap.pkl"):
        job = make_job(ids, ids, 3, list_name="slip", unique_ids=tmp_path / name)
        with pytest.raises(DataError, match=r"not a readable \.npy of numbers"):
            build(tmp_path / "d", job)
    assert not sprung.exists()


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2), int), np.zeros(0, int), np.ones(3), [-1, 2], [10**8]]
)
def test_other_npy_files_are_refused(tmp_path, array):
    np.save(tmp_path / "u.npy", np.array(array))
    with pytest.raises(DataError, match="not line numbers"):
        yfcc._read_unique_ids(tmp_path / "u.npy")


def test_declip(tmp_path):
    def line(number: int, **changes) -> bytes:
        url = f"https://farm{number}.staticflickr.com/12/{1000 + number}_ab_o.jpg"
        entry = {"filename": f"{number}.jpg", "url": url, "caption": f"c {number}"}
        return json.dumps(entry | changes).encode()

    lines = [
        line(0),
        line(1, caption='"quotes"\tand\n blanks  \U0001f600'),
        line(2, caption=["one", " ", "two\nlines"]),
        line(3, url="http://live.staticflickr.com/65535/77_x.jpg"),
        line(4, url="http://elsewhere.example/1_2.jpg"),
        b"{",
        b'["a"]',
        line(5, caption=None),
        line(6, caption="  "),
        line(7, url="ftp://farm1.staticflickr.com/1/1_a.jpg"),
        b'{"url": "http://farm1.staticflickr.com/1/5_a.jpg"}',
        b'{"url": "http://farm1.staticflickr.com/1/6_\\ud800.jpg", "caption": "x"}',
    ]
    path = tmp_path / "list.json"
    path.write_bytes(b"\n".join(lines))
    job = make_job(path, None, 7, list_name="declip", captions=None, images="urls")
    rows, index = build(tmp_path / "d", job, yfcc.read_declip_rows)
    assert [(row["row"], row["photoid"], row["caption"]) for row in rows] == [
        (0, "1000", "c 0"),
        (1, "1001", '"quotes" and blanks \U0001f600'),
        (2, "1002", "one\ntwo lines"),
        (3, "77", "c 3"),
        (4, None, "c 4"),
    ]
    assert rows[0]["url"] == "https://farm0.staticflickr.com/12/1000_ab_o.jpg"
    assert index["rejected"] == {
        "not a line with url and caption": 5,
        "empty caption": 1,
        "scheme is not http or https": 1,
    }
    text = "77\n1000\n1001\n1002\n1006\n"
    assert index["facts"] == {
        "photos": 7,
        "ids": 5,
        "ids_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }

    job = make_job(path, None, 7, list_name="declip", captions=None, images="bucket")
    rows, index = build(tmp_path / "e", job, yfcc.read_declip_rows)
    name = photo_hash("http://live.staticflickr.com/65535/77_x.jpg")
    assert rows[3]["url"] == f"{yfcc.BUCKET}/{name[:3]}/{name[3:6]}/{name}.jpg"
    assert len(rows) == 4
    assert index["rejected"]["no Flickr url, so no name in the bucket"] == 2

    job = make_job(path, None, 8, list_name="declip", captions=None, images="urls")
    with pytest.raises(DataError, match="7 photos, but declip has 8"):
        build(tmp_path / "f", job, yfcc.read_declip_rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"list_name": "slip"}, "--list slip needs --unique-ids"),
        ({"unique_ids": Path("u")}, "--list openai does not take --unique-ids"),
        ({"metadata": None}, "--list openai needs --metadata"),
        ({"captions": None}, "--list openai needs --captions"),
        ({"list_name": "declip"}, "--list declip does not take --metadata"),
        ({"images": "/no/such/folder"}, "--images /no/such/folder: not bucket, urls or a folder"),
    ],
)
def test_flags_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_job(Path("ids"), Path("m"), 1, **changes)


# --- a real run -----------------------------------------------------------------------------


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def write_dump(root: Path, photos) -> dict[str, tuple[int, int, int]]:
    """Images in the layout of the bucket, each of one colour; returns the colours by photo id."""
    colours = {}
    for i, photo in enumerate(photos):
        name = photo_hash(photo["downloadurl"])
        path = root / name[:3] / name[3:6] / f"{name}.jpg"
        path.parent.mkdir(parents=True)
        colours[photo["photoid"]] = (20 * i, 255 - 20 * i, 128)
        Image.new("RGB", (500, 300), colours[photo["photoid"]]).save(path)
    return colours


def test_local_dump_to_shards(tmp_path):
    """The whole command: join, download from a folder with a blank in its name, and again."""
    photos = make_photos(12)
    colours = write_dump(tmp_path / "local dump", photos[:10])
    out = tmp_path / "d"
    command = (
        *("--list", "openai", "--ids", write_ids(tmp_path / "ids", photos, range(12))),
        *("--metadata", write_sqlite(tmp_path / "m", photos)),
        *("--captions", "title_description", "--images", tmp_path / "local dump"),
        *("--out", out, "--samples-per-shard", 20, "--retries", 0),
    )
    result = run(*command)
    assert result.returncode == 3
    assert "12 photos, but openai has 14829396" in result.stderr
    assert not (out / "run.yaml").exists()

    result = run(*command, "--expected-rows", 12)
    assert result.returncode == 0, result.stderr
    captioned = [p for p in photos if p["title"] or p["description"]]
    assert f"{len(captioned)} rows to download" in result.stdout
    assert result.stdout.endswith(f"next: python data_prep/verify.py {out}\n")
    stats = folder.finished(out)[0]
    kept = {p["photoid"] for p in captioned} & set(colours)
    assert (stats["count"], stats["successes"]) == (len(captioned), len(kept))
    assert stats["failed_to_download"] == len(captioned) - len(kept)  # not in the dump
    rows = {row["photoid"]: row for row in pq.read_table(out / "list/00000.parquet").to_pylist()}
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(out / "shards/00000.tar") as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    assert len(samples) == len(kept)
    for sample in samples.values():
        facts = json.loads(sample["json"])
        row = rows[facts["photoid"]]
        assert sample["txt"].decode() == row["caption"] == facts["caption"]
        assert (facts["row"], facts["licenseurl"]) == (row["row"], LICENSE)
        image = Image.open(io.BytesIO(sample["jpg"]))
        assert min(image.size) == 256
        difference = np.array(image)[0, 0].astype(int) - colours[facts["photoid"]]
        assert abs(difference).max() < 4
    preparation = folder.load(out)
    assert preparation.name == "yfcc14m_openai"
    assert preparation.identity["list"] == preparation.extra["list"]["list"] == "openai"
    ordered = "".join(f"{i}\n" for i in sorted(int(p["photoid"]) for p in photos))
    digest = hashlib.sha256(ordered.encode()).hexdigest()
    assert preparation.identity["ids_sha256"] == preparation.extra["list"]["ids_sha256"] == digest
    assert preparation.attempted == len(captioned)

    before = {p: p.stat().st_mtime_ns for p in (out / "shards").iterdir()}
    result = run(*command, "--expected-rows", 12)
    assert result.returncode == 0, result.stderr
    assert before == {p: p.stat().st_mtime_ns for p in (out / "shards").iterdir()}
    result = run(*command)
    assert result.returncode == 3
    assert "12 photos, but openai has 14829396" in result.stderr
    np.save(tmp_path / "u.npy", np.arange(12))
    slip = [x if x != "openai" else "slip" for x in command]
    result = run(*slip, "--unique-ids", tmp_path / "u.npy", "--expected-rows", 12)
    assert result.returncode == 3
    assert "list: openai there, slip now" in result.stderr
