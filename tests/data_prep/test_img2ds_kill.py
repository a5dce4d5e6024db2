"""Downloads that are killed, lose a worker, or fill the disk: nothing finished is lost."""

import re
import shutil
import signal
import subprocess
from collections import Counter

import pytest

from data_prep.sets import set_folder
from tests.data_prep import downloads
from tests.data_prep.downloads import EXPECTED, SHARD, command, kept, marked, rows, run, write_list
from tests.data_prep.http_server import serve

PATHS = list(EXPECTED)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    yield from downloads.base(tmp_path_factory.getbasetemp() / "download")


def check_untouched(out, before, requests, server):
    """Shards that were finished `before` have the same bytes and were not asked for again."""
    after = downloads.state(out)
    assert {name: after[name] for name in before} == before
    for name in before:
        if name.endswith(".tar"):
            shard = int(name[:5])
            for path in PATHS[shard * SHARD : (shard + 1) * SHARD]:
                if path != "/redirect5.jpg":  # where another shard's redirect leads
                    assert server.requests[path] == requests[path], path


def test_killed_at_several_moments_the_set_is_that_of_an_uninterrupted_run(base, tmp_path):
    out, seen = tmp_path / "D", []
    with serve(delay=0.05) as server:
        tsv = write_list(tmp_path / "cc3m.tsv", server, PATHS)
        moments = {
            "while img2dataset starts": lambda: list(out.glob("work/*/out-0/config.json")),
            "during the first downloads": lambda: server.requests.total() > 3,
            "after the first shard": lambda: list(out.glob("shards/*_stats.json")),
        }
        for reached in moments.values():
            with marked(command(tsv, out, threads=4)) as download:
                download.wait_for(reached)
                download.kill()
            seen.append((downloads.state(out), dict(server.requests)))
        assert 0 < len(set_folder.finished(out)) < len(base.requests) // SHARD
        # A kill may also come between the renames of a shard's files: its statistics are last.
        torn = set_folder.missing(out)[-1]
        for end in (".tar", ".parquet"):
            (out / "shards" / f"{torn:05d}{end}").write_bytes(b"torn")
        # And a retry that is killed while it appends leaves a file that the index does not name.
        shutil.copy(out / "list" / "00000.parquet", out / "list" / "retry-001-00000.parquet")
        with marked(command(tsv, out, threads=4)) as download:
            download.finish()
        for before, requests in seen:
            check_untouched(out, before, Counter(requests), server)
    assert kept(out) == kept(base.out)
    assert sorted(row["row"] for row in rows(out)) == list(range(len(PATHS)))


def test_a_lost_worker_is_noticed_and_its_shard_is_made(tmp_path):
    """img2dataset alone would wait for ever; the watchdog starts it again."""
    out, paths = tmp_path / "D", PATHS[: 2 * SHARD]
    with serve(delay=0.3) as server:
        tsv = write_list(tmp_path / "cc3m.tsv", server, paths)
        arguments = command(tsv, out, processes=1, threads=2, stall_minutes=0.15)
        with marked(arguments) as download:

            def worker():
                """The process that has the tar of the first shard open."""
                for process in download.family():
                    if any(file.path.endswith("00000.tar") for file in process.open_files()):
                        return process
                return None

            download.wait_for(worker).kill()
            text = download.finish()
    assert "nothing was downloaded for" in text
    assert re.search(r"starting it again for [12] shards", text)
    assert sorted(row["row"] for row in rows(out)) == list(range(len(paths)))


def test_shards_that_cannot_be_made_are_named_with_the_last_words_of_img2dataset(tmp_path):
    out = tmp_path / "D"
    with serve() as server:
        tsv = write_list(tmp_path / "cc3m.tsv", server, PATHS[13:17])
        arguments = command(tsv, out, samples_per_shard=2, processes=1, max_restarts=0)
        with marked(arguments) as download:  # the list is there, no shard yet
            download.wait_for(lambda: list(out.glob("work/*/out-0/config.json")))
            download.kill()
        list_file = out / "list" / "00000.parquet"
        list_file.write_bytes(list_file.read_bytes()[:-1])
        done = run(arguments)
    assert done.returncode == 3, done.stdout + done.stderr
    assert re.search(r"shards 0, 1 could not be finished \(img2dataset ended with", done.stderr)
    assert "ArrowInvalid" in done.stderr
    assert not set_folder.finished(out)


def test_a_full_disk_is_named_and_finished_shards_are_valid(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1100k", "tmpfs", str(disk)]
    if not shutil.which("mount") or run(mount).returncode:
        pytest.skip("a small file system cannot be mounted here (mount -t tmpfs)")
    out = disk / "D"
    try:
        with serve(delay=0.5) as server:
            paths = [f"/noise/{number}.jpg" for number in range(3 * 8)]
            tsv = write_list(tmp_path / "cc3m.tsv", server, paths)
            arguments = command(tsv, out, samples_per_shard=8, processes=1)
            with marked(arguments) as download:
                # The command looks again when the disk is full, with one shard complete, and the
                # files of the second still held, as by a killed worker that is not gone yet.
                first, second = (
                    out / f"work/00000-of-00001/out-0/shards/0000{shard}" for shard in (0, 1)
                )
                download.wait_for(first.with_suffix(".tar").exists)
                download.process.send_signal(signal.SIGSTOP)
                download.wait_for(second.with_suffix(".parquet").exists)
                with open(f"{second}.tar", "rb"), open(f"{second}.parquet", "rb"):
                    download.wait_for(lambda: shutil.disk_usage(disk).free == 0)
                    download.process.send_signal(signal.SIGCONT)
                    text = download.finish(3)
            assert re.search(
                r"the disk is full\. 1 shards are finished and valid; 2 are missing and need about "
                r"0\.00[12] GB",
                text,
            ), text
            before = downloads.state(out)
            assert len(before) == 3
            assert not list(out.glob("work/*/"))
            asked = dict(server.requests)
            subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
            done = run(arguments)
            assert done.returncode == 0, done.stdout + done.stderr
            after = downloads.state(out)
            assert {name: after[name] for name in before} == before
            assert all(server.requests[path] == asked[path] for path in paths[:8])
        assert [row for row, _ in kept(out)] == list(range(len(paths)))
    finally:
        # Lazily: a process that is ending may still hold a file.
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_second_command_is_refused_and_a_killed_one_leaves_nothing_running(tmp_path):
    """The first would need minutes, so its workers do not end by themselves meanwhile."""
    out = tmp_path / "D"
    with serve(delay=5) as server:
        tsv = write_list(tmp_path / "cc3m.tsv", server, [f"/jpeg/{n}.jpg" for n in range(60)])
        arguments = command(
            tsv, out, samples_per_shard=60, processes=1, threads=1, timeout=9, image_seconds=9,
            stall_minutes=2,
        )  # fmt: skip
        with marked(arguments) as first:
            first.wait_for(lambda: server.requests)
            second = run(arguments)
            assert len(first.family()) >= 4  # the command, img2dataset, its logger and a worker
            first.kill()
    assert second.returncode == 3
    assert "another process is preparing part 0 of 1" in second.stderr
