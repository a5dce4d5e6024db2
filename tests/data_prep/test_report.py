"""report.py against counts by hand and by brute force."""

import hashlib
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.checks import concepts
from data_prep.checks.report_collect import captions_of, collect, open_source
from data_prep.checks.report_counts import Rows, Texts
from data_prep.download.reasons import reason_group
from data_prep.report import PUBLISHED, published, report
from data_prep.sets import set_folder
from data_prep.sets.shard_writer import Unusable, permutation, write_shards
from data_prep.verify import verify
from loaders.errors import DataError
from tests.loaders.conftest import encoded, sample, write_tar

REPOSITORY = Path(__file__).resolve().parents[2]
DNS = "<urlopen error [Errno -2] Name or service not known>"
GONE = "HTTP Error 404: Not Found"
SLOW = "<urlopen error timed out>"


def begin(out, name="toy", kind="image_text", shards=1, size=4, attempted=4, classes=()):
    set_folder.begin(
        out,
        set_folder.Preparation(
            "data_prep/toy.py",
            name,
            kind,
            "somewhere",
            "CC0",
            "2026-01-31",
            shards,
            size,
            attempted,
        ),
        classes,
    )


def download(out, shard, rows):
    """A shard as img2dataset leaves it. `rows`: (row, caption, error or None, content)."""
    name, table, members = set_folder.shard_name(shard), [], []
    for n, (row, caption, error, content) in enumerate(rows):
        kept = error is None
        table.append(
            {
                "key": f"{shard}{n:04d}",
                "row": row,
                "url": f"http://host{row}.example/{row}.jpg",
                "caption": caption,
                "status": "success" if kept else "failed_to_download",
                "error_message": error,
                "width": 40 + row if kept else None,
                "height": 32 if kept else None,
                "sha256": hashlib.sha256(content.encode()).hexdigest() if kept else None,
            }
        )
        if kept:
            members += sample(f"{shard}{n:04d}", row, txt=caption.encode())
    pq.write_table(pa.Table.from_pylist(table), out / "shards" / f"{name}.parquet")
    status = Counter(error or "success" for _, _, error, _ in rows)
    stats = {"count": len(rows), "successes": status["success"], "status_dict": status}
    if members:
        write_tar(out / "shards" / f"{name}.tar", members)
    else:
        (out / "shards" / f"{name}.tar").write_bytes(bytes(10240))
    (out / "shards" / f"{name}_stats.json").write_text(json.dumps(stats))


@pytest.fixture
def downloaded(tmp_path):
    """8 rows in 2 shards, then two retries; the last row is never tried."""
    out = tmp_path / "D"
    begin(out, "gcc3m", shards=4, attempted=9)
    download(
        out,
        0,
        [
            (10, "a red cat", None, "A"),
            (11, "a dog", DNS, ""),
            (12, "a dog", None, "A"),
            (13, "the sea, blue", SLOW, ""),
        ],
    )
    download(
        out,
        1,
        [
            (14, "", None, "B"),
            (15, "gone", GONE, ""),
            (16, "a Dog", None, "C"),
            (17, "x", DNS, ""),
        ],
    )
    download(out, 2, [(11, "a dog", None, "D"), (13, "the sea, blue", DNS, ""), (17, "x", DNS, "")])
    download(out, 3, [(13, "the sea, blue", GONE, ""), (17, "x", SLOW, "")])
    (out / "list").mkdir()
    index = {"rows": 9, "rejected": {"no url": 2}, "duplicates": 1, "files": []}
    (out / "list" / "index.json").write_text(json.dumps(index))
    return out


def test_a_download_with_retries(downloaded):
    facts = collect(open_source(downloaded))
    expected = {
        "planned": 9,
        "attempted": 8,
        "kept": 5,
        "yield": 5 / 8,
        "reasons": {"http 404": 2, "timeout": 1},  # the last reason of rows 13, 15 and 17
        "retried": 3,
        "recovered": 1,
        "dns_share": 0.0,
        "closed": False,
        "shards": 3,
        "repeated_files": {"images": 5, "distinct": 4, "repeated": 1},
        "list": {"rows": 9, "rejected": {"no url": 2}, "duplicates": 1},
    }
    assert {key: facts[key] for key in expected} == expected
    assert facts["captions"] == {
        "count": 5,
        "empty": 1,
        "mean_words": (3 + 2 + 0 + 2 + 2) / 5,
        "distinct_words": 4,  # a red cat dog
        "most_common": [("a dog", 2)],
    }
    assert facts["caption_lengths"] == [1, 0, 3, 1]
    widths = [50, 52, 54, 56, 51]
    assert facts["sizes"]["width"] == {
        q: int(np.percentile(widths, q, method="inverted_cdf")) for q in (5, 50, 95)
    }
    assert facts["sizes"]["height"] == {5: 32, 50: 32, 95: 32}
    tars = [downloaded / "shards" / f"0000{n}.tar" for n in range(3)]
    assert facts["bytes"] == sum(tar.stat().st_size for tar in tars)


