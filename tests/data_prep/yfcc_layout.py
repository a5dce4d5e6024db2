"""Made-up YFCC100M: photos, metadata as SQLite and TSV, id lists."""

import random
import sqlite3
import urllib.parse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import yfcc
from data_prep.archives import yfcc_lists
from data_prep.archives.yfcc_metadata import photo_hash
from data_prep.download import url_list
from data_prep.download.list_rows import WEB

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


def make_job(ids: Path, m: Path | None, expected: int, **changes) -> yfcc_lists.Job:
    fields = {
        "list_name": "openai",
        "ids": ids,
        "unique_ids": None,
        "metadata": m,
        "captions": "title_description",
        "images": "bucket",
        "expected": expected,
    }
    return yfcc_lists.Job(**fields | changes)


def build(
    out: Path, job: yfcc_lists.Job, read=yfcc_lists.read_metadata_rows
) -> tuple[list[dict], dict]:
    """Rows and index of a list."""
    index = url_list.build(
        out,
        lambda notes: read(job, notes),
        job.inputs,
        {"list": job.list_name, "captions": job.captions, "images": job.images},
        10,
        yfcc_lists.EXTRA_COLUMNS,
        WEB if job.local_root is None else ("file",),
    )
    files = sorted((out / "list").glob("*.parquet"))
    return pa.concat_tables(pq.read_table(path) for path in files).to_pylist(), index
