"""Several captions of an image: how they are known, and that one is drawn."""

import json
import random
from collections import Counter

import pytest

from loaders.batch import make_loader
from loaders.errors import DataError
from loaders.labels import caption_group
from loaders.manifest import CAPTION_LINES, open_shards, write_manifest
from loaders.texts import (
    BadText,
    TextOptions,
    count_captions,
    draw_captions,
    read_caption,
    read_captions,
)
from tests.loaders.conftest import sample, write_tar
from tests.loaders.test_batch import make_dataset, make_order, read_back

FIVE = ["a red cat", "the cat", "one cat sits", "cat", "red"]
LINES = "\n".join(FIVE).encode()
ABOUT = {"source": "-", "license": "-", "date": "2026-01-31", "attempted": 9}


def our_set(place, extra, **parts):
    """A set with a manifest and one tar of nine equal samples."""
    members = [m for n in range(9) for m in sample(f"{n:09d}", n, **parts)]
    write_tar(place / "shards" / "00000.tar", members)
    write_manifest(place, "set", "image_text", None, **ABOUT, extra=extra)
    return place


def by_manifest(place):
    return our_set(place, {CAPTION_LINES: True}, txt=LINES)


def by_older_list_of_declip(place):
    extra = {"tool": "data_prep/yfcc.py", "identity": {"list": "declip"}}
    return our_set(place, extra, txt=LINES + b"\n\n")


def by_their_json(place):
    """As flickr30k.py and coco.py have always written them; here without their manifest."""
    about = json.dumps({"captions": FIVE}).encode()
    our_set(place, {}, txt=LINES, json=about)
    (place / "manifest.json").unlink()
    return place


def by_clip_benchmark(place):
    members = [
        m for n in range(9) for m in sample(f"{n:09d}", n, txt=LINES.replace(b"\n", b"\r\n"))
    ]
    write_tar(place / "test" / "0.tar", members)
    (place / "dataset_type.txt").write_bytes(b"\xef\xbb\xbfRetrieval\r\n")
    return place / "test"


def by_links_to_clip_benchmark(place):
    """As data_prep/import_shards.py makes them."""
    tar = by_clip_benchmark(place / "theirs") / "0.tar"
    (place / "ours").mkdir()
    (place / "ours" / "0.tar").symlink_to(tar)
    return place / "ours"


WAYS = (
    by_manifest,
    by_older_list_of_declip,
    by_their_json,
    by_clip_benchmark,
    by_links_to_clip_benchmark,
)


@pytest.mark.parametrize("make", WAYS)
def test_lines_that_are_captions_are_drawn_one_at_a_time(tmp_path, make):
    shards = open_shards(make(tmp_path / "set"))
    assert shards.kind == "image_text"
    assert [read_captions(shards, i, "txt") for i in range(9)] == [FIVE] * 9
    assert count_captions(shards, "txt", 4) == [5] * 4
    dataset = make_dataset([shards], "none")
    drawn = [read_back(dataset[step, 0, 3]["text"][0]) for step in range(100)]
    assert Counter(drawn).keys() == set(FIVE)
    assert len({read_back(dataset[0, position, 3]["text"][0]) for position in range(40)}) == 5
    again = make_dataset([open_shards(shards.shards[0].path)], "none")
    assert [read_back(again[step, 0, 3]["text"][0]) for step in range(9)] == drawn[:9]


def test_workers_draw_the_same(tmp_path):
    shards = open_shards(by_manifest(tmp_path / "set"))
    dataset, order = make_dataset([shards], "none"), make_order([shards])
    found = []
    for workers, micro_batch in ((0, 8), (1, 4)):
        batches = make_loader(dataset, order, 0, 1, micro_batch, 0, 2, workers)
        found.append([read_back(row[0]) for batch in batches for row in batch["text"]])
    assert found[0] == found[1]
    assert len(set(found[0])) > 1


