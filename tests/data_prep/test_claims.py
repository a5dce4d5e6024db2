"""The sets of the claims study: which class a drawing has, by the rule; parts; icons as pixels."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data_prep.claims import half_widths
from data_prep.clipart import claims_packages, concepts, packages
from data_prep.clipart.claims_classes import (
    labelled_as,
    labelled_emoji,
    make_table,
    naming,
    part_of,
)
from data_prep.clipart.concepts import Called, Concepts, called_drawing, called_emoji
from data_prep.clipart.emoji import Emoji
from data_prep.clipart.fashion import _jpeg
from data_prep.clipart.iconify import rasterise, read_icons
from data_prep.clipart.openclipart import in_test
from data_prep.clipart.wordnet import WordNet
from data_prep.clipart.write import Sample
from loaders.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]

# Lines as in WordNet's files: offset, file, kind, words, pointers to what it is a kind of.
DATA = """\
  1 the licence is indented
00000001 03 n 01 entity 0 000 | what is
00000002 03 n 01 animal 0 001 @ 00000001 n 0000 | lives
00000003 05 n 01 bird 0 001 @ 00000002 n 0000 | flies
00000004 05 n 01 turkey 0 001 @ 00000003 n 0000 | a bird
00000005 15 n 01 Turkey 0 001 @ 00000001 n 0000 | a country
00000006 13 n 02 frank 0 hot_dog 0 001 @ 00000001 n 0000 | to be eaten
00000007 05 n 01 dog 0 001 @ 00000002 n 0000 | barks
00000008 06 n 02 streamer 0 flag 0 001 @ 00000001 n 0000 | a cloth
00000009 05 n 01 puppy 0 001 @ 00000007 n 0000 | young
00000010 17 n 01 Africa 0 001 @i 00000001 n 0000 | one of its kind
00000011 07 n 01 volume 0 001 @ 00000001 n 0000 | how much
00000012 06 n 02 book 0 volume 0 001 @ 00000001 n 0000 | has pages
00000013 09 n 01 heart 0 001 @ 00000001 n 0000 | feeling
00000014 08 n 01 heart 0 001 @ 00000001 n 0000 | beats
00000015 20 n 01 simple 0 001 @ 00000001 n 0000 | heals
00000016 20 n 01 peach 0 001 @ 00000001 n 0000 | a tree
00000017 13 n 01 peach 0 001 @ 00000001 n 0000 | grows on it
00000018 05 n 01 insect 0 001 @ 00000002 n 0000 | six legs
"""
INDEX = """\
animal n 1 0 1 0 00000002
bird n 1 0 1 0 00000003
turkey n 2 1 @ 2 0 00000005 00000004
hot_dog n 1 0 1 0 00000006
dog n 1 0 1 0 00000007
flag n 1 0 1 0 00000008
puppy n 1 0 1 0 00000009
africa n 1 0 1 0 00000010
volume n 2 0 2 0 00000011 00000012
book n 1 0 1 0 00000012
heart n 2 0 2 0 00000013 00000014
simple n 1 0 1 0 00000015
peach n 2 0 2 0 00000016 00000017
insect n 1 0 1 0 00000018
"""
BIRD, TURKEY, DOG, FLAG, PUPPY = (f"n{n:08d}" for n in (3, 4, 7, 8, 9))
BOOK, HEART, PEACH, INSECT = (f"n{n:08d}" for n in (12, 14, 17, 18))


@pytest.fixture(scope="module")
def words() -> Concepts:
    return Concepts(WordNet(INDEX, DATA, "geese goose\n", "simple a 1\n", "right r 1\n"))


@pytest.mark.parametrize(
    ("phrase", "context", "concept"),
    [
        ("A sleeping Dog (B and W)", (), DOG),
        ("dogs", (), DOG),
        ("dog with bird", (), DOG),
        ("flag: Kenya", (), FLAG),
        ("hot dog", (), "n00000006"),  # a compound of its own, and no dog
        ("wild turkey", (), TURKEY),  # a country is no thing to draw
        ("volume", (), None),
        ("volume", ("entity",), BOOK),  # what stands beside it supports the rarer sense
        ("heart", (), HEART),  # first noun of the rarer sense
        ("simple", (), None),  # an adjective as well
        ("peach", (), PEACH),  # the fruit, not the tree
        ("person walking dog", (), None),
        ("Africa", (), None),  # an individual is no kind
        ("dog right", (), None),
        ("zyzzyva", (), None),
    ],
)
def test_concept_of_a_phrase(words, phrase, context, concept):
    assert words.of_phrase(phrase, frozenset(context)) == concept


FILED = [
    Called("puppy", ("dogs",)),
    Called("wild turkey", ("birds",), ("animal",)),
    Called("black flag", ("flags",)),
    Called("dog", ("books",)),
    Called("insect", ("bird",)),  # both are animals
]


@pytest.fixture(scope="module")
def believing() -> Concepts:
    concepts = Concepts(WordNet(INDEX, DATA, "geese goose\n", "simple a 1\n", "right r 1\n"))
    concepts.believe(FILED)
    return concepts


def test_a_folder_is_believed_when_its_drawings_are_what_it_says(believing):
    assert believing.believed == {"dogs": DOG, "birds": BIRD, "flags": FLAG, "bird": BIRD}


@pytest.mark.parametrize(
    ("path", "caption", "concept"),
    [
        ("animals/dogs/rex", "Rex, pet", DOG),  # the folder
        ("animals/dogs/x", "Puppy", PUPPY),  # the title is more special than the folder
        ("signs/flags/turkey", "Turkey", None),  # title and folder contradict each other
        ("animals/dogs/x", "heart", None),  # a title without a class disagrees, too
        ("animals/books/x", "Acquila", None),
        ("animals/birds/x", "Acquila, turkey", TURKEY),  # a keyword makes the folder special
        ("animals/x", "Acquila, turkey, dog", None),  # keywords that disagree
        ("animals/dogs/x", "Acquila, dogs", DOG),
        ("computer/icons/dog", "dog", None),  # named after a program
        ("office/x", "Carta, puppy", PUPPY),
    ],
)
def test_class_of_a_drawing(believing, path, caption, concept):
    found = believing.look_up(called_drawing(path, caption))
    assert believing.assign(found, {BIRD, TURKEY, DOG, FLAG, PUPPY, BOOK}) == concept


def test_without_the_special_class_the_next_one_above_it_counts(words):
    found = words.look_up(Called("puppy", ()))
    assert words.assign(found, {DOG, BIRD}) == DOG
    assert words.assign(found, {BIRD}) is None


def test_a_class_is_named_by_both_sources_and_has_enough_drawings():
    words = Concepts(WordNet(INDEX, DATA, "geese goose\n", "simple a 1\n", "right r 1\n"))
    emoji = [
        called_emoji(Emoji((0x1F436,), "animal-mammal", "dog face")),
        called_emoji(Emoji((0x1F415,), "animal-mammal", "puppy")),
        called_emoji(Emoji((0x1F983,), "animal-bird", "turkey")),
        called_emoji(Emoji((0x1F3F3,), "flag", "flag: Chad")),
    ]
    drawings = [Called("dog", ())] * (concepts.MIN_DRAWINGS - 1)
    drawings += [Called("puppy", ())] * concepts.MIN_SAID  # too few for a class: they are dogs
    drawings += [Called("turkey", ("birds",))] + [Called("", ("birds",))] * concepts.MIN_DRAWINGS
    table = make_table(words, emoji, drawings)
    # No drawing is a flag. Birds are called so by the subgroup of the turkey.
    assert table.names == ["bird", "dog"]
    assert table.ids == {BIRD: 0, DOG: 1}
    assert [table.label(called) for called in emoji] == [1, 1, 0, None]
    # The subgroup of birds has all birds.
    found = labelled_emoji(
        [Emoji((1,), "animal-bird", "turkey"), Emoji((2,), "game", "bird")], table
    )
    assert [(entry.name, label) for entry, label in found] == [("turkey", 0)]


def test_parts_hold_out_what_the_quickstart_holds_out():
    titles = [f"title {chr(97 + a)}{chr(97 + b)}" for a in range(26) for b in range(26)]
    parts = {title: part_of(title) for title in titles}
    assert all(parts[title] == "test" for title in titles if in_test(title))
    share = {part: list(parts.values()).count(part) / len(titles) for part in ("test", "val")}
    assert share == pytest.approx({"test": 0.3, "val": 0.1}, abs=0.05)
    assert part_of("Crawfish 2 (B and W)") == part_of("crawfish")  # variants stay together


def test_a_class_without_training_drawings_is_no_label_of_a_test():
    def drawings(*labels):
        return [Sample(b"", "a caption", label, "package", str(i), "")
                for i, label in enumerate(labels)]  # fmt: skip

    found = labelled_as(drawings(0, None, 2), drawings(2, 1, 0, None))
    assert [sample.label for sample in found] == [2, None, 0, None]
    assert [sample.origin for sample in found] == ["0", "1", "2", "3"]


def test_captions_that_name_a_class():
    captions = ["Two Dogs, bird", "ice cream cone", "hot-dogma", "a creamy ice"]
    assert naming(captions, ["dog", "bird", "ice cream"]) == {
        "": 2,
        "dog": 1,
        "bird": 1,
        "ice cream": 1,
    }


def tgz(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


def test_svg_of_an_icon_has_the_frame_of_its_package(tmp_path):
    icons = {
        "height": 24,
        "width": 24,
        "icons": {"wide": {"body": "<g/>", "width": 30}, "plain": {"body": "<b/>"}},
        "aliases": {"other": {"parent": "plain"}},
    }
    found = read_icons(tgz(tmp_path / "x.tgz", {"package/icons.json": json.dumps(icons)}))
    assert list(found) == ["plain", "wide"]
    assert 'viewBox="0 0 30 24"' in found["wide"]
    assert 'color="black"' in found["plain"]


def test_another_licence_than_the_stated_one_is_refused(tmp_path):
    info = json.dumps({"license": {"spdx": "GPL-3.0"}})
    archive = tgz(tmp_path / "x.tgz", {"package/info.json": info})
    with pytest.raises(DataError, match=r"info\.json says GPL-3\.0, not MIT"):
        claims_packages.check_licence(claims_packages.TABLER, archive)


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node.js here")
def test_svg_becomes_pixels():
    try:
        resvg = packages.fetch(claims_packages.RESVG.package, packages.default_cache())
    except packages.PackageUnavailable as error:
        pytest.skip(str(error))
    head = '<svg xmlns="http://www.w3.org/2000/svg" color="black" width="4" height="4">'
    half = f'{head}<rect width="2" height="4" fill="currentColor"/></svg>'
    left, nothing = rasterise([half, "no svg"], resvg)
    pixels = np.asarray(left)
    assert pixels.shape == (128, 128, 4)
    assert (pixels[:, :64] == (0, 0, 0, 255)).all()
    assert (pixels[:, 64:, 3] == 0).all()
    assert nothing is None


def test_missing_node_is_named(tmp_path, monkeypatch):
    archive = tgz(tmp_path / "x.tgz", {"package/index.mjs": ""})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="`node`"):
        list(rasterise(["<svg/>"], archive))


def test_share_alike_and_gpl_sets_are_not_for_training_and_nothing_is_shipped():
    assert "data/claims/" in (REPOSITORY / ".gitignore").read_text().split()
    rows = yaml.safe_load((REPOSITORY / "eval" / "datasets.yaml").read_text())
    for name in rows["collections"]["claims"]:
        row = rows["datasets"][name]
        assert row["optional"]
        assert row["obtain"] == "python data_prep/claims.py"
        assert all(part["path"].startswith("data/claims/") for part in row["splits"].values())
    text = claims_packages.attribution()
    for source in claims_packages.ALL:
        assert f"`{source.package.name}` | {source.package.version}" in text


def test_pictures_keep_their_colours_in_fashion():
    grey = np.full((28, 28), 200, np.uint8)
    with Image.open(io.BytesIO(_jpeg(grey))) as image:
        assert (image.mode, image.size) == ("RGB", (28, 28))
        assert np.abs(np.asarray(image).astype(int) - 200).max() <= 1


def test_half_widths_are_the_spread_of_drawn_accuracies():
    counts, accuracy = [1, 4, 16, 79], 0.3
    drawn = np.random.default_rng(0).binomial(counts, accuracy, (20000, 4))
    top1 = 100 * drawn.sum(1) / sum(counts)
    mean_per_class = 100 * (drawn / counts).mean(1)
    found = half_widths(counts, 30)
    assert found["top1"] == pytest.approx(1.96 * top1.std(), rel=0.03)
    assert found["mean_per_class"] == pytest.approx(1.96 * mean_per_class.std(), rel=0.03)
    assert half_widths([], 30) == {"top1": 0.0, "mean_per_class": 0.0}
