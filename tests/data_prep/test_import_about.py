"""What import_shards.py finds out about tars of others when it is not stated."""

import sys

import pytest

from data_prep import import_shards
from data_prep.archives.import_about import read_classes
from data_prep.sets import set_folder
from data_prep.verify import verify
from loaders.errors import ConfigError, DataError
from loaders.manifest import open_shards
from tests.data_prep.test_import_shards import SCRIPT, dump
from tests.loaders.conftest import sample, write_tar


def call(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    import_shards.main()


def test_what_is_not_stated_is_found_and_said(tmp_path, monkeypatch, capsys):
    place = dump(tmp_path / "dump")
    needed = ("--license", "CC0")
    with pytest.raises(ConfigError, match="does not say the licence"):
        call(monkeypatch, place, "--out", tmp_path / "none")
    call(monkeypatch, place, "--out", tmp_path / "pairs", *needed)
    text = capsys.readouterr().out
    assert "--kind not given: image_text (12 of 12 samples have a class number, but" in text
    assert "--name not given: pairs\n" in text
    assert f"--source not given: tars of {place}\n" in text
    (place / "classnames.txt").write_bytes("\ufeffcat\r\ndog\r\nox\r\n\r\n".encode())
    call(monkeypatch, place, "--out", tmp_path / "named", "--classes", place / "classnames.txt",
         *needed)  # fmt: skip
    verify(tmp_path / "named")
    shards = open_shards(tmp_path / "named")
    assert (shards.name, shards.kind) == ("named", "image_label")
    assert [entry.names for entry in shards.classes] == [("cat",), ("dog",), ("ox",)]
    (place / "classnames.txt").write_text("cat\ndog\nox\n")
    call(monkeypatch, place, "--out", tmp_path / "beside", *needed)
    assert f"--classes not given: 3 classes of classnames.txt of {place}" in capsys.readouterr().out
    verify(tmp_path / "beside")
    assert open_shards(tmp_path / "beside").classes == shards.classes
    call(monkeypatch, place, "--out", tmp_path / "beside", *needed)  # as begun
    # A set of this repository says all of it.
    call(monkeypatch, tmp_path / "beside" / "shards", "--out", tmp_path / "again")
    stored = set_folder.load(tmp_path / "again")
    assert (stored.kind, stored.license) == ("image_label", "CC0")
    (place / "classnames.txt").write_text("cat\n\nox\n")
    with pytest.raises(DataError, match="an empty one; write its names"):
        call(monkeypatch, place, "--out", tmp_path / "gap", *needed)
    assert not (tmp_path / "gap").exists()


def test_classes_without_names_and_captions_need_a_word(tmp_path, monkeypatch):
    write_tar(tmp_path / "d" / "0.tar", [m for n in range(3) for m in sample(f"{n}", 0, cls=b"1")])
    with pytest.raises(ConfigError, match="3 of 3 samples have a class number, no caption"):
        call(monkeypatch, tmp_path / "d", "--out", tmp_path / "out", "--license", "CC0")
    call(monkeypatch, tmp_path / "d", "--out", tmp_path / "out", "--license", "CC0",
         "--kind", "image_text")  # fmt: skip
    assert set_folder.load(tmp_path / "out").kind == "image_text"


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", "[]"), ("a.json", '{"classes": [{"id": 1, "names": ["x"]}]}'), ("a.json", "{")],
)
def test_wrong_class_tables(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"a\.json: (not a class table|class ids must be 0 to 0)"):
        read_classes(tmp_path / name)
