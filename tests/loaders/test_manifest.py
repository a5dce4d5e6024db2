"""Opening data sets in every layout, reading them, and refusing what does not fit."""

import hashlib
import json
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from loaders.errors import DataError
from loaders.manifest import ClassEntry, MissingMember, open_shards, write_manifest
from tests.loaders.conftest import encoded, sample, write_tar

CLASSES = [{"id": 0, "synset": "n1", "names": ["cat"]}, {"id": 1, "synset": None, "names": ["dog"]}]
ABOUT = {"source": "made up", "license": "CC0-1.0", "date": "2026-01-31", "attempted": 9}


def our_set(folder, kind="image_label", classes=CLASSES, labels=(0, 1), **about):
    for n, label in enumerate(labels):
        parts = {} if label is None else {"cls": str(label).encode()}
        write_tar(folder / "shards" / f"{n:05d}.tar", sample(f"{n:09d}", n, txt=b"x", **parts))
    return write_manifest(folder, "ours", kind, classes, **(ABOUT | about))


def test_content_equals_tarfile(captioned):
    shards = open_shards(str(captioned))
    expected = {}
    for path in sorted(captioned.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                expected.setdefault(key, {})[extension] = tar.extractfile(member).read()
    assert [shards.key(i) for i in range(len(shards))] == list(expected)
    for i, parts in enumerate(expected.values()):
        assert shards.read_image(i) == parts["jpg"]
        assert shards.read_text(i) == parts["txt"].decode()
        assert shards.read_json(i) == json.loads(parts["json"])
        assert shards.labels[i] == shards.label(i) == int(parts.get("cls", b"-1"))
    assert shards.shard_sizes.tolist() == [7, 7]
    assert shards.shard_sizes.dtype == shards.labels.dtype == np.int64
    assert shards.shard_of(6).endswith("00000.tar")
    assert shards.shard_of(7).endswith("00001.tar")
    for i in (-1, 14):
        with pytest.raises(IndexError):
            shards.read_image(i)
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.read_text(13) == shards.read_text(13)


def test_foreign_sets_get_kind_and_classes(labelled, captioned):
    shards = open_shards(labelled)
    assert (shards.kind, shards.name, len(shards)) == ("image_label", "labelled", 11)
    assert [entry.names for entry in shards.classes] == [("cat",), ("dog, big",), ("hot+rod",)]
    assert open_shards(labelled, kind="image_text", name="n").kind == "image_text"
    assert open_shards(captioned).kind == "image_text"


def test_clip_benchmark_layout(labelled, tmp_path):
    (tmp_path / "wds" / "test").mkdir(parents=True)
    for n, path in enumerate(sorted(labelled.glob("*.tar"))):
        path.rename(tmp_path / "wds" / "test" / f"{n}.tar")
    (labelled / "classnames.txt").rename(tmp_path / "wds" / "classnames.txt")
    (tmp_path / "wds" / "test" / "nshards.txt").write_text("2")
    assert len(open_shards(tmp_path / "wds" / "test").classes) == 3


def test_every_spelling_of_a_spec(labelled):
    a = str(labelled)
    whole = open_shards(a).fingerprint
    assert whole != open_shards(f"{a}/00000.tar").fingerprint
    for spec in (
        f"{a}/{{00000..00001}}.tar",
        f"{a}/0000{{0,1}}.tar",
        f"{a}/*.tar",
        f"{a}/00000.tar::{a}/00001.tar",
        [f"{a}/00000.tar", f"{a}/00001.tar"],
        labelled.parent / "." / "labelled",
    ):
        assert open_shards(spec).fingerprint == whole


def test_several_folders_make_one_set(captioned, tmp_path):
    write_tar(tmp_path / "more" / "x.tar", sample("k", txt=b"t"))
    shards = open_shards(f"{captioned}::{tmp_path}/more")
    assert (len(shards), shards.kind, shards.key(14)) == (15, "image_text", "k")


def test_sets_with_other_class_tables_are_not_joined(labelled, captioned):
    with pytest.raises(DataError, match="different class tables"):
        open_shards(f"{labelled}::{captioned}")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{a}/{{00000..00020}}.tar", "19 of 21 shards are missing.*00002.tar.*….*glob"),
        ("{a}/nothing.tar", "1 of 1 shards"),
        ("{a}/no*.tar", "no file matches"),
        ("{a}/..", "neither manifest.json nor"),
        ("{a}/00000.tar::{a}/00000.tar", "listed twice"),
        ("", "no tar"),
    ],
)
def test_missing_shards(labelled, spec, words):
    with pytest.raises(DataError, match=words) as caught:
        open_shards(spec.format(a=labelled))
    assert "00012" not in str(caught.value)  # only the first ten


