"""Shards of ours and of img2dataset, read by our loader, webdataset and Hugging Face `datasets`."""

import io
import json
import os

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep.sets import set_folder
from data_prep.sets.shard_writer import permutation, write_shards
from data_prep.verify import verify
from loaders.errors import DataError
from loaders.manifest import open_shards
from tests.data_prep.downloads import command, run, write_list
from tests.data_prep.http_server import serve
from tests.loaders.conftest import encoded

SIZE = 7
COUNT = 2 * SIZE
FORMS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
CAPTIONS = [
    "ein Hündchen 🐕",
    "plain",
    "日本の猫\nzweite Zeile",
    'says "no"\t',
    "Ünïcödé é",
    "0",
    "-",
]
CLASSES = [{"id": n, "synset": None, "names": [name]} for n, name in enumerate(("a", "b", "c"))]


def begin(out, kind):
    preparation = set_folder.Preparation(
        "data_prep/toy.py", "toy", kind, "s", "l", "2026-01-31", 2, SIZE, COUNT
    )
    set_folder.begin(out, preparation, CLASSES if kind == "image_label" else ())


def write(out, kind, forms):
    """A set whose image i is in the format `forms[i % len(forms)]`."""

    def read(i):
        form = forms[i % len(forms)]
        members = {form: encoded(i, form=FORMS[form])}
        if kind == "image_label":
            return members | {"cls": str(i % 3).encode(), "json": json.dumps({"n": i}).encode()}
        caption = CAPTIONS[i % len(CAPTIONS)]
        about = {"n": i, "captions": caption.splitlines()}
        return members | {"txt": caption.encode(), "json": json.dumps(about).encode()}

    begin(out, kind)
    write_shards(out, permutation(COUNT, 3), read)
    verify(out)


def tars(out):
    return [str(path) for path in sorted((out / "shards").glob("*.tar"))]


def by_us(out):
    """key -> (image bytes, caption, json, label)."""
    shards = open_shards(out)
    return {
        shards.key(i): (
            shards.read_image(i),
            shards.read_text(i),
            shards.read_json(i),
            shards.label(i),
        )
        for i in range(len(shards))
    }


def by_webdataset(out):
    found = {}
    for part in webdataset.WebDataset(tars(out), shardshuffle=False):
        image = next(part[form] for form in FORMS if form in part)
        text = part["txt"].decode() if "txt" in part else None
        found[part["__key__"]] = (
            image,
            text,
            json.loads(part["json"]),
            int(part.get("cls", b"-1")),
        )
    return found


def by_datasets(out, form, streaming, cache):
    os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets

    rows = datasets.load_dataset(
        "webdataset",
        data_files={"train": tars(out)},
        split="train",
        streaming=streaming,
        cache_dir=str(cache),
    ).cast_column(form, datasets.Image(decode=False))
    return {
        row["__key__"]: (row[form]["bytes"], row.get("txt"), row["json"], row.get("cls", -1))
        for row in rows
    }


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("kind", ["image_label", "image_text"])
@pytest.mark.parametrize("form", FORMS)
def test_written_shards(tmp_path, kind, form):
    out = tmp_path / "D"
    write(out, kind, [form])
    ours = by_us(out)
    assert len(ours) == COUNT
    for image, caption, about, label in ours.values():
        i = about["n"]
        assert image == encoded(i, form=FORMS[form])
        assert label == (i % 3 if kind == "image_label" else -1)
        assert caption == (None if kind == "image_label" else CAPTIONS[i % len(CAPTIONS)])
    assert by_webdataset(out) == ours
    assert list(by_webdataset(out)) == list(ours)  # the order too
    for streaming in (True, False):
        found = by_datasets(out, form, streaming, tmp_path / "cache")
        assert found == ours
        assert list(found) == list(ours)


def test_written_shards_of_mixed_formats(tmp_path):
    """Hugging Face `datasets` wants the same members in every sample, so it is left out here."""
    write(tmp_path / "D", "image_text", list(FORMS))
    ours = by_us(tmp_path / "D")
    assert len(ours) == COUNT
    assert by_webdataset(tmp_path / "D") == ours


def test_downloaded_shards(tmp_path):
    out = tmp_path / "D"
    with serve() as server:
        paths = [f"/jpeg/{n}.jpg" for n in range(15)] + ["/missing.jpg"]
        tsv = write_list(tmp_path / "list.tsv", server, paths)
        text = tsv.read_text().splitlines()
        captions = [f"{CAPTIONS[n % len(CAPTIONS)].split()[0]} {n}" for n in range(len(text))]
        urls = [line.split("\t")[1] for line in text]
        tsv.write_text("".join(f"{c}\t{u}\n" for c, u in zip(captions, urls, strict=True)))
        done = run(command(tsv, out, processes=1))
        assert done.returncode == 0, done.stderr
        verify(out)
        ours = by_us(out)
        # A shard that is found damaged later is taken away, and the same command makes it again.
        os.truncate(out / "shards" / "00000.tar", 10_000)
        with pytest.raises(DataError, match=r"gcc\.py … --out"):
            verify(out)
        done = run(command(tsv, out, processes=1))
        assert done.returncode == 0, done.stderr
    assert verify(out).checked == 1
    assert by_us(out) == ours
    assert sorted(caption for _, caption, _, _ in ours.values()) == sorted(captions[:15])
    for _, caption, about, label in ours.values():
        assert about["caption"] == caption
        assert about["url"] == urls[captions.index(caption)]
        assert label == -1
    assert by_webdataset(out) == ours
    found = by_datasets(out, "jpg", True, tmp_path / "cache")
    assert found.keys() == ours.keys()
    for key, (image, caption, about, label) in found.items():
        assert (image, caption, label) == (ours[key][0], ours[key][1], -1)
        assert about["url"] == ours[key][2]["url"]
        assert pixels(image).shape == (about["height"], about["width"], 3)
