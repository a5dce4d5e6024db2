"""The folder of a set: what it refuses, kills at any moment, races, locks, a full disk."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.sets import set_folder
from data_prep.sets.shard_writer import permutation, write_shards
from loaders.errors import ConfigError, DataError

SIZE, SAMPLES = 4, 10
CLASSES = [{"id": i, "synset": None, "names": [name]} for i, name in enumerate(("cat", "dög"))]
SET = set_folder.Preparation(
    tool="test",
    name="toy",
    kind="image_label",
    source="here",
    license="none",
    date="2022-04-07",
    shards=3,
    samples_per_shard=SIZE,
    attempted=SAMPLES,
    identity={"input_sha256": "aa", "seed": 1},
)


def read(i):
    return {"jpg": b"%d" % i * 2000, "cls": b"%d" % (i % 2)}


def prepare(out, part=0, parts=1):
    set_folder.begin(out, SET, CLASSES)
    write_shards(out, permutation(SAMPLES, 1), read, part, parts)


def tars(out):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.rglob("*.tar")}


def forked(function):
    """Run a function in a fork of this process; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return child


def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_set_is_what_its_run_yaml_says(tmp_path):
    out = tmp_path / "new" / "set"
    assert set_folder.begin(out, SET, CLASSES) == SET
    assert set_folder.load(out) == SET
    assert set_folder.load_classes(out) == CLASSES
    later = replace(SET, date="2023-01-01", source="there")  # no part of what it is
    assert set_folder.begin(out, later, CLASSES) == SET
    assert set_folder.update(out, shards=5).shards == 5
    assert set_folder.load(out) == replace(SET, shards=5)
    assert set_folder.missing(out) == [0, 1, 2, 3, 4]
    assert set_folder.missing(out, 1, 2) == [1, 3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "other"}, "name: 'toy' there, 'other' now"),
        ({"kind": "image_text"}, "kind: 'image_label' there, 'image_text' now"),
        ({"identity": {"input_sha256": "bb", "seed": 1}}, "input_sha256: 'aa' there, 'bb' now"),
        ({"identity": {**SET.identity, "input_sha256": "b" * 64}},
         "(input_sha256: other images or labels in the source)"),
        ({"identity": {"input_sha256": "aa"}}, "seed: 1 there, None now"),
        ({"identity": {**SET.identity, "size": 3}}, "size: None there, 3 now"),
    ],
)  # fmt: skip
def test_another_set_is_refused(tmp_path, change, words):
    prepare(tmp_path)
    before = tars(tmp_path)
    with pytest.raises(DataError, match="holds another set") as error:
        set_folder.begin(tmp_path, replace(SET, **change), CLASSES)
    assert words in str(error.value)
    assert "identity" not in str(error.value)
    assert tars(tmp_path) == before
    assert set_folder.load(tmp_path) == SET


def test_other_classes_are_refused(tmp_path):
    set_folder.begin(tmp_path, SET, CLASSES)
    with pytest.raises(DataError, match="not the class table of this set"):
        set_folder.begin(tmp_path, SET, CLASSES[::-1])
    (tmp_path / "classes.json").write_text("[{")
    with pytest.raises(DataError, match=r"classes.json: damaged"):
        set_folder.begin(tmp_path, SET, CLASSES)


@pytest.mark.parametrize("name", ["cat.jpg", "manifest.json", "shards/00000.tar"])
def test_a_folder_of_someone_else_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(DataError, match=f"not empty .{name}. and no run.yaml"):
        set_folder.begin(tmp_path, SET, CLASSES)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / name]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(DataError, match="is a file"):
        set_folder.begin(tmp_path / "out", SET)


@pytest.mark.parametrize("text", ["", "a: [", "[1, 2]", "name: x", "tool: 1\nunknown: 2"])
def test_a_damaged_run_yaml_is_refused(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(DataError, match=r"run\.yaml: not what data_prep wrote"):
        set_folder.load(tmp_path)


def test_no_set_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"import_shards\.py"):
        set_folder.load(tmp_path)


