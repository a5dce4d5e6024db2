"""COCO captions from made-up official files."""

import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import webdataset

from data_prep import coco
from data_prep.archives.karpathy import one_line
from data_prep.sets import set_folder
from data_prep.verify import verify
from loaders.errors import ConfigError, DataError
from loaders.manifest import open_shards
from tests.data_prep.test_image_source import write_folder, write_zip
from tests.loaders.conftest import encoded, write_tar

SCRIPT = Path(__file__).resolve().parents[2] / "data_prep" / "coco.py"
SPLIT_OF = ("train", "restval", "test", "val", "restval", "test", "train")


def entry(i: int, split: str, captions: int = 5, **changes) -> dict:
    """Image i as in dataset_coco.json."""
    place = "train2014" if split == "train" else "val2014"
    texts = [f"caption {k} of {i}" for k in range(captions)]
    sentids = [1000 * i + k for k in range(captions)]
    return {
        "filepath": place,
        "sentids": sentids,
        "filename": f"COCO_{place}_{i:012d}.jpg",
        "imgid": i,
        "split": split,
        "sentences": [
            {"tokens": text.split(), "raw": text, "imgid": i, "sentid": sentid}
            for text, sentid in zip(texts, sentids, strict=True)
        ],
        "cocoid": 7 * i,
    } | changes


def karpathy_file(path: Path, entries: list[dict], dataset: str = "coco") -> Path:
    path.write_text(json.dumps({"images": entries, "dataset": dataset}))
    return path


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["coco.py", *map(str, arguments)])
    coco.main()


def tars(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "shards").glob("*.tar"))}


def origins(tar: Path) -> set[str]:
    """Paths in COCO's zips of the images of a shard."""
    samples = webdataset.WebDataset(str(tar), shardshuffle=False)
    return {f"val2014/{json.loads(sample['json'])['filename']}" for sample in samples}


@pytest.fixture
def made(tmp_path):
    """21 images of all splits in a Karpathy file, and their files by path in the zips."""
    entries = [entry(i, SPLIT_OF[i % 7], captions=6 if i == 2 else 5) for i in range(21)]
    files = {f"{e['filepath']}/{e['filename']}": encoded(e["imgid"]) for e in entries}
    karpathy = karpathy_file(tmp_path / "dataset_coco.json", entries)
    return karpathy, entries, files


@pytest.fixture
def captions(made, tmp_path, monkeypatch):
    """Function that prepares the test split: (out, options) -> out."""
    karpathy, _, files = made
    images = write_zip(tmp_path / "val2014.zip", files)

    def prepare(name: str, *options, split="test", source=images, expected=6) -> Path:
        out = tmp_path / name
        arguments = ["--task", "captions", "--karpathy", karpathy, "--images", source]
        arguments += ["--split", split, "--out", out, "--samples-per-shard", 4]
        if expected is not None:
            arguments += ["--expected-images", expected]
        run(monkeypatch, *arguments, *options)
        return out

    return prepare


