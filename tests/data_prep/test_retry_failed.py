"""Trying failed rows again: which rows, into which shards, and after an interruption."""

import hashlib
import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep import retry_failed
from data_prep.download import url_list
from data_prep.download.reasons import TEMPORARY
from data_prep.sets import set_folder
from loaders.errors import ConfigError
from tests.data_prep import downloads
from tests.data_prep.downloads import BODIES, EXPECTED, SHARD, command, kept, rows, run

PATHS = list(EXPECTED)
BASE_SHARDS = -(-len(PATHS) // SHARD)
FAILED = [row for row, path in enumerate(PATHS) if EXPECTED[path] in TEMPORARY]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    yield from downloads.base(tmp_path_factory.getbasetemp() / "download")


@pytest.fixture
def out(base, tmp_path):
    """A copy of the finished set."""
    shutil.copytree(base.out, tmp_path / "D")
    return tmp_path / "D"


def retry(out, *more):
    """The command, with small limits."""
    script = downloads.REPOSITORY / "data_prep" / "retry_failed.py"
    flags = {"--timeout": 1, "--retries": 0, "--image-seconds": 1, "--processes": 1}
    flags = [str(text) for pair in flags.items() for text in pair]
    return [sys.executable, str(script), str(out), *flags, "--allow-private-addresses", *more]


@pytest.fixture
def mended(base):
    """The server, with one address that answers by now."""
    base.server.mended = True
    yield base.server
    base.server.mended = False


def test_temporary_failures_are_tried_again_in_new_shards(out, mended):
    before, asked = downloads.state(out), mended.requests.copy()
    manifest, sizes = out / "manifest.json", out / "shards" / "sizes.json"
    manifest.write_text("{}")
    sizes.write_text("{}")
    done = run(retry(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not manifest.exists()
    assert not sizes.exists()
    after = downloads.state(out)
    assert {name: after[name] for name in before} == before
    asked_now = mended.requests - asked
    assert dict(asked_now) == {PATHS[row]: 1 for row in FAILED}
    again = [row for row in rows(out) if row["shard"] >= BASE_SHARDS]
    assert [row["row"] for row in sorted(again, key=lambda row: row["key"])] == FAILED
    new = {row["row"]: row for row in again if row["status"] == "success"}
    assert list(new) == [PATHS.index("/mended.jpg")]
    row = new[PATHS.index("/mended.jpg")]
    assert row["sha256"] == hashlib.sha256(BODIES["/mended.jpg"]).hexdigest()
    assert row["caption"] == '"caption of /mended.jpg'
    assert set_folder.load(out).shards == BASE_SHARDS + 1
    assert set_folder.load(out).attempted == len(PATHS)
    assert f"kept 1 of {len(FAILED)} rows ({len(FAILED)} of them tried again)" in done.stdout
    numbers, groups = retry_failed.failed_rows(out)
    assert numbers.tolist() == [r for r, p in enumerate(PATHS)
                                if EXPECTED[p] != "success" and p != "/mended.jpg"]  # fmt: skip
    assert groups[numbers == PATHS.index("/drip.jpg")] == ["too slow"]


def test_an_interrupted_retry_is_finished_before_rows_are_chosen_anew(out, base, mended):
    """A kill between the list and the plan, then one after the plan: the state is the same."""
    index = url_list.read_index(out)
    chosen = np.array([PATHS.index("/mended.jpg"), PATHS.index("/missing.jpg")])
    url_list.append(out, retry_failed.select(out, index, chosen), "retry-001")
    with downloads.marked(retry(out, "--reasons", "http 403")) as first:
        first.wait_for(lambda: set_folder.load(out).shards == BASE_SHARDS + 1)
        first.kill()
    assert set_folder.missing(out) == [BASE_SHARDS]
    done = run(retry(out, "--reasons", "http 403"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finishing the retry that was begun" in done.stdout
    again = [row["row"] for row in rows(out) if row["shard"] >= BASE_SHARDS]
    assert sorted(again) == chosen.tolist()
    sha = hashlib.sha256(BODIES["/mended.jpg"]).hexdigest()
    assert kept(out) == sorted([*kept(base.out), (int(chosen[0]), sha)])
    asked = base.server.requests.copy()
    done = run(command(base.tsv, out))  # the command that began the set finds it complete
    assert done.returncode == 0, done.stdout + done.stderr
    assert base.server.requests == asked


def test_a_second_retry_follows_the_first(out):
    assert retry_failed.begin_retry(out, ["http 404", "http 403"]) == 2
    assert set_folder.missing(out) == [BASE_SHARDS]
    for end in (".tar", ".parquet", "_stats.json"):  # as if it had failed again
        source = "00003" if end != ".parquet" else None
        target = out / "shards" / f"{BASE_SHARDS:05d}{end}"
        if source:
            shutil.copy(out / "shards" / f"{source}{end}", target)
        else:
            table = pq.read_table(out / "shards" / "00002.parquet")
            keep = np.isin(table["row"].to_numpy(), [PATHS.index("/forbidden.jpg")])
            pq.write_table(table.filter(keep), target)
    assert retry_failed.begin_retry(out, ["http 404"]) == 1
    files = [entry["file"] for entry in url_list.read_index(out)["files"]]
    assert files == ["00000.parquet", "retry-001-00000.parquet", "retry-002-00000.parquet"]
    last = pq.read_table(out / "list" / files[-1])
    assert last["row"].to_pylist() == [PATHS.index("/missing.jpg")]
    assert last["url"].to_pylist()[0].endswith("/missing.jpg")
    assert set_folder.missing(out) == [BASE_SHARDS + 1]


def test_nothing_to_try_again(out):
    before = downloads.state(out)
    done = run(retry(out, "--reasons", "dns"))
    assert done.returncode == 0, done.stderr
    assert "nothing to try again" in done.stdout
    assert downloads.state(out) == before
    assert set_folder.missing(out) == []


def test_a_set_that_is_not_finished_is_refused(out):
    (out / "shards" / "00001_stats.json").unlink()
    done = run(retry(out))
    assert done.returncode == 3
    assert f"1 of {BASE_SHARDS} shards are not finished yet" in done.stderr
    assert "data_prep/gcc.py" in done.stderr
    assert len(url_list.read_index(out)["files"]) == 1


def test_a_damaged_parquet_is_named(out):
    (out / "shards" / "00001.parquet").write_bytes(b"PAR1")
    done = run(retry(out))
    assert done.returncode == 3
    assert "00001.parquet: cannot be read" in done.stderr


def test_reasons_are_checked():
    assert retry_failed.check_reasons(["dns", "http 404"]) == ["dns", "http 404"]
    assert "other" in retry_failed.check_reasons(["all"])
    with pytest.raises(ConfigError, match="'dsn'"):
        retry_failed.check_reasons(["dsn"])
