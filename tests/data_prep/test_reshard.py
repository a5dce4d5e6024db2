"""reshard.py: what is chosen, that bytes stay, expressions, restart after kill -9."""

import hashlib
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest

from data_prep import reshard
from data_prep.sets import set_folder
from data_prep.verify import verify
from loaders.errors import DataError
from loaders.manifest import open_shards, write_manifest
from loaders.texts import read_captions
from tests.loaders.conftest import encoded, sample, write_tar

SCRIPT = Path(__file__).resolve().parents[2] / "data_prep" / "reshard.py"
CLASSES = [{"id": i, "synset": f"n{i:08d}", "names": [n]} for i, n in enumerate(("cat", "dog"))]
SHARDS = (9, 4, 10)
TOTAL = sum(SHARDS)


def parts_of(n: int) -> dict[str, bytes]:
    """Members of sample n: every third without json, some with further members."""
    about = {"caption": f"a {('cat', 'Dog')[n % 2]} {n}", "width": 10 * n, "note": None}
    parts = {"cls": b"%d\n" % (n % 2), "seg.png": encoded(n, (4, 4), "PNG")}
    if n % 3:
        parts["json"] = json.dumps(about, indent=2).encode()
    if n % 4:
        parts["txt"] = about["caption"].encode()
    return parts


