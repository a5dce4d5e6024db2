"""import_shards.py: tars of others become a set, and nothing is written beside them."""

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import import_shards
from data_prep.sets import set_folder
from data_prep.verify import verify
from loaders.errors import ConfigError, DataError
from loaders.manifest import open_shards
from tests.loaders.conftest import encoded, sample, write_tar

SCRIPT = Path(__file__).resolve().parents[2] / "data_prep" / "import_shards.py"
ABOUT = ["--name", "foreign", "--source", "a mirror", "--license", "CC0"]
NOBODY = 65534


def dump(place: Path, counts=(4, 3, 5), statistics=(1,)) -> Path:
    """Tars of captions and labels; those in `statistics` with img2dataset's files beside them."""
    for shard, count in enumerate(counts):
        members = []
        for n in range(count):
            about = json.dumps({"caption": f"text {n}", "status": "success"}).encode()
            parts = {"txt": b"text %d" % n, "cls": b"%d" % (n % 3), "json": about}
            members += sample(f"{shard:05d}{n:04d}", 10 * shard + n, **parts)
        write_tar(place / f"{shard:05d}.tar", members)
        if shard in statistics:
            stats = {"count": count + 2, "successes": count, "failed_to_download": 2}
            stats |= {"failed_to_resize": 0, "duration": 1.5, "start_time": 1.0, "end_time": 2.5}
            stats["status_dict"] = {"success": count, "HTTP Error 404: Not Found": 2}
            (place / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
            table = pa.table({"url": ["u"] * (count + 2)})
            pq.write_table(table, place / f"{shard:05d}.parquet")
    return place


def listing(place: Path) -> dict:
    """Everything below a folder: kind, size, and times of change."""
    found = {}
    for path in [place, *sorted(place.rglob("*"))]:
        stat = path.lstat()
        found[str(path)] = (stat.st_mode, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return found


def command(spec, out, *options, kind="image_text") -> list[str]:
    return [
        str(a)
        for a in (sys.executable, SCRIPT, spec, "--out", out, *ABOUT, "--kind", kind, *options)
    ]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Function: (spec, options) -> folder of the imported set."""

    def call(spec, *options, kind="image_text", name="out"):
        monkeypatch.setattr(sys, "argv", command(spec, tmp_path / name, *options, kind=kind)[1:])
        import_shards.main()
        return tmp_path / name

    return call


def test_the_set_is_read_through_the_loader_without_a_copy(tmp_path, run, capsys):
    place = dump(tmp_path / "dump")
    before = listing(place)
    out = run(place)
    assert capsys.readouterr().out.endswith(f"next: python data_prep/verify.py {out}\n")
    assert verify(out).bad == 0
    shards = open_shards(out)
    assert (shards.name, shards.kind, len(shards)) == ("foreign", "image_text", 12)
    rows = [(s, n) for s, count in enumerate((4, 3, 5)) for n in range(count)]
    for i, (s, n) in enumerate(rows):
        assert shards.key(i) == f"{s:05d}{n:04d}"
        assert shards.read_image(i) == encoded(10 * s + n)
        assert shards.read_text(i) == f"text {n}"
    for s in range(3):
        link = out / "shards" / f"{s:05d}.tar"
        assert os.readlink(link) == str(place / f"{s:05d}.tar")
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert manifest["originals"] == [str(place / f"{s:05d}.tar") for s in range(3)]
    assert (manifest["source"], manifest["license"]) == ("a mirror", "CC0")
    assert manifest["yield"] == {"attempted": 14, "kept": 12}
    assert listing(place) == before


def test_statistics_beside_a_tar_are_linked_and_others_made(tmp_path, run):
    place = dump(tmp_path / "dump")
    out = run(place)
    shards = out / "shards"
    for end in ("_stats.json", ".parquet"):
        assert os.readlink(shards / f"00001{end}") == str(place / f"00001{end}")
        assert not (shards / f"00000{end}").is_symlink()
    assert not (shards / "00000.parquet").exists()
    found = set_folder.finished(out)
    assert [stats["successes"] for stats in found.values()] == [4, 3, 5]
    assert [stats["count"] for stats in found.values()] == [4, 5, 5]
    assert found[0].keys() == found[1].keys()
    assert found[0]["status_dict"] == {"success": 4}
    assert set_folder.load(out).samples_per_shard == 5


def test_each_tar_is_indexed_once(tmp_path, run):
    out = run(dump(tmp_path / "dump"))
    indexes = {path.name: path.stat().st_mtime_ns for path in (out / "shards/.index").iterdir()}
    assert sorted(name[:9] for name in indexes) == [f"{s:05d}.tar" for s in range(3)]
    open_shards(out / "shards", kind="image_text")
    after = {path.name: path.stat().st_mtime_ns for path in (out / "shards/.index").iterdir()}
    assert after == indexes
    assert not (out / "work" / import_shards.SCAN).exists()


def test_numbers_follow_the_specification(tmp_path, run, monkeypatch):
    one = dump(tmp_path / "b", statistics=())
    other = dump(tmp_path / "a", counts=(1, 2), statistics=())
    for path in one.glob("*.tar"):
        path.rename(path.with_name(f"train-{path.name}"))
    monkeypatch.chdir(tmp_path)
    out = run(f"b/train-{{00000..00002}}.tar::{other}")
    links = [os.readlink(path) for path in sorted((out / "shards").glob("*.tar"))]
    names = [one / f"train-{s:05d}.tar" for s in range(3)] + [
        other / f"{s:05d}.tar" for s in (0, 1)
    ]
    assert links == [str(path) for path in names]  # absolute, though the spec is not
    assert verify(out).samples == 15
    with pytest.raises(DataError, match=r"named twice: .*train-00001\.tar"):
        run("b::b/train-00001.tar", name="twice")


def import_as_nobody(spec, out, answers) -> None:
    """In a child process: become a user without rights, try to write, then import."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    try:
        (spec / "probe").touch()
    except PermissionError:
        answers.put("denied")
    sys.argv = command(spec, out)[1:]
    import_shards.main()
    answers.put("done")


def test_originals_that_are_read_only(tmp_path):
    with tempfile.TemporaryDirectory() as base:  # others may not enter pytest's folders
        os.chmod(base, 0o755)
        place, home = dump(Path(base) / "dump"), Path(base) / "home"
        home.mkdir()
        home.chmod(0o777)
        for path in place.iterdir():
            path.chmod(0o444)
        place.chmod(0o555)
        before = listing(place)
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        child = context.Process(target=import_as_nobody, args=(place, home / "out", answers))
        child.start()
        child.join()
        assert [answers.get(timeout=10) for _ in range(2)] == ["denied", "done"]
        assert listing(place) == before
        assert verify(home / "out").samples == 12
        assert listing(place) == before
        place.chmod(0o755)


# Classes.


@pytest.mark.parametrize("form", ["txt", "json"])
def test_labelled_sets_get_their_classes(tmp_path, run, form):
    table = [{"id": i, "synset": f"n{i}", "names": [n]} for i, n in enumerate(("cat", "dog", "ox"))]
    path = tmp_path / f"classnames.{form}"
    path.write_text("cat\ndog\nox\n" if form == "txt" else json.dumps({"classes": table}))
    out = run(dump(tmp_path / "dump"), "--classes", path, kind="image_label")
    verify(out)
    shards = open_shards(out)
    assert [entry.names for entry in shards.classes] == [("cat",), ("dog",), ("ox",)]
    synsets = ["n0", "n1", "n2"] if form == "json" else [None] * 3
    assert [entry.synset for entry in shards.classes] == synsets
    assert shards.labels.tolist() == [0, 1, 2, 0, 0, 1, 2, 0, 1, 2, 0, 1]


def test_labels_that_do_not_fit_the_classes(tmp_path, run):
    place, path = dump(tmp_path / "dump"), tmp_path / "classnames.txt"
    path.write_text("cat\ndog\n")
    # Not a matter of single tars, so not skipped.
    with pytest.raises(DataError, match=r"00000\.tar: sample '000000002' has label 2, not one of"):
        run(place, "--classes", path, "--skip-unreadable", kind="image_label")
    path.unlink()  # one folder above the tars, it would be read as by the loader
    with pytest.raises(ConfigError, match="image_label needs --classes"):
        run(place, kind="image_label", name="none")


# Tars that cannot be used.


@pytest.fixture
def broken(tmp_path):
    """A dump of seven tars of which 1, 2, 4 and 5 are broken, in four ways."""
    place = dump(tmp_path / "dump", counts=(4, 3, 5, 2, 2, 2, 2), statistics=(2, 3))
    whole = {path.name: path.read_bytes() for path in place.iterdir()}
    (place / "00001.tar").write_bytes(whole["00001.tar"][:3000])
    (place / "00002.tar").write_bytes(  # cut between samples, with an end mark: only counts tell
        write_tar(tmp_path / "x.tar", sample("1", 0, txt=b"text")).read_bytes()
    )
    (place / "00004.tar").write_bytes(b"")
    write_tar(place / "00005.tar", [("readme.txt", b"no images")])
    return place, whole


def test_all_broken_tars_are_listed_and_nothing_is_imported(broken, tmp_path):
    place, _ = broken
    before = listing(place)
    done = subprocess.run(
        command(place, tmp_path / "out"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert f"{tmp_path / 'out'}: 4 of 7 tars cannot be used:\n" in done.stderr
    lines = done.stderr.rpartition("cannot be used:\n")[2].splitlines()
    for line, (number, reason) in zip(
        lines[:-1],
        [
            (1, "truncated"),
            (2, "holds 1 samples, but 00002_stats.json says 5 of 7"),
            (4, "empty file"),
            (5, "no sample with an image"),
        ],
        strict=True,
    ):
        assert line.startswith(f"  {place / f'{number:05d}.tar'}: ")
        assert reason in line
    assert lines[-1].endswith("add --skip-unreadable")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["work"]
    assert listing(place) == before


def test_the_same_command_goes_on_when_they_are_mended(broken, run):
    place, whole = broken
    with pytest.raises(DataError, match="4 of 7"):
        run(place)
    for name, data in whole.items():
        (place / name).write_bytes(data)
    out = run(place)
    assert set_folder.load(out).extra["skipped"] == []
    assert verify(out).samples == 20


def test_unreadable_tars_can_be_skipped(broken, run):
    place, _ = broken
    with pytest.raises(DataError, match="4 of 7"):
        run(place)
    out = run(place, "--skip-unreadable")  # in the folder of the run that refused
    links = [Path(os.readlink(path)).name for path in sorted((out / "shards").glob("*.tar"))]
    assert links == ["00000.tar", "00003.tar", "00006.tar"]
    assert sorted(set_folder.finished(out)) == [0, 1, 2]
    extra = set_folder.load(out).extra
    assert [Path(path).name for path in extra["originals"]] == links
    assert [error.split(":")[0] for error in extra["skipped"]] == [
        str(place / f"{number:05d}.tar") for number in (1, 2, 4, 5)
    ]
    assert verify(out).samples == 8
    assert [len(index_of(out, s)) for s in range(3)] == [4, 2, 2]


def index_of(out, shard):
    return open_shards(out / "shards" / f"{shard:05d}.tar")


def test_if_all_are_broken_there_is_nothing_to_skip(tmp_path, run):
    write_tar(tmp_path / "dump" / "0.tar", [("a.txt", b"")])
    with pytest.raises(DataError, match="1 of 1 tars cannot be used"):
        run(tmp_path / "dump", "--skip-unreadable")


def test_statistics_of_others_are_checked(tmp_path, run):
    place = dump(tmp_path / "dump")
    (place / "00001_stats.json").write_text('{"count": 3}')
    with pytest.raises(DataError, match=r"00001_stats\.json: not the statistics of img2dataset"):
        run(place)


# Restart.


def test_other_tars_in_the_same_folder_are_refused(tmp_path, run):
    run(dump(tmp_path / "dump"))
    other = dump(tmp_path / "other", counts=(1, 2))
    words = rf"holds another set .*tars: 3 there, 2 now; only there: {tmp_path}/dump/00000\.tar"
    with pytest.raises(DataError, match=words) as refused:
        run(other)
    assert f"only now: {other}/00000.tar" in str(refused.value)
    table = tmp_path / "names.txt"
    table.write_text("cat\n")
    with pytest.raises(DataError, match="class table: 0 classes there, 1 now") as refused:
        run(tmp_path / "dump", "--classes", table)
    assert "sha256" not in str(refused.value)


def test_a_refused_import_leaves_the_folder_to_the_right_one(tmp_path, run):
    """A compressed tar alone, beside good ones, and labels that do not fit."""
    place = dump(tmp_path / "dump")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "00000.tar").write_bytes(gzip.compress((place / "00000.tar").read_bytes()))
    with pytest.raises(DataError, match="1 of 1 tars cannot be used"):
        run(bad)
    assert not (tmp_path / "out").exists()
    (bad / "00001.tar").write_bytes((place / "00001.tar").read_bytes())
    with pytest.raises(DataError, match="1 of 2 tars cannot be used"):
        run(bad)
    table = tmp_path / "names.txt"
    table.write_text("cat\n")
    with pytest.raises(DataError, match="has label 1, not one of 0 to 0"):
        run(place, "--classes", table, kind="image_label")
    assert verify(run(place)).samples == 12


def test_a_finished_import_is_left_alone(tmp_path, run):
    place = dump(tmp_path / "dump")
    out = run(place)
    verify(out)
    before = listing(out / "shards")
    run(place)
    assert listing(out / "shards") == before
    assert (out / "manifest.json").exists()


def test_a_shard_that_was_taken_away_is_linked_again(tmp_path, run):
    place = dump(tmp_path / "dump")
    out = run(place)
    whole = (place / "00002.tar").read_bytes()
    (place / "00002.tar").write_bytes(whole[:4000])
    with pytest.raises(DataError, match="1 of 3 shards are missing"):
        verify(out)
    (place / "00002.tar").write_bytes(whole)
    run(place)
    assert verify(out).samples == 12


def test_shards_that_lead_elsewhere_are_refused(tmp_path, run):
    place = dump(tmp_path / "dump")
    out = run(place)
    (out / "shards" / "00002_stats.json").unlink()
    (out / "shards" / "00001.tar").unlink()
    (out / "shards" / "00001.tar").symlink_to(place / "00000.tar")
    with pytest.raises(DataError, match=r"00001\.tar: leads to .*00000\.tar, now .*00001\.tar has"):
        run(place)


def test_after_kill_9_the_same_command_completes_the_import(tmp_path):
    place = tmp_path / "dump"
    count = 100
    for shard in range(count):
        members = [m for n in range(40) for m in sample(f"{n}", 0, jpg=b"x", txt=b"text")]
        write_tar(place / f"{shard:05d}.tar", members)
    out = tmp_path / "out"

    def indexed() -> int:
        return len(list((out / "work" / import_shards.SCAN / ".index").glob("*.npy")))

    def finished() -> int:
        return len(list((out / "shards").glob("*_stats.json")))

    for reached in (lambda: indexed() >= 3, lambda: indexed() >= 40, lambda: finished() >= 3):
        with subprocess.Popen(command(place, out), stderr=subprocess.DEVNULL) as process:
            while not reached() and process.poll() is None:
                time.sleep(0.0005)
            os.kill(process.pid, signal.SIGKILL)
    kept = finished()
    assert 3 <= kept < count, "finished before it could be killed"
    done = subprocess.run(command(place, out), capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{count} tars, {40 * count} samples; 0 tars skipped")
    links = [os.readlink(path) for path in sorted((out / "shards").glob("*.tar"))]
    assert links == [str(place / f"{shard:05d}.tar") for shard in range(count)]
    assert len(open_shards(out / "shards")) == 40 * count
    with tarfile.open(out / "shards" / "00099.tar") as tar:
        assert len(tar.getmembers()) == 80
