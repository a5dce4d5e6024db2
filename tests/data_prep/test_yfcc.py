"""YFCC lists: the join with the metadata in both forms, captions, the three lists, a real run."""

import bz2
import gzip
import hashlib
import random
import re
import sqlite3
import urllib.parse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.archives import yfcc_metadata
from data_prep.archives.yfcc_metadata import clean, join_caption, photo_hash
from data_prep.download import url_list
from data_prep.download.list_rows import Notes
from loaders.errors import DataError
from tests.data_prep.yfcc_layout import (
    LICENSE,
    build,
    make_job,
    make_photo,
    make_photos,
    tsv_line,
    write_ids,
    write_sqlite,
    write_tsv,
)

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
    assert f"15\tnot in the metadata\t{photos[11]['photoid']}\n" in rejected
    assert f"16\tphoto id again\t{photos[1]['photoid']}\n" in rejected


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