def test_the_written_report(downloaded, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            REPOSITORY / "data_prep" / "report.py",
            downloaded,
            REPOSITORY / "data" / "quickstart" / "emoji_train",
            "--output",
            tmp_path / "R",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "| gcc3m | 8 | 5 | 62.50% |" in done.stdout
    text = (tmp_path / "R" / "report.md").read_text()
    for line in (
        "| gcc3m | 8 | 5 | 62.50% | 0.000 GB | 2026-01-31 | not closed: run data_prep/verify.py |",
        "| gcc3m | 5 |  |  |  | this set |",
        "| GCC-3M | 3.3M | 17,135 | 7,953 | 193 | UniCL, arXiv 2204.03610, Table 1 |",
        "Not complete: 9 rows are planned.",
        "Rows that were tried again: 3, of which 1 gave an image.",
        "| http 404 | 2 | 25.00% |",
        "Lines of the list that were left out: no url: 2, duplicate: 1.",
        "Of 5 downloaded files 1 repeat another one byte by byte.",
        "5 captions, 1.8 words on average, 1 empty; 4 distinct words",
        "| a dog | 2 |",
        f"`python data_prep/report.py {downloaded} --captions-model en_core_web_sm --output DIR`",
        "| emoji_train | 1,862 | 1,601 | 85.98% |",
        "| emoji_train | 1,601 | 28 | 38 | 57 | this set |",
    ):
        assert line in text, line
    assert "resolver" not in text
    sets = json.loads((tmp_path / "R" / "report.json").read_bytes())["sets"]
    assert [facts["name"] for facts in sets] == ["gcc3m", "emoji_train"]
    assert sets[0]["published"]["concepts"] == 17135
    assert sets[0]["table_1"] == {
        "images": 5,
        "concepts": None,
        "vocabulary": None,
        "images_per_concept": None,
        "most_common_concepts": {},
    }
    assert "published" not in sets[1]
    picture = Image.open(tmp_path / "R" / "report.png")
    picture.load()
    assert picture.size == (1400, 740)


def test_rows_against_brute_force():
    rng = np.random.default_rng(0)
    messages = ["success", DNS, GONE, SLOW, "HTTP Error 403: Forbidden", None]
    rows, tries, last = Rows(), Counter(), {}
    for _ in range(40):
        chosen = rng.choice(3000, rng.integers(0, 60), replace=False)
        said = [messages[i] for i in rng.integers(0, len(messages), len(chosen))]
        table = {
            "row": pa.array(chosen, pa.int64()),
            "status": pa.array(["success" if m == "success" else "failed" for m in said]),
            "error_message": pa.array([None if m == "success" else m for m in said], pa.string()),
        }
        rows.add(pa.table(table))
        for row, message in zip(chosen.tolist(), said, strict=True):
            tries[row] += 1
            if last.get(row) != "success":
                last[row] = reason_group(message or "")
    reasons = Counter(last.values())
    kept = reasons.pop("success")
    again = [row for row, n in tries.items() if n > 1]
    assert rows.summary() == {
        "attempted": len(last),
        "kept": kept,
        "reasons": dict(reasons),
        "retried": len(again),
        "recovered": sum(last[row] == "success" for row in again),
    }
    assert list(rows.summary()["reasons"].values()) == sorted(reasons.values(), reverse=True)


def test_texts_against_brute_force():
    rng = np.random.default_rng(1)
    shards = [
        [" ".join(f"w{i}" for i in rng.integers(0, 4, rng.integers(0, 3))) for _ in range(n)]
        for n in (30, 0, 25, 1)
    ]
    texts = Texts()
    for captions in shards:
        texts.add(captions)
    every = [text for captions in shards for text in captions]
    found = texts.summary(lambda shard: shards[shard])
    assert found["count"] == len(every)
    assert found["empty"] == every.count("")
    assert found["mean_words"] == pytest.approx(np.mean([len(text.split()) for text in every]))
    assert found["distinct_words"] == len({word for text in every for word in text.split()})
    counts = Counter(every)
    assert dict(found["most_common"]).items() <= counts.items()
    assert [n for _, n in found["most_common"]] == [n for _, n in counts.most_common(10) if n > 1]
    assert Texts().summary(lambda shard: []) is None


def test_distinct_words_fold_case_and_punctuation():
    texts = Texts()
    texts.add(["A dog, a Dog! - «Hund» isn't", "Übung übung ."])
    assert texts.words - {""} == {"a", "dog", "hund", "isn't", "übung"}


def test_a_labelled_set_from_files(tmp_path):
    out, size = tmp_path / "D", 6
    classes = [
        {"id": 0, "synset": "n1", "names": ["oak tree", "quercus robur alba"]},
        {"id": 1, "synset": None, "names": ["pine tree"]},
        {"id": 2, "synset": None, "names": ["never seen"]},
    ]
    begin(out, "cifar-10-train", "image_label", 2, size, 12, classes)

    def read(i):
        if i in (3, 7, 8):
            raise Unusable("a directory" if i == 3 else "not a jpeg, png or webp image")
        return {"jpg": encoded(i), "cls": str(i % 2).encode()}

    write_shards(out, permutation(12, 0), read)
    verify(out)
    (facts,) = report([out], None, 1, tmp_path / "R")
    assert facts["reasons"] == {"not a jpeg, png or webp image": 2, "a directory": 1}
    assert (facts["attempted"], facts["kept"], facts["retried"]) == (12, 9, None)
    assert facts["class_images"] == [5, 4, 0]  # 8 of the even ones is lost, and 3 and 7
    assert facts["table_1"] == {
        "images": 9,
        "concepts": 2,
        "vocabulary": 3,  # oak pine tree
        "images_per_concept": 4.5,
        "most_common_concepts": {},
    }
    assert facts["closed"]
    assert facts["captions"] is None
    text = (tmp_path / "R" / "report.md").read_text()
    assert "| CIFAR-10 | 50k | 10 | 10 | 5,000 |" in text
    assert "captions-model" not in text


def test_several_captions_of_an_image_are_counted_each(tmp_path):
    tar = write_tar(
        tmp_path / "00000.tar",
        [*sample("1", txt=b"ein\nzwei drei"), *sample("2", txt=b""), *sample("3")],
    )
    assert captions_of(tar) == ["ein", "zwei drei", ""]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("imagenet1k.json", "ImageNet-1K"),
        ("elevater/cifar-100.json", "CIFAR-100"),
        ("elevater/cifar-10.json", "CIFAR-10"),
    ],
)
def test_vocabulary_is_the_one_of_the_paper(file, name):
    classes = json.loads((REPOSITORY / "prompts" / file).read_text())["classes"]
    names = [entry["names"][0] if isinstance(entry, dict) else entry for entry in classes]
    assert len(names) == PUBLISHED[name][1]
    assert concepts.vocabulary(names) == PUBLISHED[name][2]
    assert concepts.vocabulary(["maple_tree", "oak_tree"]) == 3


