"""Building the quick-start data: cleaning rules, classes, tars, and one real rebuild."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_prep.clipart import packages
from data_prep.clipart.classes import (
    EMOJI_MOVED,
    EMOJI_SUBGROUPS,
    NOT_OF_ITS_FOLDER,
    OPENCLIPART_FOLDERS,
    STAMP_FOLDERS,
    class_ids,
    emoji_class,
    openclipart_class,
    stamp_class,
)
from data_prep.clipart.emoji import parse_emoji_test
from data_prep.clipart.openclipart import (
    Drawing,
    clean_keywords,
    clean_text,
    collection_titles,
    drop_lookalikes,
    in_test,
    normalise_title,
    parse_metadata,
    title_of,
)
from data_prep.clipart.write import Sample, render, write_set, write_tar
from loaders.errors import DataError
from loaders.manifest import open_shards

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "data_prep" / "quickstart.py"

SVG = b"""<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
 xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/">
 <title>not this one</title>%s<metadata><rdf:RDF><cc:Work rdf:about="">
 <dc:title>Apple Bitten</dc:title>
 <dc:creator><cc:Agent><dc:title>A. Painter</dc:title></cc:Agent></dc:creator>
 <dc:subject><rdf:Bag><rdf:li>food</rdf:li><rdf:li></rdf:li><rdf:li>apple</rdf:li></rdf:Bag>
 </dc:subject><cc:license rdf:resource="%s"/></cc:Work></rdf:RDF></metadata></svg>"""
PUBLIC_DOMAIN = b"http://web.resource.org/cc/PublicDomain"


def test_metadata_of_a_drawing():
    drawing = parse_metadata("food/apple", SVG % (b"", PUBLIC_DOMAIN))
    assert drawing == Drawing("food/apple", "Apple Bitten", ("food", "", "apple"), True)


@pytest.mark.parametrize(
    ("body", "licence", "usable"),
    [
        (b"", b"http://creativecommons.org/licenses/publicdomain/", True),
        (b"", b"http://creativecommons.org/licenses/GPL/2.0/", False),
        (b"", b"", False),
        (b'<image xlink:href="data:image/png;base64,AAAA"/>', PUBLIC_DOMAIN, True),
        (b'<image xlink:href="file:///home/me/duck.png"/>', PUBLIC_DOMAIN, False),
    ],
)
def test_only_complete_public_domain_drawings_are_usable(body, licence, usable):
    assert parse_metadata("x", SVG % (body, licence)).usable is usable


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("B &amp;amp; W", "B & W"),
        ("a < b &amp; c", "a < b & c"),
        ("chauss\u00c3\u00a9e", "chaussée"),
        ("signs_and_symbols \n traffic", "signs and symbols traffic"),
    ],
)
def test_clean_text(raw, clean):
    assert clean_text(raw) == clean


@pytest.mark.parametrize(
    ("path", "title", "expected"),
    [
        ("a/guitar_jarno_1", "guitar2", "guitar"),
        ("a/x", "Dog 04 Drawn With Straight Lines", "Dog Drawn With Straight Lines"),
        ("a/x", "45 RPM Record", "45 RPM Record"),
        ("a/x", "BlueMan#12", "BlueMan"),
        ("recreation/toys/rubik", "Clipart by Nicu Buculei - piggybank", "rubik"),
        ("a/shop_front-2", "Part of the Flat Icon Collection (Wed Aug 25)", "shop front"),
        ("a/DangerGeneral", "shared", "Danger General"),
        ("a/aiga_lost_and_found_", "AIGA_Symbol_Signs", "lost and found"),
        ("a/fc12", "Clipart by Nicu Buculei - fc23", "flowchart"),
        ("a/ostrich", "", "ostrich"),
    ],
)
def test_title(path, title, expected):
    drawing = Drawing(path, title, ("hash", "flowchart", "shape"), True)
    assert title_of(drawing, frozenset({"shared"})) == expected


def test_title_of_many_different_drawings_names_a_collection():
    names = "ant bee cat dog eel fox gnu hen".split()  # noqa: SIM905
    animals = [Drawing(f"a/{name}", "Animals", (), True) for name in names]
    variants = [Drawing(f"a/tree_{n}", "Tree", (), True) for n in range(20)]
    assert collection_titles(animals + variants) == {"Animals"}
    assert collection_titles(animals[1:] + variants) == frozenset()


def test_keywords():
    raw = ["hash", "", "0x87fadcc", "11", "food", "Apple", "HASH(0x85a0c44)", "Food", "map_symbol"]
    assert clean_keywords(raw, "apple") == ["food", "map symbol"]
    assert len(clean_keywords([f"word {letter}" for letter in "abcdefghijkl"], "t")) == 8


@pytest.mark.parametrize(
    "variants",
    [
        ("Crawfish", "Crawfish (B and W)", "crawfish 2"),
        ("flan bw", "Flan"),
        ("Ice Cream Cone (1 Scoop)", "Ice Cream Cones (2 scoop) (B and W)"),
        ("The Moon", "moons"),
        ("Baby-Tux", "Baby Tux 03", "BabyTux"),
    ],
)
def test_variants_of_a_drawing_share_title_and_side(variants):
    assert len({normalise_title(title) for title in variants}) == 1
    assert len({in_test(title) for title in variants}) == 1


def test_split_is_a_fifth_and_titles_differ():
    titles = [f"{a}{b}{c} thing" for a in "bcdfgklm" for b in "aeiou" for c in "klmnprst"]
    assert len({normalise_title(title) for title in titles}) == len(titles)
    held_out = sum(map(in_test, titles))
    assert 0.12 * len(titles) < held_out < 0.28 * len(titles)  # 3.6 standard deviations
    assert normalise_title("123 (4)") == "123 (4)"  # nothing left: the title itself


EMOJI_TEST = """# group: Animals & Nature
# subgroup: animal-mammal
1F435                                                  ; fully-qualified     # 🐵 E0.6 monkey face
1F43E                                                  ; fully-qualified     # 🐾 E0.6 paw prints
# group: Objects
# subgroup: clothing
1F6CD FE0F                                             ; fully-qualified     # 🛍️ E0.7 shopping bags
1F6CD                                                  ; unqualified         # 🛍 E0.7 shopping bags
# subgroup: hand-fingers-open
1F44B                                                  ; fully-qualified     # 👋 E0.6 waving hand
1F44B 1F3FB                                            ; fully-qualified     # 👋🏻 E1.0 waving hand: light skin tone
"""  # noqa: E501


def test_emoji_list():
    emoji = parse_emoji_test(EMOJI_TEST)
    assert [entry.name for entry in emoji] == [
        "monkey face",
        "paw prints",
        "shopping bags",
        "waving hand",
    ]
    bags = emoji[2]
    assert (bags.code_points, bags.key) == ((0x1F6CD, 0xFE0F), "1f6cd")
    assert bags.subgroup == "clothing"
    assert bags.text == "\N{SHOPPING BAGS}\N{VARIATION SELECTOR-16}"


@pytest.mark.parametrize(
    ("subgroup", "name", "expected"),
    [
        ("animal-mammal", "monkey face", "mammal"),
        ("animal-mammal", "paw prints", None),
        ("country-flag", "flag: Kenya", "flag"),
        ("transport-ground", "stop sign", "road sign"),
        ("sky & weather", "ringed planet", None),
        ("zodiac", "Aries", None),
    ],
)
def test_emoji_class(subgroup, name, expected):
    assert emoji_class(subgroup, name) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("animals/mammals/dogs/beagle", "mammal"),
        ("animals/birds/duck_yellow_02", None),
        ("transportation/vehicles/car", "land vehicle"),
        ("transportation/vehicles/trawler_01", "boat"),
        ("transportation/vehicles/quay_sign_01", "road sign"),
        ("transportation/vehicles/rocket", None),
        ("plants/trees/bowsaw_benji_park_01", None),
        ("office/pencil", None),
    ],
)
def test_openclipart_class(path, expected):
    assert openclipart_class(path) == expected


def test_class_tables_agree():
    names = set(class_ids())
    assert len(names) == 29
    assert set(OPENCLIPART_FOLDERS) == names
    assert set(EMOJI_SUBGROUPS) == names - {"planet"}
    assert set(STAMP_FOLDERS) < names
    assert set(EMOJI_MOVED.values()) <= names
    subgroups = [s for group in EMOJI_SUBGROUPS.values() for s in group]
    assert len(set(subgroups)) == len(subgroups)
    folders = {prefix for value in OPENCLIPART_FOLDERS.values() for prefix in value.split()}
    assert set(NOT_OF_ITS_FOLDER) <= folders
    assert stamp_class("animals/fish/cod.png") == "fish or sea animal"
    assert stamp_class("symbols/math/plus.png") is None


def drawing(size, box, colour, page=(255, 255, 255, 0)):
    image = Image.new("RGBA", size, page)
    ImageDraw.Draw(image).rectangle(box, fill=colour)
    return image


def decode(jpeg):
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(int)


def test_render_crops_the_empty_page_keeps_the_aspect_and_centres():
    # A red bar of 40 x 10 in the corner of a transparent page → 64 x 16, rows 24 to 39.
    pixels = decode(render(drawing((400, 300), (10, 20, 49, 29), (255, 0, 0, 255))))
    assert pixels.shape == (64, 64, 3)
    red = (pixels[..., 1] < 128).nonzero()
    assert (red[0].min(), red[0].max(), red[1].min(), red[1].max()) == (24, 39, 0, 63)
    assert pixels[0, 0].min() > 245


def test_render_keeps_white_that_belongs_to_the_drawing():
    # The flag of Japan: opaque white around a disc must not be cropped.
    pixels = decode(render(drawing((90, 60), (30, 15, 59, 44), (190, 0, 40, 255), (255,) * 4)))
    columns = (pixels[..., 1] < 128).any(0).nonzero()[0]
    assert 19 <= columns.min() <= 23
    assert 40 <= columns.max() <= 44


def test_render_composites_on_white():
    half = decode(render(drawing((64, 64), (0, 0, 63, 63), (0, 0, 0, 128))))
    assert abs(half.mean() - 127) < 2


@pytest.mark.parametrize("colour", [(255, 255, 255, 255), (0, 0, 0, 5), (253, 253, 253, 255)])
def test_render_refuses_what_is_invisible_on_white(colour):
    assert render(drawing((50, 50), (5, 5, 40, 40), colour)) is None


def test_render_reads_other_modes():
    grey = render(Image.new("L", (30, 60), 100))
    palette = Image.new("P", (30, 60), 3)
    palette.putpalette([0] * 9 + [0, 0, 200])
    assert decode(grey)[32, 32].tolist() == pytest.approx([100] * 3, abs=3)
    assert decode(render(palette))[32, 32].tolist() == pytest.approx([0, 0, 200], abs=6)


def sample(level, text, label, origin):
    return Sample(render(Image.new("RGB", (64, 64), (level,) * 3)), text, label, "p", origin, text)


def test_lookalikes_are_dropped():
    train = [sample(level, "a", None, str(level)) for level in (100, 103, 104, 140)]
    kept = drop_lookalikes(train, [sample(100, "b", None, "t"), sample(200, "c", None, "u")])
    assert [s.origin for s in kept] == ["104", "140"]  # 4 levels are the limit


def test_tar_depends_on_contents_only(tmp_path):
    members = [("000000000.jpg", b"picture"), ("000000000.txt", "é".encode())]
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "b.tar", iter(members))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        for info, (name, data) in zip(archive.getmembers(), members, strict=True):
            assert (info.name, info.mtime, info.uid, info.gid) == (name, 0, 0, 0)
            assert (info.uname, info.gname, info.mode) == ("", "", 0o644)
            assert archive.extractfile(info).read() == data


def test_set_does_not_depend_on_the_order_of_the_samples(tmp_path):
    classes = [{"id": 0, "synset": None, "names": ["dark"]}]
    samples = [
        sample(10 + n % 200, f"grey {n}", 0 if n % 2 else None, f"f{n}") for n in range(1003)
    ]
    written = []
    for folder, given in (("a", samples), ("b", samples[::-1])):
        target = tmp_path / folder / "greys"
        stale = target / "shards" / "00007.tar"
        stale.parent.mkdir(parents=True)
        stale.write_bytes(b"of an earlier build")
        write_set(target, "image_text", given, classes, "s", "l", attempted=2000)
        written.append((target / "manifest.json").read_bytes())
    assert written[0] == written[1]
    manifest = json.loads(written[0])
    assert [shard["samples"] for shard in manifest["shards"]] == [1000, 3]
    assert manifest["yield"] == {"attempted": 2000, "kept": 1003}
    shards = open_shards(str(tmp_path / "a" / "greys"))
    by_text = {s.text: s for s in samples}
    texts = [shards.read_text(i) for i in range(len(shards))]
    assert sorted(texts) == sorted(by_text)
    assert texts[:20] != [s.text for s in samples[:20]]  # mixed
    for index, text in enumerate(texts):
        assert shards.read_image(index) == by_text[text].image
        assert shards.labels[index] == (-1 if by_text[text].label is None else 0)


TINY = packages.Package("tiny", "1.0", "npm", "tiny-1.0.tgz", hashlib.sha256(b"tiny").hexdigest())


def test_a_changed_package_in_the_cache_is_refused(tmp_path):
    (tmp_path / TINY.file).write_bytes(b"tiny")
    assert packages.fetch(TINY, tmp_path) == tmp_path / TINY.file
    (tmp_path / TINY.file).write_bytes(b"tinY")
    with pytest.raises(DataError, match=r"tiny-1\.0\.tgz: SHA-256 is .* delete the file"):
        packages.fetch(TINY, tmp_path)


def test_missing_client_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(packages.PackageUnavailable, match=r"`npm` is not installed.*put it at"):
        packages.fetch(TINY, tmp_path / "cache")


@pytest.mark.skipif(not Path("/usr/bin/apt-get").exists(), reason="no apt-get here")
def test_version_that_does_not_exist_says_what_to_do(tmp_path):
    absent = replace(packages.UNICODE_DATA, version="0.0-none", file="none.deb")
    with pytest.raises(
        packages.PackageUnavailable, match=r"unicode-data 0\.0-none.*apt-get update"
    ):
        packages.fetch(absent, tmp_path)
    assert list(tmp_path.iterdir()) == []  # no half-finished download stays


def test_members_of_a_tgz(tmp_path):
    path = tmp_path / "x.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("./package/a.png", "package/b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("package/c.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        archive.addfile(link)
    members = packages.read_members(path, lambda name: name.endswith(".png"))
    assert list(members) == [("package/a.png", b"abc")]


def test_script_ends_with_one_line_and_exit_code_3(tmp_path):
    (tmp_path / packages.UNICODE_DATA.file).write_bytes(b"not the package")
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "o"), "--cache", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