def test_a_kill_at_any_step_loses_and_repeats_nothing(tmp_path):
    """Killed before each change of the file system in turn, then run again."""
    prepare(tmp_path / "whole")
    expected, steps = tars(tmp_path / "whole"), 0
    while True:
        out = tmp_path / str(steps)

        def killed(out=out, last=steps):
            count = [0]

            def hook(event, args):
                writes = event == "open" and isinstance(args[2], int) and args[2] & os.O_CREAT
                if writes or event in ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir"):
                    if count[0] == last:
                        os.kill(os.getpid(), signal.SIGKILL)
                    count[0] += 1

            sys.addaudithook(hook)
            prepare(out)

        code = wait(forked(killed))
        done = {s: (out / "shards" / f"{s:05d}.tar").stat() for s in set_folder.finished(out)}
        prepare(out)
        assert tars(out) == expected, f"killed at step {steps}"
        for shard, stat in done.items():
            now = (out / "shards" / f"{shard:05d}.tar").stat()
            assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
        assert not any(p.is_dir() for p in (out / "work").iterdir())
        shutil.rmtree(out)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        steps += 1
    assert steps > 20


def test_a_shard_gets_its_statistics_last(tmp_path):
    """Who sees the statistics sees the flushed tar: the order of renames and flushes."""
    set_folder.begin(tmp_path, SET, CLASSES)
    log = tmp_path / "log"
    stage = tmp_path / "work" / "stage"
    stage.mkdir(parents=True)
    for name in ("00001.parquet", "00001.tar", "00001_stats.json"):
        (stage / name).write_text('{"successes": 1}')
    renamed = []

    def watched():
        sys.addaudithook(lambda event, args: event == "os.rename" and renamed.append(args[1]))
        set_folder.publish(tmp_path, 1, stage)
        log.write_text("\n".join(Path(path).name for path in renamed))

    assert wait(forked(watched)) == 0
    assert log.read_text().split() == ["00001.parquet", "00001.tar", "00001_stats.json"]
    assert set_folder.finished(tmp_path) == {1: {"successes": 1}}


def test_a_finished_shard_is_kept(tmp_path):
    prepare(tmp_path)
    before = tars(tmp_path)
    stage = tmp_path / "work" / "again"
    stage.mkdir()
    for name in ("00001.tar", "00001_stats.json"):
        (stage / name).write_text('{"successes": 7}')
    set_folder.publish(tmp_path, 1, stage)
    assert list(stage.iterdir()) == []
    assert tars(tmp_path) == before
    assert set_folder.finished(tmp_path)[1]["successes"] == SIZE


@pytest.mark.parametrize("content", [b"", b'{"succ', b"[]", b"{}", b"\xff"])
def test_a_shard_with_damaged_statistics_is_made_again(tmp_path, content):
    prepare(tmp_path)
    before = tars(tmp_path)
    (tmp_path / "shards" / "00001_stats.json").write_bytes(content)
    assert set_folder.missing(tmp_path) == [1]
    prepare(tmp_path)
    assert tars(tmp_path) == before
    assert set_folder.missing(tmp_path) == []


def test_statistics_without_a_tar_do_not_count(tmp_path):
    prepare(tmp_path)
    (tmp_path / "shards" / "00002.tar").unlink()
    (tmp_path / "shards" / "sizes.json").write_text("{}")
    assert list(set_folder.finished(tmp_path)) == [0, 1]


def test_many_processes_may_start_at_once(tmp_path):
    prepare(tmp_path / "whole")
    for attempt in range(10):
        out = tmp_path / str(attempt)
        children = [forked(lambda out=out, k=k: prepare(out, k, 4)) for k in range(4)]
        assert [wait(child) for child in children] == [0] * 4
        assert tars(out) == tars(tmp_path / "whole")


