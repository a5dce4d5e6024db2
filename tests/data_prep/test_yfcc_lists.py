"""The three lists that go by the name of YFCC15M, refusals, and a real run from a local dump."""

import hashlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.archives import yfcc_lists
from data_prep.archives.yfcc_metadata import photo_hash
from data_prep.sets import set_folder
from loaders.errors import ConfigError, DataError
from tests.data_prep.yfcc_layout import (
    LICENSE,
    SCRIPT,
    build,
    make_job,
    make_photos,
    write_ids,
    write_sqlite,
)

# --- the three lists ------------------------------------------------------------------------


def test_published_counts():
    assert {key: (entry.name, entry.photos) for key, entry in yfcc_lists.LISTS.items()} == {
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
    total = yfcc_lists.LISTS[list_name].photos
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
        yfcc_lists._read_unique_ids(tmp_path / "u.npy")


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
    rows, index = build(tmp_path / "d", job, yfcc_lists.read_declip_rows)
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
    rows, index = build(tmp_path / "e", job, yfcc_lists.read_declip_rows)
    name = photo_hash("http://live.staticflickr.com/65535/77_x.jpg")
    assert rows[3]["url"] == f"{yfcc_lists.BUCKET}/{name[:3]}/{name[3:6]}/{name}.jpg"
    assert len(rows) == 4
    assert index["rejected"]["no Flickr url, so no name in the bucket"] == 2

    job = make_job(path, None, 8, list_name="declip", captions=None, images="urls")
    with pytest.raises(DataError, match="7 photos, but declip has 8"):
        build(tmp_path / "f", job, yfcc_lists.read_declip_rows)


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
    stats = set_folder.finished(out)[0]
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
    preparation = set_folder.load(out)
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