def make_set(place: Path, name: str, kind="image_label", classes=CLASSES, first=0) -> Path:
    """A set of three shards with a manifest; keys start at 0 in each shard."""
    n = first
    for shard, count in enumerate(SHARDS):
        members = []
        for row in range(count):
            members += sample(f"{row:09d}", n, **parts_of(n))
            n += 1
        write_tar(place / "shards" / f"{shard:05d}.tar", members)
    about = {"source": f"source of {name}", "license": "CC0", "date": "2026-01-31"}
    write_manifest(place, name, kind, classes, attempted=TOTAL, **about)
    return place


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("sets") / "toy", "toy")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Function: (name of the new set, inputs and options) -> its folder."""

    def call(name, *arguments):
        options = ["--out", tmp_path / name, "--samples-per-shard", 5]
        monkeypatch.setattr(sys, "argv", ["reshard.py", *map(str, [*arguments, *options])])
        reshard.main()
        return tmp_path / name

    return call


def contents(place: Path) -> dict[str, dict[str, bytes]]:
    """Members by shard/key of all tars, read by the standard library."""
    found = {}
    for path in sorted((place / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                parts = found.setdefault(f"{path.stem}/{key}", {})
                parts[extension] = tar.extractfile(member).read()
    return found


def origins(place: Path) -> list[str]:
    """Origins in the order of the new set."""
    return [json.loads(parts["json"])["origin"] for parts in contents(place).values()]


def tars(place: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((place / "shards").glob("*.tar"))]


# What is copied.


def test_members_are_copied_byte_by_byte(made, run):
    old, out = contents(made), run("all", made, "--where", "key is not None")
    new = contents(out)
    assert len(new) == len(old) == TOTAL
    for key, parts in new.items():
        about = json.loads(parts.pop("json"))
        before = dict(old[about.pop("origin")])
        assert about == json.loads(before.pop("json", b"{}"))
        assert list(parts) == list(before)
        assert parts == before
        assert key.split("/")[1].startswith(key[:5])  # renewed, as in all shards here
    assert origins(out) != sorted(origins(out))


def test_the_new_set_is_closed_with_kind_classes_and_provenance(made, run, capsys):
    out = run("half", made, "--fraction", "0.5")
    assert capsys.readouterr().out.endswith(f"next: python data_prep/verify.py {out}\n")
    verify(out)
    old, new = open_shards(made), open_shards(out)
    assert (new.name, new.kind, new.classes) == ("half", "image_label", old.classes)
    place = {f"{Path(old.shard_of(i)).stem}/{old.key(i)}": i for i in range(len(old))}
    for i, origin in enumerate(origins(out)):
        assert new.label(i) == old.label(place[origin])
        assert new.read_image(i) == old.read_image(place[origin])
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert (manifest["source"], manifest["license"]) == ("source of toy", "CC0")
    assert manifest["selection"] == {"fraction": "1/2", "complement": False, "of_samples": TOTAL}
    assert manifest["yield"] == {"attempted": 11, "kept": 11}


def test_a_tar_that_was_replaced_is_refused_before_the_set_is_begun(tmp_path, run):
    """Of equal size and time of change, so that its index seems to be right."""
    place = tmp_path / "d"
    tar = write_tar(place / "0.tar", sample("1", 0, txt=b"a"))
    open_shards(place, kind="image_text")
    stat = tar.stat()
    write_tar(tar, sample("2", 0, txt=b"a"))
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match="not those of its index"):
        run("out", place, "--where", "True")
    assert not (tmp_path / "out").exists()
    write_tar(tmp_path / "e" / "0.tar", sample("2", 0, txt=b"a"))
    run("out", tmp_path / "e", "--where", "True")


def test_origin_of_an_earlier_run_is_kept(made, run):
    places = [made]
    for name in ("first", "second", "third"):
        places.append(run(name, places[-1], "--fraction", "0.9"))
        verify(places[-1])
    _, first, second, third = (
        {key: json.loads(parts.get("json", b"{}")) for key, parts in contents(place).items()}
        for place in places
    )
    assert not any("earlier_origins" in about for about in first.values())
    for about in second.values():
        assert about["earlier_origins"] == [first[about["origin"]]["origin"]]
    for about in third.values():
        before = second[about["origin"]]
        assert about["earlier_origins"] == [before["origin"], *before["earlier_origins"]]
    assert len(third) == 16


def test_a_set_that_is_not_closed_is_refused(made, run):
    out = run("open", made, "--fraction", "0.5")
    for spec in (out, out / "shards", f"{out}/shards/{{00000..00001}}.tar"):
        with pytest.raises(DataError, match=r"open: not closed yet; run .*verify\.py"):
            run("refused", spec, "--where", "True")


def test_sets_are_joined_if_their_classes_agree(made, run, tmp_path):
    other = make_set(tmp_path / "other", "other", first=50)
    out = run("joined", made, other, "--where", "key != ''")
    assert len(contents(out)) == 2 * TOTAL
    extra = set_folder.load(out).extra
    assert [about["name"] for about in extra["inputs"]] == ["toy", "other"]
    strange = make_set(
        tmp_path / "strange", "strange", classes=[CLASSES[1] | {"id": 0}, *CLASSES[1:]]
    )
    with pytest.raises(DataError, match="different class tables"):
        run("refused", made, strange, "--where", "True")


def test_foreign_tars_are_read_without_a_manifest(tmp_path, run):
    for shard in range(2):
        members = [m for n in range(7) for m in sample(f"x/{n}", n, txt=b"text %d" % n)]
        write_tar(tmp_path / "in" / f"{shard}.tar", members)
    out = run("foreign", f"{tmp_path}/in/*.tar", "--where", "caption >= 'text 5'")
    assert set_folder.load(out).source == "not stated"
    verify(out)
    assert (open_shards(out).kind, len(open_shards(out))) == ("image_text", 4)
    assert sorted(origins(out)) == ["0/x/5", "0/x/6", "1/x/5", "1/x/6"]


def test_lines_that_are_captions_stay_so(tmp_path, run):
    for name in ("several", "one"):
        write_tar(tmp_path / name / "test" / "0.tar", sample("a", txt=b"a cat\nthe cat"))
    (tmp_path / "several" / "dataset_type.txt").write_text("retrieval")
    places = [tmp_path / name / "test" for name in ("several", "one")]
    for place, captions in zip(places, (["a cat", "the cat"], ["a cat\nthe cat"]), strict=True):
        out = run(f"new_{place.parent.name}", place, "--where", "True")
        verify(out)
        assert read_captions(open_shards(out), 0, "txt") == captions
    with pytest.raises(DataError, match=r"several/test/0\.tar has a caption on each line.*one/"):
        run("both", *places, "--where", "True")


def test_a_damaged_json_costs_its_sample_only(tmp_path, run):
    members = [m for n in range(6) for m in sample(f"{n}", n, json=b"{}" if n else b"{broken")]
    tar = write_tar(tmp_path / "in" / "00000.tar", members)
    with pytest.raises(DataError, match=r"00000\.tar: sample '0': --where cannot be evaluated"):
        run("where", tar, "--where", "True")
    out = run("keys", tar, "--keys", write(tmp_path / "k", "0\n3\n5\n"))
    (stats,) = set_folder.finished(out).values()
    assert stats["status_dict"] == {"success": 2, "json is not a JSON object": 1}
    assert sorted(origins(out)) == ["00000/3", "00000/5"]


# Fractions.


def expected_half(names: list[str], seed: int, count: int) -> set[str]:
    """The `count` of shard/key with the smallest hash, by the rule in words."""

    def digest(name):
        identity = json.dumps([seed, "toy", *name.split("/")]).encode()
        return hashlib.blake2b(identity, digest_size=8).digest()

    return set(sorted(names, key=digest)[:count])


@pytest.mark.parametrize(("fraction", "count"), [("0.5", 11), ("1/3", 7), ("0.9999", 22)])
def test_a_fraction_and_its_complement_are_all(made, run, fraction, count):
    names = list(contents(made))
    one = origins(run("one", made, "--fraction", fraction, "--seed", 3))
    rest = origins(run("rest", made, "--fraction", fraction, "--seed", 3, "--complement"))
    assert (len(one), len(rest)) == (count, TOTAL - count)
    assert set(one) | set(rest) == set(names)
    assert not set(one) & set(rest)
    assert set(one) == expected_half(names, 3, count)


def test_decimal_fractions_are_exact(tmp_path, run):
    members = [m for n in range(100) for m in sample(f"{n:09d}", 0, jpg=b"x")]
    tar = write_tar(tmp_path / "in" / "00000.tar", members)
    assert 100 * 0.29 < 29  # in floating point, where rounding down gives 28
    assert len(origins(run("out", tar, "--fraction", "0.29"))) == 29


def test_another_seed_chooses_and_orders_otherwise(made, run):
    found = [origins(run(f"s{s}", made, "--fraction", "0.5", "--seed", s)) for s in range(4)]
    assert len({frozenset(names) for names in found}) == 4
    orders = [origins(run(f"o{s}", made, "--where", "1", "--seed", s)) for s in range(2)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_the_choice_does_not_depend_on_the_order_of_the_shards(made, run):
    forward = run("forward", made, "--fraction", "0.5")
    backward = run("backward", f"{made}/shards/{{00002..00000}}.tar", "--fraction", "0.5")
    assert set(origins(forward)) == set(origins(backward))
    assert origins(forward) != origins(backward)


def test_the_choice_depends_on_the_set(made, run, tmp_path):
    other = make_set(tmp_path / "other", "other")  # equal shards and keys
    assert {*origins(run("a", made, "--fraction", "0.5"))} != {
        *origins(run("b", other, "--fraction", "0.5"))
    }


# Keys.


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_keys_with_and_without_shard(made, run, tmp_path):
    # 000000009 is in one shard only; a tab ends the key; byte order mark and CRLF do not count.
    keys = write(tmp_path / "k", "\ufeff00000/000000002\r\n000000009\tbad image\r\n\r\n")
    kept = {"00000/000000002", "00002/000000009"}
    assert set(origins(run("keep", made, "--keys", keys))) == kept
    assert set(origins(run("drop", made, "--keys", keys, "--drop"))) == set(contents(made)) - kept


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("000000001", r"1 keys fit several samples, first 000000001 \(in .*00000\.tar, .*00001"),
        ("00001/000000009", "1 of 2 keys are not in toy, first 00001/000000009"),
        ("nonsense", "first nonsense"),
    ],
)
def test_keys_that_fit_none_or_several_are_refused(made, run, tmp_path, line, message):
    keys = write(tmp_path / "k", f"00000/000000002\n{line}\n")
    with pytest.raises(DataError, match=message):
        run("out", made, "--keys", keys, "--drop")
    assert not (tmp_path / "out").exists()


def test_the_list_of_verify_can_be_dropped(tmp_path, run):
    members = [m for n in range(5) for m in sample(f"{n:09d}", n, txt=b"text")]
    members[4] = ("000000002.jpg", b"\xff\xd8\xffno image")
    write_tar(tmp_path / "in" / "00000.tar", members)
    source = run("source", tmp_path / "in", "--where", "True")
    verify(source)
    bad = source / "bad_samples.tsv"
    out = run("clean", source, "--keys", bad, "--drop")
    assert verify(out).samples == 4
    assert not (out / "bad_samples.tsv").exists()


# Expressions.


def test_where_chooses_what_python_would(made, run):
    cases = {
        "'dog' in caption.lower()": lambda n: n % 2 and (n % 3 or n % 4),
        "label == 1 and shard != '00001'": lambda n: n % 2 and not 9 <= n < 13,
        "fields.get('width', 0) >= 64": lambda n: n % 3 and 10 * n >= 64,
        "key.endswith('9')": lambda n: n == 22,
    }
    place = [f"{s:05d}/{r:09d}" for s, count in enumerate(SHARDS) for r in range(count)]
    no_caption = [n for n in range(TOTAL) if n % 12 == 0]
    for number, (text, wanted) in enumerate(cases.items()):
        guarded = f"caption is not None and {text}" if "caption" in text else text
        out = run(f"w{number}", made, "--where", guarded)
        assert set(origins(out)) == {place[n] for n in range(TOTAL) if wanted(n)}
        rest = run(f"d{number}", made, "--where", guarded, "--drop")
        assert set(origins(rest)) == {place[n] for n in range(TOTAL) if not wanted(n)}
    assert no_caption  # there are such samples, which the guard is for


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("width > 3", r"00000\.tar: sample '000000000': .*no field 'width'; there are: caption"),
        ("fields.get('note', 1) > 3", "sample '000000000'|TypeError"),
        ("'a' in caption", "TypeError"),
        ("caption.lower()", "'NoneType'"),
        ("1 / label", "ZeroDivisionError"),
        ("fields['width']", "KeyError: 'width'"),
    ],
)
def test_what_cannot_be_evaluated_names_the_sample(made, run, text, message):
    with pytest.raises(DataError, match=message):
        run("out", made, "--where", text)