def test_a_start_while_another_process_starts(tmp_path):
    """The other one begins and finishes the set while this one looks at the folder."""
    out = tmp_path / "set"
    out.mkdir()

    def overtaken():
        other = []

        def hook(event, args):
            if event in ("os.listdir", "os.scandir") and not other:
                other.append(event)  # the fork has this hook too
                assert wait(forked(lambda: prepare(out))) == 0

        sys.addaudithook(hook)
        prepare(out)
        assert other

    assert wait(forked(overtaken)) == 0
    prepare(tmp_path / "whole")
    assert tars(out) == tars(tmp_path / "whole")


def test_one_process_a_part(tmp_path):
    set_folder.begin(tmp_path, SET, CLASSES)
    ready, go = os.pipe(), os.pipe()

    def holder():
        with set_folder.working_folder(tmp_path, 1, 2) as stage:
            (stage / "00001.tar").write_text("unfinished")
            os.write(ready[1], b"x")
            os.read(go[0], 1)

    child = forked(holder)
    os.read(ready[0], 1)
    try:
        with pytest.raises(DataError, match="another process is preparing part 1 of 2"):
            write_shards(tmp_path, np.arange(SAMPLES), read, 1, 2)
        write_shards(tmp_path, np.arange(SAMPLES), read, 0, 2)
    finally:
        os.kill(child, signal.SIGKILL)
        wait(child)
    left = tmp_path / "work" / "00001-of-00002" / "00001.tar"
    assert left.exists()
    write_shards(tmp_path, np.arange(SAMPLES), read, 1, 2)
    assert not left.exists()
    assert list(set_folder.finished(tmp_path)) == [0, 1, 2]


@pytest.mark.parametrize(("part", "parts"), [(2, 2), (-1, 3), (0, 0)])
def test_parts_are_numbered_from_0(part, parts):
    with pytest.raises(ConfigError, match=f"--part {part} --parts {parts}"):
        set_folder.check_part(part, parts)


def test_a_writer_is_killed_and_started_again(tmp_path):
    """The whole of it in a process of its own, killed after some shards."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "import numpy as np; from dataclasses import replace\n"
        "from tests.data_prep.test_folder import SET, CLASSES, read\n"
        "from data_prep.sets import set_folder; from data_prep.sets.shard_writer import *\n"
        "out = Path(sys.argv[1])\n"
        "set_folder.begin(out, replace(SET, shards=60), CLASSES)\n"
        "write_shards(out, permutation(240, 0), read)\n"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code, "OUT", str(root)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([str(whole) if c == "OUT" else c for c in command], check=True)
    for shards in (1, 5, 30):
        child = subprocess.Popen([str(killed) if c == "OUT" else c for c in command])
        while len(list(killed.glob("shards/*_stats.json"))) < shards:
            time.sleep(0.001)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        done = set(set_folder.finished(killed))
        assert shards <= len(done) < 60
        assert {k: v for k, v in tars(killed / "shards").items() if int(k[:5]) in done} == {
            f"{s:05d}.tar": tars(whole)[f"{s:05d}.tar"] for s in done
        }
    subprocess.run([str(killed) if c == "OUT" else c for c in command], check=True)
    assert tars(killed) == tars(whole)
    assert len(tars(whole)) == 60


def test_finished_reads_each_statistics_file_once(tmp_path):
    """Publishing looks at one shard, so a set of thousands is not read again for each."""
    out, opened = tmp_path, []
    set_folder.begin(out, SET, CLASSES)

    def counted():
        sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
        write_shards(out, np.arange(SAMPLES), read)
        (out / "opened").write_text(json.dumps(opened))

    assert wait(forked(counted)) == 0
    names = [Path(p).name for p in json.loads((out / "opened").read_text())]
    # One try before the shard is there; one when it is written; one to flush it.
    assert max(names.count(f"{s:05d}_stats.json") for s in range(3)) <= 3


def test_published_tars_are_read_by_tarfile(tmp_path):
    prepare(tmp_path)
    order = permutation(SAMPLES, 1)
    with tarfile.open(tmp_path / "shards" / "00002.tar") as tar:
        found = {m.name: tar.extractfile(m).read() for m in tar}
    expected = {
        f"00002{row}.{extension}": data
        for row, i in enumerate(order[8:])
        for extension, data in read(int(i)).items()
    }
    assert found == expected
