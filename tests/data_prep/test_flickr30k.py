"""Flickr30k from made-up official files."""

import json
import sys
import zipfile

import pytest

from data_prep import flickr30k
from data_prep.sets import set_folder
from data_prep.verify import verify
from loaders.errors import DataError
from loaders.manifest import open_shards
from loaders.texts import read_captions
from tests.loaders.conftest import encoded, write_tar


def entry(i: int, split: str, captions: int = 5) -> dict:
    """Image i as in dataset_flickr30k.json, which states no folder."""
    sentids = [captions * i + k for k in range(captions)]
    return {
        "sentids": sentids,
        "imgid": i,
        "filename": f"{1_000_000 + i}.jpg",
        "split": split,
        "sentences": [{"raw": f"Caption {s} .", "imgid": i, "sentid": s} for s in sentids],
    }


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Function that writes a Karpathy file and prepares it: (entries, source, options) -> out."""

    def run(entries, source, *options, name="out", dataset="flickr30k"):
        karpathy = tmp_path / "dataset_flickr30k.json"
        karpathy.write_text(json.dumps({"images": entries, "dataset": dataset}))
        arguments = ["--karpathy", karpathy, "--images", source, "--out", tmp_path / name, *options]
        monkeypatch.setattr(sys, "argv", ["flickr30k.py", *map(str, arguments)])
        flickr30k.main()
        return tmp_path / name

    return run


def test_the_official_test_split_from_folder_zip_and_tar(prepare, tmp_path):
    entries = [entry(i, ("test", "val")[i % 5 == 4]) for i in range(1250)]
    files = {e["filename"]: encoded(e["imgid"] % 50, (8, 8)) for e in entries}
    images = tmp_path / "flickr30k-images"
    images.mkdir()
    for name, data in files.items():
        (images / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        for name, data in files.items():
            file.writestr(f"flickr30k_images/flickr30k_images/{name}", data)
    tar = write_tar(tmp_path / "images.tar", [(f"images/{n}", d) for n, d in files.items()])
    tars = []
    for number, source in enumerate((images, tmp_path / "images.zip", tar)):
        out = prepare(entries, source, "--split", "test", name=f"out{number}")
        tars.append([path.read_bytes() for path in sorted((out / "shards").glob("*.tar"))])
    assert tars[0] == tars[1] == tars[2]
    verify(out)
    shards = open_shards(out)
    assert (shards.name, shards.kind, len(shards)) == (
        "flickr30k_karpathy_test",
        "image_text",
        1000,
    )
    assert shards.caption_lines == {shard.path for shard in shards.shards}
    seen = set()
    for i in range(len(shards)):
        about = shards.read_json(i)
        e = entries[about["imgid"]]
        assert about == {
            "captions": [sentence["raw"] for sentence in e["sentences"]],
            "imgid": e["imgid"],
            "sentids": e["sentids"],
            "filename": e["filename"],
            "split": "test",
        }
        assert shards.read_text(i).split("\n") == about["captions"]
        assert read_captions(shards, i, "txt") == read_captions(shards, i, "json.captions")
        assert read_captions(shards, i, "txt") == about["captions"]
        assert shards.read_image(i) == files[e["filename"]]
        seen.add(about["imgid"])
    assert seen == {e["imgid"] for e in entries if e["split"] == "test"}
    assert set_folder.load(out).extra["captions"] == 5000


@pytest.mark.parametrize(
    ("count", "captions", "options", "message"),
    [
        (999, 5, (), "images: 999 found, 1000 expected"),
        (7, 5, ("--expected-images", "8"), "images: 7 found, 8 expected"),
        (7, 6, ("--expected-images", "7"), "captions: 36 found, 35 expected"),
        (7, 4, ("--expected-images", "7"), "captions: 34 found, 35 expected"),
    ],
)
def test_counts_that_differ_are_refused(prepare, tmp_path, count, captions, options, message):
    entries = [entry(0, "test", captions), *(entry(i, "test") for i in range(1, count))]
    with pytest.raises(DataError, match=message):
        prepare(entries, tmp_path, "--split", "test", *options)
    assert not (tmp_path / "out").exists()


def test_another_data_set_is_refused(prepare, tmp_path):
    with pytest.raises(DataError, match="'coco', not 'flickr30k'"):
        prepare([entry(0, "test")], tmp_path, "--split", "test", dataset="coco")
