"""Lists under races, kills and full disks; appended rows; packed and damaged input files."""

import bz2
import gzip
import hashlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep.download import url_list
from data_prep.download.list_input import read_lines
from loaders.errors import DataError
from tests.data_prep.list_parts import REPOSITORY, build, make_rows, read_table

SCRIPT = """
    import os, sys, time
    from pathlib import Path
    from data_prep.download import url_list
    from data_prep.download.list_rows import Row
    from loaders.errors import run_cli

    out, source, calls, behaviour = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]

    def rows(notes):
        with open(calls, "a") as file:
            file.write(f"{os.getpid()}\\n")
        for i in range(int(sys.argv[5])):
            yield Row(i, f"http://host/{i}.jpg", f"caption {i}", b"")
            if behaviour == "hang" and i == 100_500:
                open(calls + ".hanging", "w").close()
                time.sleep(600)

    def main():
        url_list.build(out, rows, [source], {}, 1000)
        print(url_list.digest(out))

    run_cli(main)
"""


def start(
    tmp_path: Path, out: Path, source: Path, behaviour: str = "", rows: int = 5000, prefix=()
) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    return subprocess.Popen(
        [*prefix, sys.executable, script, out, source, tmp_path / "calls", behaviour, str(rows)],
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_race_of_two_builders(tmp_path):
    """One builds, the other takes the same list; and a third with other input is refused."""
    source, other = tmp_path / "source.tsv", tmp_path / "other.tsv"
    source.write_bytes(b"source")
    other.write_bytes(b"other")
    racers = [start(tmp_path, tmp_path / "d", source) for _ in range(2)]
    results = [racer.communicate() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], results
    assert results[0][0] == results[1][0] == url_list.digest(tmp_path / "d") + "\n"
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    assert read_table(tmp_path / "d")["row"].to_pylist() == list(range(5000))

    (tmp_path / "calls").unlink()
    racers = [start(tmp_path, tmp_path / "e", path) for path in (source, other)]
    errors = [racer.communicate()[1] for racer in racers]
    assert sorted(racer.returncode for racer in racers) == [0, 3]
    assert "source.tsv" in "".join(errors)
    assert "other.tsv" in "".join(errors)
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_kill_while_building_and_restart(tmp_path):
    source, out = tmp_path / "source.tsv", tmp_path / "d"
    source.write_bytes(b"source")
    victim = start(tmp_path, out, source, "hang", 101_000)
    while not (tmp_path / "calls.hanging").exists():
        assert victim.poll() is None, victim.communicate()
        time.sleep(0.05)
    waiter = start(tmp_path, out, source, rows=101_000)  # another task of the array, waiting
    assert (out / "list/.building/00000.parquet").exists()
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert waiter.communicate()[0] == url_list.digest(out) + "\n"
    clean = start(tmp_path, tmp_path / "clean", source, rows=101_000)
    assert clean.communicate()[0] == url_list.digest(out) + "\n"
    assert not (out / "list/.building").exists()


def test_scraps_of_a_kill_between_files_and_index(tmp_path):
    """Moved files without an index are not a list, and none of them stays."""
    build(tmp_path / "big", make_rows(1057), size=5)
    scraps = tmp_path / "d/list"
    shutil.copytree(tmp_path / "big/list", scraps)
    (scraps / "index.json").unlink()
    with pytest.raises(DataError, match="not built"):
        url_list.read_index(tmp_path / "d")
    index = build(tmp_path / "d", make_rows(3), size=5)
    assert [p.name for p in sorted(scraps.glob("*.parquet"))] == ["00000.parquet"]
    assert [entry["rows"] for entry in index["files"]] == [3]


def test_full_disk(tmp_path):
    """A real one of 400 kB; nothing is taken for a list, and with room the same call goes on."""
    out = tmp_path / "small/d"
    out.parent.mkdir()
    (tmp_path / "source.tsv").write_bytes(b"source")
    mount = f'mount -t tmpfs -o size=400k none {out.parent} && exec "$@" && ls {out}/list'
    inside = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode not in (0, 2):
        pytest.skip("no leave to mount a file system")
    process = start(tmp_path, out, tmp_path / "source.tsv", rows=120_000, prefix=inside)
    _, error = process.communicate()
    assert process.returncode == 3, error
    assert "the disk is full" in error
    assert "Traceback" not in error


# --- append ---------------------------------------------------------------------------------


def test_append(tmp_path):
    out = tmp_path / "d"
    build(out, make_rows(23), size=2)
    before = url_list.digest(out)
    table = read_table(out).take(list(range(5)) * 50)
    (out / "list/retry-001-00000.parquet").write_bytes(b"of an append that was killed")
    index = url_list.append(out, table, "retry-001")
    assert [(e["file"], e["rows"]) for e in index["files"]] == [
        ("00000.parquet", 23),
        ("retry-001-00000.parquet", 200),
        ("retry-001-00001.parquet", 50),
    ]
    assert index == url_list.read_index(out)
    assert index["rows"] == 23
    assert url_list.shard_count(index, 2) == 12 + 100 + 25
    assert url_list.digest(out) == before
    assert read_table(out).slice(23).equals(table)
    names = [entry["file"] for entry in index["files"]]
    assert names == sorted(names)
    for entry in index["files"]:
        data = (out / "list" / entry["file"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
    assert build(out, make_rows(23), size=2) == index  # still the same list


def test_append_twice(tmp_path):
    out = tmp_path / "d"
    build(out, make_rows(23))
    table = read_table(out)
    index = url_list.append(out, table.slice(3), "retry-001")
    assert url_list.append(out, table.slice(3), "retry-001") == index
    with pytest.raises(DataError, match="retry-001 was appended before with other rows"):
        url_list.append(out, table.slice(4), "retry-001")
    assert url_list.append(out, table.slice(4), "retry-002")["files"][:-1] == index["files"]


def test_append_refuses_what_would_not_fit(tmp_path):
    out = tmp_path / "d"
    build(out, make_rows(23))
    with pytest.raises(ValueError, match="columns"):
        url_list.append(out, read_table(out).drop_columns("row"), "retry-001")
    with pytest.raises(ValueError, match="prefix"):
        url_list.append(out, read_table(out), "00007")
    with pytest.raises(DataError, match="not built"):
        url_list.append(tmp_path / "none", read_table(out), "retry-001")


# --- lines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
def test_read_lines(tmp_path, pack):
    paths = [tmp_path / "1.tsv", tmp_path / "2.anything"]
    paths[0].write_bytes(pack('\ufeffa\tä\r\n\n"b\r\r\nc\u2028\x0b\x85d'.encode()))
    paths[1].write_bytes(pack(b"\xef\xbb\xbfe\n\xff\n"))
    assert list(read_lines(paths)) == [
        (0, "a\tä".encode()),
        (1, b""),
        (2, b'"b\r'),
        (3, "c\u2028\x0b\x85d".encode()),
        (4, b"e"),
        (5, b"\xff"),
    ]


def test_multi_stream_bz2(tmp_path):
    """pbzip2 writes several streams, which a plain decompressor reads the first of."""
    path = tmp_path / "x.bz2"
    path.write_bytes(bz2.compress(b"a\n") + bz2.compress(b"b\n"))
    assert [line for _, line in read_lines([path])] == [b"a", b"b"]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_compressed_file(tmp_path, pack, damage):
    data = bytearray(pack(np.random.default_rng(0).bytes(300_000)))
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 0xFF
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(DataError, match="damaged or ends early"):
        list(read_lines([tmp_path / "x"]))


def test_missing_input(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read_lines([tmp_path / "none"]))
    with pytest.raises(DataError, match="no such file"):
        url_list.build(tmp_path / "d", lambda notes: [], [tmp_path], {}, 10)
