"""verify.py over damaged tars, statistics and samples; closing, kept results, kill -9."""

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from itertools import chain

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from data_prep.checks.closing import ranges
from data_prep.sets import set_folder
from data_prep.sets.shard_writer import permutation, write_shards
from data_prep.verify import verify
from loaders.errors import DataError
from loaders.manifest import open_shards
from tests.data_prep.verify_parts import REPOSITORY, SIZE, begin, make, members, put, run
from tests.loaders.conftest import encoded, sample, write_tar


@pytest.fixture
def made(tmp_path):
    return make(tmp_path / "D")


def tar_facts(path):
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        keys = {member.name.split(".")[0] for member in tar}
    return {
        "file": f"shards/{path.name}",
        "samples": len(keys),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def test_good_set_is_closed_with_the_facts_of_its_tars(made):
    summary = verify(made, workers=2)
    manifest = json.loads((made / "manifest.json").read_bytes())
    tars = sorted((made / "shards").glob("*.tar"))
    assert manifest["shards"] == [tar_facts(tar) for tar in tars]
    assert json.loads((made / "shards" / "sizes.json").read_bytes()) == {
        tar.name: SIZE for tar in tars
    }
    expected = {
        "name": "toy",
        "kind": "image_text",
        "note": "ü",
        "source": "made up",
        "license": "CC0",
        "date": "2026-01-31",
        "tool": "data_prep/toy.py",
        "identity": {"seed": 1},
        "yield": {"attempted": 12, "kept": 12},
        "bad_samples": 0,
        "decoded_samples": 12,
        "missing_shards": [],
        "empty_shards": [],
    }
    assert expected.items() <= manifest.items()
    assert (summary.shards, summary.samples, summary.bad, summary.checked) == (3, 12, 0, 3)
    assert summary.decoded == 12
    assert summary.bytes == sum(tar.stat().st_size for tar in tars)
    assert not (made / "bad_samples.tsv").exists()
    shards = open_shards(made)  # reads the indices that were built
    assert len(shards) == 12
    assert len(list((made / "shards" / ".index").iterdir())) == 3


def test_second_run_reads_no_tar_and_gives_the_same_manifest(made):
    first = run(made)
    assert first.returncode == 0, first.stderr
    assert "3 shards, 12 samples" in first.stdout
    assert "images/s per core" in first.stdout
    assert "next: python data_prep/report.py" in first.stdout
    text = (made / "manifest.json").read_bytes()
    tars = sorted((made / "shards").glob("*.tar"))
    content = tars[0].read_bytes()
    stat = tars[0].stat()
    tars[0].write_bytes(bytes(len(content)))  # would be noticed if it was read
    os.utime(tars[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = run(made)
    assert second.returncode == 0, second.stderr
    assert "nothing has changed since the last run" in second.stdout
    assert (made / "manifest.json").read_bytes() == text
    tars[0].write_bytes(content)  # another time of change: read again, alone
    assert verify(made).checked == 1


def test_a_kept_result_needs_the_same_tar_statistics_and_decoding(made):
    assert verify(made, decode=2).decoded == 6
    assert verify(made, decode=2).checked == 0
    assert verify(made, decode=3).checked == 3
    assert verify(made).decoded == 12
    assert verify(made, decode=2).checked == 0  # all were decoded already
    (made / "verify" / "00001.json").write_text('{"version": 1')
    assert verify(made).checked == 1
    stats = made / "shards" / "00002_stats.json"
    stats.write_text(stats.read_text().replace('"successes": 4', '"successes": 5'))
    with pytest.raises(DataError, match="holds 4 samples, but its statistics say 5"):
        verify(made)


def truncate(out):
    tar = out / "shards" / "00001.tar"
    os.truncate(tar, tar.stat().st_size // 2 // 512 * 512 + 7)


def cut_end_mark(out):
    tar = out / "shards" / "00001.tar"
    with tarfile.open(tar) as file:
        last = file.getmembers()[-1]
    os.truncate(tar, last.offset_data + 512)


def damage_header(out):
    tar = out / "shards" / "00001.tar"
    with tarfile.open(tar) as file:
        offset = file.getmembers()[3].offset
    with open(tar, "r+b") as file:
        file.seek(offset + 130)
        file.write(b"\xff")


def no_statistics(out):
    (out / "shards" / "00001_stats.json").unlink()


def cut_statistics(out):
    (out / "shards" / "00001_stats.json").write_text('{"count": 4, "succ')


def wrong_count(out):
    put(out, 1, sample("000001000", txt=b"x") + sample("000001001", txt=b"y"), successes=3)


def images_but_empty(out):
    put(out, 1, sample("000001000", txt=b"x"), successes=0)


def malformed_label(out):
    put(out, 1, sample("000001000", txt=b"x", cls=b"cat"))


def cut_parquet(out):
    (out / "shards" / "00001.parquet").write_bytes(b"PAR1")


def short_parquet(out):
    pq.write_table(pa.table({"key": ["1", "2"]}), out / "shards" / "00001.parquet")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "00001.tar: truncated: member '[0-9]{6}.*sample"),
        (cut_end_mark, "00001.tar: truncated after member"),
        (damage_header, "00001.tar: at byte [0-9]+: header is damaged"),
        (no_statistics, "00001.tar: unfinished: 00001_stats.json is not there"),
        (cut_statistics, "00001.tar: unfinished: 00001_stats.json is damaged"),
        (wrong_count, "00001.tar: holds 2 samples, but its statistics say 3"),
        (images_but_empty, "00001.tar: holds '000001000.jpg', but its statistics say 0"),
        (malformed_label, "00001.tar: sample '000001000': .cls must hold one class number"),
        (cut_parquet, "00001.parquet: not a complete parquet file"),
        (short_parquet, "00001.parquet: 2 rows for 4 samples"),
    ],
)
def test_unreadable_shards_go_to_quarantine_and_are_made_again(made, damage, words):
    assert verify(made).shards == 3
    damage(made)
    names = [f"00001{end}" for end in (".tar", ".parquet", "_stats.json")]
    there = {n: data.read_bytes() for n in names if (data := made / "shards" / n).exists()}
    with pytest.raises(DataError, match=words) as caught:
        verify(made)
    message = str(caught.value)
    assert "1 of 3 shards are missing: 00001. " in message
    assert f"python data_prep/toy.py … --out {made}" in message
    place = made / "quarantine" / "00001"
    reason = (place / "reason.txt").read_text().strip()
    assert reason in message
    assert {p.name: p.read_bytes() for p in place.iterdir() if p.name != "reason.txt"} == there
    assert not any((made / "shards" / name).exists() for name in names)
    assert not (made / "manifest.json").exists()
    assert not (made / "shards" / "sizes.json").exists()
    # The preparer makes exactly this shard again, and the set can be closed.
    assert set_folder.missing(made) == [1]
    write_shards(made, permutation(3 * SIZE, 0), members)
    assert verify(made).checked == 1
    assert json.loads((made / "manifest.json").read_bytes())["num_samples"] == 12
    # A second one of the same number is kept beside the first.
    damage(made)
    with pytest.raises(DataError, match=words):
        verify(made)
    assert (made / "quarantine" / "00001.1" / "reason.txt").exists()
    assert (place / "reason.txt").read_text().strip() == reason


def test_missing_shards(made):
    set_folder.update(made, shards=9)
    done = run(made)
    assert done.returncode == 3
    assert "6 of 9 shards are missing: 00003-00008." in done.stderr
    assert "data_prep/toy.py" in done.stderr
    assert not (made / "manifest.json").exists()
    for end in (".tar", "_stats.json"):
        (made / "shards" / f"00001{end}").unlink()
    done = run(made, "--allow-missing")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((made / "manifest.json").read_bytes())
    assert manifest["missing_shards"] == [1, *range(3, 9)]
    assert manifest["yield"] == {"attempted": 12, "kept": 8}
    assert len(open_shards(made)) == 8
    assert ranges([1, 3, 4, 5, 8]) == "00001, 00003-00005, 00008"


def test_a_shard_of_which_every_download_failed(made):
    name = "00001"
    (made / "shards" / f"{name}.tar").write_bytes(bytes(10240))
    (made / "shards" / f"{name}_stats.json").write_text('{"count": 4, "successes": 0}')
    summary = verify(made)
    assert (summary.shards, summary.samples) == (2, 8)
    manifest = json.loads((made / "manifest.json").read_bytes())
    assert [shard["file"] for shard in manifest["shards"]] == [
        "shards/00000.tar",
        "shards/00002.tar",
    ]
    assert (manifest["empty_shards"], manifest["missing_shards"]) == ([1], [])
    assert manifest["yield"] == {"attempted": 12, "kept": 8}
    assert "00001.tar" not in json.loads((made / "shards" / "sizes.json").read_bytes())
    assert len(open_shards(made)) == 8
    # A range or glob of tars meets none without a sample, and the set stays as it is.
    assert not (made / "shards" / "00001.tar").exists()
    assert len(open_shards(made / "shards" / "*.tar", kind="image_text")) == 8
    span = str(made / "shards" / "{00000..00002}.tar")  # what docs/data.md says of such a hole
    with pytest.raises(DataError, match=r"00001\.tar; .* a glob such as"):
        open_shards(span, kind="image_text")
    with pytest.raises(FileNotFoundError):
        list(webdataset.WebDataset(span, shardshuffle=False))
    with pytest.warns(UserWarning, match="FileNotFoundError"):
        found = list(webdataset.WebDataset(span, webdataset.warn_and_continue, shardshuffle=False))
    assert len(found) == 8
    assert verify(made).samples == 8
    assert verify(made).checked == 0
    assert set_folder.missing(made) == []
    assert verify(made).checked == 0
    for shard in (0, 2):
        (made / "shards" / f"0000{shard}.tar").write_bytes(bytes(10240))
        (made / "shards" / f"0000{shard}_stats.json").write_text('{"count": 4, "successes": 0}')
    with pytest.raises(DataError, match="no image was kept"):
        verify(made)


def test_imported_tars_are_links_and_stay_where_they_are(tmp_path):
    out, foreign = tmp_path / "D", tmp_path / "foreign"
    begin(out, shards=2)
    for shard in range(2):
        parts = [*chain(*(sample(f"a/{shard}{i}", i, txt=b"x") for i in range(3)))]
        tar = write_tar(foreign / f"part-{shard}.tar", parts)
        (out / "shards" / f"0000{shard}.tar").symlink_to(f"../../foreign/{tar.name}")
        (out / "shards" / f"0000{shard}_stats.json").write_text('{"count": 3, "successes": 3}')
    assert verify(out).samples == 6
    assert len(open_shards(out)) == 6
    assert [p.name for p in foreign.iterdir() if p.suffix != ".tar"] == []  # the index is ours
    os.truncate(foreign / "part-1.tar", 700)
    with pytest.raises(DataError, match=r"00001\.tar: truncated"):
        verify(out)
    assert (out / "quarantine" / "00001" / "00001.tar").stat().st_size == 700
    assert (foreign / "part-1.tar").exists()
    (foreign / "part-0.tar").unlink()
    with pytest.raises(DataError, match=r"00000\.tar: links to .*part-0.tar, which is not there"):
        verify(out)
    assert (out / "shards" / "00000.tar").is_symlink()


def test_what_cannot_be_judged_is_not_moved(made, tmp_path):
    write_tar(made / "shards" / "mine.tar", sample("k"))
    with pytest.raises(DataError, match="not a shard of this set"):
        verify(made)
    (made / "shards" / "mine.tar").unlink()
    with pytest.raises(DataError, match="no such file"):
        verify(tmp_path)
    with (
        set_folder.working_folder(made, 0, 2),
        pytest.raises(DataError, match="00000-of-00002 is being"),
    ):
        verify(made)
    with open(made / "verify" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another verify"):
            verify(made)
    index = made / "shards" / ".index"
    index.write_text("a file where the index must go")
    with pytest.raises(DataError, match="cannot store its index"):
        verify(made)
    assert not (made / "quarantine").exists()
    index.unlink()
    assert verify(made).shards == 3


def test_a_stored_index_of_other_content_is_replaced(made):
    verify(made)
    (index,) = (made / "shards" / ".index").glob("00000.tar.*")
    array = np.load(index)
    array["image_offset"] += 512
    np.save(index, array)
    (made / "verify" / "00000.json").unlink()
    assert verify(made).checked == 1
    assert not np.array_equal(np.load(index), array)


def test_options_and_what_is_in_the_way(made):
    for arguments in (["--decode", "some"], ["--decode", "0"], ["--workers", "0"]):
        assert run("/nowhere", *arguments).returncode == 2
    done = run("/nowhere")
    assert (done.returncode, "run.yaml" in done.stderr) == (3, True)
    (made / "verify").write_text("where the results must go")
    done = run(made)
    assert (done.returncode, "The folder must be writable" in done.stderr) == (3, True)


def test_kill_9_keeps_the_checked_shards_and_leaves_no_worker(tmp_path):
    out, shards = tmp_path / "D", 12
    begin(out, shards=shards)
    picture = encoded(1, size=(1400, 1400))
    write_shards(
        out, permutation(shards * SIZE, 0), lambda i: {"jpg": picture, "txt": str(i).encode()}
    )
    for tar in (out / "shards").glob("*.tar"):
        os.utime(tar, ns=(10**18, 10**18))
    script = REPOSITORY / "data_prep" / "verify.py"
    process = subprocess.Popen(
        [sys.executable, script, out, "--workers", "2"], stderr=subprocess.DEVNULL
    )
    while len(list((out / "verify").glob("*.json"))) < 3:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert not (out / "manifest.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "verify").glob("*.json")}
    assert 3 <= len(kept) < shards
    summary = verify(out)
    assert summary.checked == shards - len(kept)
    assert {name: (out / "verify" / name).stat().st_mtime_ns for name in kept} == kept
    assert summary.samples == shards * SIZE
    text = (out / "manifest.json").read_bytes()
    for path in (*(out / "verify").glob("*.json"), out / "manifest.json"):
        path.unlink()
    verify(out)  # the uninterrupted run
    assert (out / "manifest.json").read_bytes() == text


def test_a_killed_worker_is_said_and_costs_nothing(made):
    script = REPOSITORY / "data_prep" / "verify.py"
    command = [sys.executable, script, made, "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    workers = []
    while len(workers) < 2:  # stopped while they start, before they have verified anything
        assert process.poll() is None
        time.sleep(0.005)
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.Error):
                if "spawn_main" in str(child.cmdline()) and child not in workers:
                    child.suspend()
                    workers.append(child)
    assert not list((made / "verify").glob("*.json"))
    workers[1].resume()
    workers[0].kill()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "a worker process was killed" in errors
    assert not (made / "quarantine").exists()