def test_shards_hold_images_and_captions_of_the_split(made, captions, capsys):
    _, entries, files = made
    out = captions("all", "--captions-per-image", "all")
    assert capsys.readouterr().out.endswith(f"next: python data_prep/verify.py {out}\n")
    verify(out)
    wanted = {e["filename"]: e for e in entries if e["split"] == "test"}
    found = []
    for path in sorted((out / "shards").glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            about = json.loads(sample["json"])
            e = wanted[about["filename"]]
            texts = [s["raw"] for s in e["sentences"]]
            assert sample["jpg"] == files[f"{e['filepath']}/{e['filename']}"]
            assert sample["txt"].decode().split("\n") == texts
            assert about == {
                "captions": texts,
                "cocoid": e["cocoid"],
                "sentids": e["sentids"],
                "filename": e["filename"],
                "split": "test",
            }
            found.append(about["filename"])
    assert sorted(found) == sorted(wanted)
    assert found != sorted(found)  # permuted
    shards = open_shards(out)
    assert (shards.name, shards.kind) == ("coco_captions_karpathy_test", "image_text")
    assert len(shards) == 6
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert (manifest["captions"], manifest["yield"]) == (31, {"attempted": 6, "kept": 6})


def test_five_captions_are_the_first_five(made, captions):
    counts = {}
    for name, options in (("five", ()), ("all", ("--captions-per-image", "all"))):
        shards = open_shards(captions(name, *options) / "shards", kind="image_text")
        for i in range(len(shards)):
            about = shards.read_json(i)
            assert len(about["captions"]) == len(about["sentids"])
            counts[name, about["cocoid"]] = about["captions"]
    assert {key: len(texts) for key, texts in counts.items() if key[0] == "five"} == {
        ("five", 7 * i): 5 for i in (2, 5, 9, 12, 16, 19)
    }
    assert counts["five", 14] == counts["all", 14][:5]
    assert len(counts["all", 14]) == 6


def test_every_source_gives_the_same_bytes(made, captions, tmp_path):
    files = made[2]
    flat = {name.rpartition("/")[2]: data for name, data in files.items()}
    expected = tars(captions("zip"))
    assert len(expected) == 2
    sources = {
        "folder": write_folder(tmp_path / "images", files),
        "flat": write_folder(tmp_path / "flat", flat),
        "tar": write_tar(tmp_path / "a.tar", list(files.items())),
        "dotted": write_tar(
            tmp_path / "b.tar", [(f"./x/{n}", d) for n, d in files.items()], tarfile.PAX_FORMAT
        ),
    }
    for name, source in sources.items():
        assert tars(captions(f"from_{name}", source=source)) == expected


def test_parts_give_the_same_bytes(captions):
    expected = tars(captions("one"))
    captions("two", "--part", 1, "--parts", 2)
    assert len(tars(captions("two", "--part", 0, "--parts", 2))) == 2
    assert tars(captions("two", "--part", 0, "--parts", 2)) == expected


def test_train_restval_joins_both(made, captions):
    out = captions("both", split="train_restval", expected=12)
    shards = open_shards(out / "shards", kind="image_text")
    assert Counter(shards.read_json(i)["split"] for i in range(12)) == {"train": 6, "restval": 6}


def test_line_breaks_become_spaces_and_empty_captions_go(made, captions):
    karpathy, entries, _ = made
    entries[5]["sentences"] = [
        {"raw": raw} for raw in ("two\nlines ", "\u2028", "a  b\r\n\r\nc", "d", "e", "f")
    ]
    entries[5]["sentids"] = [0, 1, 2, 3, 4, 5]
    karpathy_file(karpathy, entries)
    out = captions("lines")
    shards = open_shards(out / "shards", kind="image_text")
    found = {shards.read_json(i)["cocoid"]: i for i in range(6)}[35]
    assert shards.read_text(found) == "two lines\na  b c\nd\ne\nf"
    assert shards.read_json(found)["sentids"] == [0, 2, 3, 4, 5]
    stated = {"captions": 30, "captions_without_text": 1, "caption_lines": True}
    assert set_folder.load(out).extra == stated


def test_one_line():
    assert one_line(" a\x85b\x0b\n c\td ") == "a b c\td"


@pytest.mark.parametrize(
    ("expected", "numbers"),
    [(None, ("31", "25010")), (7, ("6 found", "7 expected"))],
)
def test_counts_that_differ_are_refused_with_both_numbers(captions, tmp_path, expected, numbers):
    with pytest.raises(DataError) as error:
        captions("counted", expected=expected)
    assert all(number in str(error.value) for number in numbers)
    assert not (tmp_path / "counted").exists()


def test_the_official_counts_of_the_test_split(tmp_path, monkeypatch):
    picture = encoded(0, (8, 8))
    entries = [entry(i, "test", captions=6 if i < 10 else 5) for i in range(5000)]
    files = {e["filename"]: picture for e in entries}
    images = write_zip(tmp_path / "val2014.zip", files)
    karpathy = tmp_path / "dataset_coco.json"

    def prepare(name):
        arguments = ["--task", "captions", "--karpathy", karpathy, "--images", images]
        run(monkeypatch, *arguments, "--split", "test", "--out", tmp_path / name)
        return set_folder.load(tmp_path / name)

    karpathy_file(karpathy, entries)
    assert (prepare("good").attempted, prepare("good").extra["captions"]) == (5000, 25_000)
    karpathy_file(karpathy, [entry(0, "test", captions=5), *entries[1:]])
    with pytest.raises(DataError, match="captions: 25009 found, 25010 expected"):
        prepare("caption")
    karpathy_file(karpathy, [entry(0, "test", captions=11), *entries[1:-1]])
    with pytest.raises(DataError, match="images: 4999 found, 5000 expected"):
        prepare("image")


def test_an_image_with_too_few_captions_is_named(made, captions):
    karpathy, entries, _ = made
    karpathy_file(karpathy, [*entries[:5], entry(5, "test", captions=4), *entries[6:]])
    with pytest.raises(DataError, match=r"1 images have fewer than 5 .*000005\.jpg"):
        captions("few")
    captions("few", "--captions-per-image", "all")


def test_absent_and_ambiguous_images_are_named(made, captions, tmp_path):
    files = made[2]
    short = write_zip(tmp_path / "short.zip", dict(list(files.items())[:12]))
    with pytest.raises(DataError, match=r"short\.zip: 3 of 6 images .*000012\.jpg"):
        captions("short", source=short)
    twice = write_folder(
        tmp_path / "twice", {f"{x}/{n}": d for n, d in files.items() for x in "ab"}
    )
    with pytest.raises(DataError, match="6 images are there more than once"):
        captions("set", source=twice)


@pytest.mark.parametrize("kind", ["zip", "folder", "tar"])
def test_what_is_no_image_is_said_before_anything_is_written(made, captions, tmp_path, kind):
    files = dict(made[2])
    name = next(name for name in files if name.endswith("000000000005.jpg"))
    good = files[name]
    broken = tmp_path / f"broken.{kind}"

    def pack():
        if kind == "zip":
            write_zip(broken, files)
        elif kind == "tar":
            write_tar(broken, list(files.items()))
        else:
            write_folder(broken, files)

    for data in (b"<html>moved</html>", b""):
        files[name] = data
        pack()
        wanted = rf"1 of 6 images are unusable \(not a jpeg.*broken.{kind}: {name}"
        with pytest.raises(DataError, match=wanted):
            captions("broken", source=broken)
        assert not (tmp_path / "broken").exists()
    files[name] = good
    pack()
    assert verify(captions("broken", source=broken)).samples == 6


def test_an_image_that_is_lost_after_the_start_is_named_and_restored(made, captions, tmp_path):
    files = made[2]
    images = write_folder(tmp_path / "images", files)
    out = captions("out", "--part", 0, "--parts", 2, source=images)
    kept = tars(out)
    inside = {name for tar in (out / "shards").glob("*.tar") for name in origins(tar)}
    lost = next(n for n in files if SPLIT_OF[int(n[-6:-4]) % 7] == "test" and n not in inside)
    (images / lost).write_bytes(b"gone")
    with pytest.raises(DataError, match=rf"{lost}: not a jpeg.* same command again"):
        captions("out", "--part", 1, "--parts", 2, source=images)
    assert tars(out) == kept
    (images / lost).write_bytes(files[lost])
    captions("out", "--part", 1, "--parts", 2, source=images)
    assert verify(out).samples == 6


def test_another_choice_in_the_same_folder_is_refused(captions):
    out = captions("same")
    before = tars(out)
    with pytest.raises(DataError, match="captions_per_image: '5' there, 'all' now"):
        captions("same", "--captions-per-image", "all")
    captions("same")
    assert tars(out) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "not a JSON object"),
        ('{"images": [', "cannot be read as JSON"),
        ('{"images": 3}', "no list 'images'"),
        ('{"images": [], "dataset": "flickr30k"}', "'flickr30k', not 'coco'"),
        ('{"images": [{"split": "val"}]}', "no image of split test"),
        ('{"images": [{"split": "test", "sentences": []}]}', "image 0 .*KeyError: 'sentids'"),
        (json.dumps({"images": [entry(1, "test")] * 2}), "000001.jpg is listed twice"),
        (json.dumps({"images": [entry(1, "test", cocoid="x")]}), "image 0 "),
        (json.dumps({"images": [entry(1, "test", sentids=[1])]}), "image 0 "),
        (
            json.dumps({"images": [entry(1, "test", sentences=[{"raw": "\ud800"}], sentids=[1])]}),
            "image 0 .*surrogates",
        ),
    ],
)
def test_files_of_another_form_are_refused(made, captions, content, message):
    made[0].write_text(content)
    with pytest.raises(DataError, match=message):
        captions("bad")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "captions", "--split", "test"], "needs --karpathy"),
        (["--task", "instances"], "needs --annotations"),
        (["--task", "instances", "--annotations", "a", "--split", "val"], "not take --split"),
    ],
)
def test_options_of_the_other_task(monkeypatch, tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        run(monkeypatch, *arguments, "--images", tmp_path, "--out", tmp_path / "out")


def test_exit_codes_and_messages_of_the_script(made, tmp_path):
    base = [sys.executable, SCRIPT, "--images", tmp_path, "--out", tmp_path / "out", "--task"]
    wrong = subprocess.run([*base, "captions"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr[:6]) == (2, "error:")
    refused = subprocess.run(
        [*base, "captions", "--karpathy", made[0], "--split", "val"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 3
    assert "15 found, 25010 expected" in refused.stderr
