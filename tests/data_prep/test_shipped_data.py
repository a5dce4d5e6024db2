"""The quick-start data in the repository: complete, well formed, lawful to ship, no leaks."""

import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders.manifest import open_shards

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "data" / "quickstart"
SETS = ("emoji_train", "emoji_twemoji", "openclipart_train", "openclipart_test")
# Samples, samples with a class, classes that occur.
COUNTS = {
    "emoji_train": (1601, 1601, 28),
    "emoji_twemoji": (931, 931, 28),
    "openclipart_train": (4068, 1155, 29),
    "openclipart_test": (1091, 318, 28),
}
MAX_BYTES = 38_000_000


def manifest(name: str) -> dict:
    return json.loads((DATA / name / "manifest.json").read_text(encoding="utf-8"))


def provenance(name: str) -> list[dict]:
    lines = (DATA / name / "provenance.tsv").read_text(encoding="utf-8").splitlines()
    columns = lines[0].split("\t")
    return [dict(zip(columns, line.split("\t"), strict=True)) for line in lines[1:]]


@pytest.mark.parametrize("name", SETS)
def test_counts_and_kind(name):
    shards = open_shards(str(DATA / name))
    labelled = shards.labels[shards.labels >= 0]
    assert (len(shards), len(labelled), len(np.unique(labelled))) == COUNTS[name]
    assert shards.kind == ("image_label" if name.startswith("emoji") else "image_text")
    assert shards.labels.max() < len(shards.classes) == 29


@pytest.mark.parametrize("name", SETS)
def test_shards_and_provenance_are_what_the_manifest_says(name):
    content = manifest(name)
    listed = {shard["file"] for shard in content["shards"]}
    assert listed == {f"shards/{path.name}" for path in (DATA / name / "shards").glob("*.tar")}
    for shard in content["shards"]:
        data = (DATA / name / shard["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    table = (DATA / name / "provenance.tsv").read_bytes()
    assert hashlib.sha256(table).hexdigest() == content["provenance_sha256"]
    assert len(provenance(name)) == content["num_samples"]


@pytest.mark.parametrize("name", SETS)
def test_every_image_is_64_pixel_rgb_and_shows_something(name):
    shards = open_shards(str(DATA / name))
    for index in range(len(shards)):
        with Image.open(io.BytesIO(shards.read_image(index))) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (64, 64), "RGB")
            pixels = np.asarray(image)
        assert pixels.min() < 230, f"{name} {shards.key(index)} is blank"


@pytest.mark.parametrize("name", ["openclipart_train", "openclipart_test"])
def test_captions_are_clean(name):
    shards = open_shards(str(DATA / name))
    for index in range(len(shards)):
        caption = shards.read_text(index)
        assert caption == " ".join(caption.split()), caption
        assert any(character.isalpha() for character in caption)
        assert not re.search(r"&\w+;|\bhash\b|0x[0-9a-f]{5}|\t|_", caption), caption


def test_one_class_table_for_all_sets_and_the_prompts():
    prompts = json.loads((REPOSITORY / "prompts" / "quickstart.json").read_text(encoding="utf-8"))
    tables = [manifest(name)["classes"] for name in SETS]
    assert all(table == prompts["classes"] for table in tables)
    assert [entry["id"] for entry in prompts["classes"]] == list(range(29))
    names = [name for entry in prompts["classes"] for name in entry["names"]]
    assert len(set(names)) == len(names)
    planet = next(entry["id"] for entry in prompts["classes"] if "planet" in entry["names"])
    assert planet not in open_shards(str(DATA / "emoji_train")).labels  # the unseen class


def test_emoji_styles_are_apart():
    packages = {name: {row["package"].split()[1] for row in provenance(name)} for name in SETS[:2]}
    assert packages["emoji_train"] == {"fonts-noto-color-emoji", "@lobehub/fluent-emoji-3d"}
    assert packages["emoji_twemoji"] == {"emoji-datasource-twitter"}
    concepts = {row["title"] for row in provenance("emoji_train")}
    assert {row["title"] for row in provenance("emoji_twemoji")} == concepts


def letters(text: str) -> str:
    """Title without brackets, case, digits, spaces and punctuation."""
    return re.sub(r"[\W\d_]+", "", re.sub(r"\(.*", "", text.lower())) or text.lower()


def test_open_clip_art_test_side_does_not_leak():
    sides = {}
    for name in ("openclipart_train", "openclipart_test"):
        shards = open_shards(str(DATA / name))
        images = [shards.read_image(index) for index in range(len(shards))]
        rows = provenance(name)
        sides[name] = {
            "caption": {shards.read_text(index).lower() for index in range(len(shards))},
            "title": {letters(row["title"]) for row in rows},
            "file": {row["file"] for row in rows},
            "image": {hashlib.sha1(image).digest() for image in images},
        }
        assert len(sides[name]["image"]) == len(images)
        assert len(sides[name]["file"]) == len(images)
    for what, found in sides["openclipart_train"].items():
        assert not found & sides["openclipart_test"][what], what


def test_no_test_drawing_looks_like_a_training_drawing():
    def thumbnails(name):
        shards = open_shards(str(DATA / name))
        pictures = (Image.open(io.BytesIO(shards.read_image(i))) for i in range(len(shards)))
        return np.stack(
            [np.asarray(picture.resize((8, 8), 4), float).ravel() for picture in pictures]
        )

    train, test = thumbnails("openclipart_train"), thumbnails("openclipart_test")
    squared = (train**2).sum(1)[:, None] + (test**2).sum(1)[None] - 2 * train @ test.T
    # Coarser than the 16 x 16 thumbnails of the build, so the distance here is smaller as well.
    assert np.sqrt(np.maximum(squared, 0).min() / train.shape[1]) > 1.0


def test_only_art_that_may_be_shipped():
    allowed = {
        "fonts-noto-color-emoji": "noto-emoji_Apache-2.0.txt",
        "@lobehub/fluent-emoji-3d": "fluent-emoji-3d_MIT.txt",
        "emoji-datasource-twitter": "twemoji_CC-BY-4.0.txt",
        "openclipart-png": "openclipart_public-domain.txt",
        "openclipart-svg": "openclipart_public-domain.txt",
    }
    attribution = (DATA / "LICENSES" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for name in SETS:
        content = manifest(name)
        for part in content["source"].split("; "):
            package, version = part.split()[1:]
            assert package in allowed, f"{name} takes art from {package}"
            text = DATA / "LICENSES" / allowed[package]
            assert len(text.read_text(encoding="utf-8")) > 500
            assert package in attribution
            assert version in attribution
            assert text.name in attribution
        assert {row["package"] for row in provenance(name)} <= set(content["source"].split("; "))
        words = f"{content['source']} {content['license']}".lower()
        for forbidden in ("gpl", "-sa", "sharealike", "openmoji", "gemojione", "apple", "tuxpaint"):
            assert forbidden not in words
    assert "Apache License" in (DATA / "LICENSES" / "noto-emoji_Apache-2.0.txt").read_text()
    assert (
        "creativecommons.org/licenses/by/4.0/legalcode"
        in (DATA / "LICENSES" / "twemoji_CC-BY-4.0.txt").read_text()
    )


def test_size_on_disk_and_nothing_unexpected():
    ignored = {"stamps", ".index"}
    files = [
        path
        for path in DATA.rglob("*")
        if path.is_file() and not ignored & set(path.relative_to(DATA).parts)
    ]
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    assert {path.relative_to(DATA).parts[0] for path in files} == {*SETS, "LICENSES"}
    assert "data/quickstart/stamps/" in (REPOSITORY / ".gitignore").read_text().split()