def test_a_list_in_json_is_several_captions(tmp_path):
    mixed = ["", 5, "\ud800", None, "\ufeffok ", {}]
    values = [FIVE, " one\r\nlines stay ", mixed, [], [3, ""], [" "], 7]
    members = []
    for number, value in enumerate(values):
        members += sample(str(number), number, json=json.dumps({"c": value}).encode())
    shards = open_shards(write_tar(tmp_path / "0.tar", members))
    found = []
    for index in range(len(values)):
        try:
            found.append(read_captions(shards, index, "json.c"))
        except BadText as error:
            found.append(error.reason)
    assert found == [
        FIVE, ["one\nlines stay"], ["ok"], "no_caption", "caption_not_text", "empty_caption",
        "caption_not_text",
    ]  # fmt: skip
    assert count_captions(shards, "json.c", 9) == [5, 1, 1]
    dataset = make_dataset([shards], "none", texts=TextOptions(["{}"], "json.c"))
    assert {read_back(dataset[step, 0, 2]["text"][0]) for step in range(9)} == {"ok"}
    assert dataset[0, 0, 4]["bad"][0].reason == "caption_not_text"


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"json": json.dumps({"captions": FIVE[:4]}).encode()},
        {"json": json.dumps({"captions": [*FIVE[:4], 5]}).encode()},
        {"json": json.dumps({"captions": "\n".join(FIVE)}).encode()},
        {"json": b"[broken"},
    ],
)
def test_lines_that_nothing_marks_are_one_caption(tmp_path, parts):
    write_tar(tmp_path / "set" / "test" / "0.tar", sample("a", txt=LINES, **parts))
    (tmp_path / "set" / "dataset_type.txt").write_text("classification")
    shards = open_shards(tmp_path / "set" / "test")
    assert read_captions(shards, 0, "txt") == ["\n".join(FIVE)] == [read_caption(shards, 0, "txt")]


def test_each_tar_of_a_joined_set_keeps_its_meaning(tmp_path):
    one = by_clip_benchmark(tmp_path / "one")
    write_tar(tmp_path / "two" / "0.tar", sample("a", txt=LINES))
    shards = open_shards(f"{one}::{tmp_path}/two")
    assert [len(read_captions(shards, i, "txt")) for i in (0, 9)] == [5, 1]


def test_views_of_a_sample_repeat_no_caption_before_all_were_drawn(tmp_path):
    assert draw_captions(["one"], 3, random.Random(0)) == ["one"] * 3
    counts = Counter(draw_captions(FIVE, 12, random.Random(0)))
    assert set(counts.values()) == {2, 3}
    firsts = Counter(draw_captions(FIVE, 2, random.Random(seed))[0] for seed in range(5000))
    assert all(abs(count - 1000) < 5 * 1000**0.5 for count in firsts.values())
    shards = open_shards(by_manifest(tmp_path / "set"))
    dataset = make_dataset(
        [shards], "none", texts=TextOptions(["{}"], views=3), caption_labels="by_text"
    )
    for step in range(9):
        made = dataset[step, 0, 0]
        texts = [read_back(row) for row in made["text"]]
        assert len(set(texts)) == 3
        assert made["label"] == caption_group(texts[0])


@pytest.mark.parametrize(
    ("parts", "source", "words"),
    [
        (
            {"json": b'{"url": "u", "n": 1, "caption": "a cat"}'}, "txt",
            r"10 bad samples in a row.*0\.tar, sample 'k\d', no_caption as all.*data\.caption=txt "
            r"finds no caption: the sample holds '\.jpg', '\.json', its \.json the keys 'url', 'n',"
            r" 'caption'; use data\.caption=json\.caption$",
        ),
        (
            {"json": b'{"captions": ["a"]}', "txt": b"a"}, "json.caption",
            r"use data\.caption=json\.captions or data\.caption=txt$",
        ),
        ({"json": b'{"alt": "a"}'}, "txt", r"keys 'alt'; use data\.caption=json\.KEY with the key"),
        ({"json": b'{"caption": 5}'}, "json.caption", "caption_not_text.*write the shards again"),
        (
            {"cap": b"a cat"}, "txt",
            r"holds '\.cap', '\.jpg'\. Read are images as \.jpg.*captions as \.txt or in \.json",
        ),
    ],
)  # fmt: skip
def test_a_source_without_captions_is_refused_before_a_run(tmp_path, parts, source, words):
    members = [m for n in range(9) for m in sample(f"k{n}", n, **parts)]
    shards = open_shards(write_tar(tmp_path / "0.tar", members))
    dataset = make_dataset([shards], "none", texts=TextOptions(["{}"], source))
    with pytest.raises(DataError, match=words):
        dataset.try_sources()


def test_single_bad_samples_refuse_no_run(tmp_path, labelled):
    members = [*sample("bad", jpg=b"junk", txt=b"x"), *sample("empty", txt=b"")]
    members += sample("good", txt=b"fine")
    sources = [open_shards(labelled), open_shards(write_tar(tmp_path / "0.tar", members))]
    dataset = make_dataset(sources, "none", tokenizer=lambda texts: 1 / 0)  # workers will need it
    random.seed(1)
    state = random.getstate()
    dataset.try_sources()
    assert random.getstate() == state


def test_images_of_other_names_are_told_by_their_extensions(tmp_path):
    members = [(f"{n:03}.{end}", b"x") for n in range(400) for end in ("gif", "txt")]
    shards = open_shards(write_tar(tmp_path / "0.tar", [*members, *sample("z", txt=b"a")]))
    with pytest.raises(DataError, match=r"no_image as all.*holds '\.gif', '\.txt'\. Read are"):
        make_dataset([shards], "none").try_sources()