def test_write_manifest_states_the_facts_and_is_deterministic(tmp_path):
    manifest = our_set(tmp_path, extra={"note": "ü"})
    text = (tmp_path / "manifest.json").read_bytes()
    assert json.loads(text) == manifest
    assert text.endswith(b"}\n")
    for shard in manifest["shards"]:
        data = (tmp_path / shard["file"]).read_bytes()
        facts = {"samples": 1, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert shard == {"file": shard["file"], **facts}
    assert manifest["num_samples"] == 2
    assert manifest["yield"] == {"attempted": 9, "kept": 2}
    entries = [ClassEntry(0, "n1", ("cat",)), ClassEntry(1, None, ("dog",))]
    write_manifest(tmp_path, "ours", "image_label", entries, **ABOUT, extra={"note": "ü"})
    assert (tmp_path / "manifest.json").read_bytes() == text


def test_manifest_wins_over_what_the_tars_suggest(tmp_path, monkeypatch):
    our_set(tmp_path / "D", kind="image_text")
    monkeypatch.chdir(tmp_path)
    for spec in ("D", "./D", "D/shards", "D/shards/*.tar", tmp_path / "D/shards/00001.tar"):
        shards = open_shards(spec)
        assert (shards.kind, shards.name) == ("image_text", "ours")
        assert [entry.names for entry in shards.classes] == [("cat",), ("dog",)]
        assert shards.shards[0].sha256
    write_tar(tmp_path / "D/shards/00001.tar", sample("k", cls=b"1", txt=b"long" * 5000))
    with pytest.raises(DataError, match="but the manifest says"):
        open_shards("D")
    (tmp_path / "D/shards/00001.tar").unlink()
    with pytest.raises(DataError, match="1 of 2 shards are missing"):
        open_shards("D")
    (tmp_path / "D/manifest.json").write_text('{"name": "x"}')
    with pytest.raises(DataError, match="not a data set manifest"):
        open_shards("D")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": None}, "needs a class table.*classnames.txt"),
        ({"labels": (0, 2)}, "00001.tar.*'000000001' has label 2"),
        ({"labels": (0, -3)}, "has label -3"),
        ({"labels": (0, None)}, "'000000001' has no label"),
        ({"classes": [CLASSES[0], {"id": 1, "names": []}]}, "class 1 has no name"),
        ({"classes": [CLASSES[0], {"id": 1, "names": [" "]}]}, "class 1 has no name"),
        ({"classes": [CLASSES[0], {"id": 7, "names": ["x"]}]}, "has id 7"),
        ({"date": "yesterday"}, "YYYY-MM-DD"),
        ({"kind": "video"}, "'video'"),
        ({"extra": {"kind": 1}}, "extra keys"),
        ({"labels": ()}, r"no \*.tar"),
    ],
)
def test_sets_that_do_not_fit_are_not_written(tmp_path, changes, words):
    with pytest.raises(DataError, match=words):
        our_set(tmp_path, **changes)
    assert not (tmp_path / "manifest.json").exists()


def test_labelled_foreign_set_without_names_is_refused(labelled):
    (labelled / "classnames.txt").write_text("cat\n\nhot rod\n")
    with pytest.raises(DataError, match="class 1 has no name"):
        open_shards(labelled)
    (labelled / "classnames.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match="'000000002' has label 2"):
        open_shards(labelled)
    (labelled / "classnames.txt").unlink()
    with pytest.raises(DataError, match="needs a class table"):
        open_shards(labelled)


def test_sample_without_image_or_texts(tmp_path):
    members = [*sample("a", jpg=encoded(1)), ("b.txt", b"\xff\xfe")]
    shards = open_shards(write_tar(tmp_path / "a.tar", members))
    assert shards.read_text(0) is None
    assert shards.read_json(0) is None
    with pytest.raises(MissingMember, match="'b' has no image"):
        shards.read_image(1)
    with pytest.raises(UnicodeDecodeError):
        shards.read_text(1)


def test_importing_the_manifest_does_not_import_torch():
    code = "import sys, loaders.manifest; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