def test_published_images_per_concept_follow_from_their_columns():
    for images, number, _, per, _ in PUBLISHED.values():
        count = float(images[:-1]) * {"k": 1e3, "M": 1e6}[images[-1]]
        assert count / number == pytest.approx(per, abs=max(1, 0.005 * per))


def test_published_names():
    names = {"gcc3m": "GCC-3M", "imagenet1k_train": "ImageNet-1K", "yfcc14m_openai": "YFCC-14M"}
    assert {name: published(name) for name in names} == names
    for other in ("imagenet1k_val", "yfcc15m_slip", "imagenet_winter21", "imagenet21k", "gcc3m_a"):
        assert published(other) is None


def test_what_is_no_set_or_damaged(tmp_path, downloaded):
    with pytest.raises(DataError, match="not a data set"):
        report([tmp_path], None, 1, tmp_path / "R")
    with pytest.raises(DataError, match=r"(?i)spacy"):
        report([downloaded], "no_such_model", 1, tmp_path / "R")
    (downloaded / "shards" / "00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"00001\.parquet: damaged.*verify\.py"):
        report([downloaded], None, 1, tmp_path / "R")
    assert not (tmp_path / "R").exists()


def test_foreign_statistics_without_parquet(tmp_path):
    """Messages of unknown wording are counted one by one, up to a limit."""
    out = tmp_path / "D"
    begin(out)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    write_tar(out / "shards" / "00000.tar", [("1.png", file.getvalue()), ("1.txt", b"x")])
    status = {"success": 1, DNS: 2, GONE: 4} | {f"strange {n}": 1 for n in range(40)}
    stats = {"count": 47, "successes": 1, "status_dict": status}
    (out / "shards" / "00000_stats.json").write_text(json.dumps(stats))
    facts = collect(open_source(out))
    assert (facts["attempted"], facts["kept"]) == (47, 1)
    assert facts["reasons"]["http 404"] == 4
    assert facts["dns_share"] == 2 / 47
    assert facts["reasons"]["other"] == 12
    assert sum(facts["reasons"].values()) == 46
