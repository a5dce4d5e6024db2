"""reshard.py: options, refusals, and restart after kill -9."""

# ruff: noqa: F811  (pytest finds the imported fixtures by the names of arguments)
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from loaders.errors import ConfigError, DataError
from loaders.manifest import write_manifest
from tests.data_prep.test_reshard import CLASSES, SCRIPT, made, run, tars  # noqa: F401
from tests.loaders.conftest import sample, write_tar


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fraction", "1.5"], "between 0 and 1"),
        (["--fraction", "0"], "between 0 and 1"),
        (["--fraction", "0.5", "--drop"], "it is --complement"),
        (["--where", "1", "--complement"], "goes with --fraction"),
        (["--where", "1", "--seed", "-1"], "--seed lies between"),
        (["--where", "1", "--part", "2", "--parts", "2"], "parts are numbered 0 to 1"),
    ],
)
def test_options_that_do_not_fit(made, run, options, message):
    with pytest.raises(ConfigError, match=message):
        run("out", made, *options)


def test_an_empty_choice_is_an_error(made, run, tmp_path):
    for options in (["--where", "label == 5"], ["--fraction", "1/100"]):
        with pytest.raises(DataError, match="none of the 23 samples is chosen"):
            run("out", made, *options)
    assert not (tmp_path / "out").exists()


def test_parts_give_the_same_bytes(made, run):
    whole = run("whole", made, "--fraction", "0.9")
    for part in (1, 0):
        run("parts", made, "--fraction", "0.9", "--part", part, "--parts", 2)
    # The name of a set is not in its tars.
    assert tars(whole.with_name("parts")) == tars(whole)
    assert len(tars(whole)) == 4


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (["--fraction", "0.4"], "selection"),
        (["--fraction", "0.5", "--complement"], "selection"),
        (["--fraction", "0.5", "--seed", "1"], "seed"),
        (["--where", "1"], "selection"),
    ],
)
def test_another_choice_in_the_same_folder_is_refused(made, run, change, key):
    before = tars(run("out", made, "--fraction", "0.5"))
    with pytest.raises(DataError, match=f"holds another set .*{key}"):
        run("out", made, *change)
    assert tars(run("out", made, "--fraction", "0.5")) == before


def test_other_input_in_the_same_folder_is_refused(made, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    run("out", copy, "--fraction", "0.5")
    (copy / "shards" / "00002.tar").unlink()
    (copy / "manifest.json").unlink()
    write_manifest(copy, "toy", "image_label", CLASSES, "s", "l", "2026-01-31", 13)
    with pytest.raises(DataError, match="fingerprint"):
        run("out", copy, "--fraction", "0.5")


def test_after_kill_9_the_same_command_completes_the_same_set(tmp_path):
    source = tmp_path / "in"
    for shard in range(3):
        members = [m for n in range(200) for m in sample(f"{n:09d}", 0, jpg=bytes([n % 256]) * 900)]
        write_tar(source / f"{shard:05d}.tar", members)
    command = [sys.executable, SCRIPT, source, "--where", "key != ''", "--samples-per-shard", "4"]

    def finished(out):
        stats = (out / "shards").glob("*_stats.json")
        return {path.name: path.stat().st_mtime_ns for path in stats}

    subprocess.run([*command, "--out", tmp_path / "whole"], check=True, capture_output=True)
    out = tmp_path / "killed"
    for target in (2, 20, 60):
        before = finished(out)
        with subprocess.Popen([*command, "--out", out], stderr=subprocess.DEVNULL) as process:
            while len(finished(out)) < target and process.poll() is None:
                time.sleep(0.001)
            os.kill(process.pid, signal.SIGKILL)
        assert len(finished(out)) < 150, "finished before it could be killed"
        assert before.items() <= finished(out).items()  # no finished shard is made again
    before = finished(out)
    subprocess.run([*command, "--out", out], check=True, capture_output=True)
    assert before.items() <= finished(out).items()
    assert tars(out) == tars(tmp_path / "whole")
    assert len(tars(out)) == 150


def test_messages_and_exit_codes_of_the_script(made, tmp_path):
    def call(*options):
        command = [sys.executable, SCRIPT, made, "--out", tmp_path / "out", *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    wrong = call("--where", "9**9")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "error: --where: operator Pow is not available\n  9**9\n  ^\n",
    )
    assert call("--where", "label > 7").returncode == 3
    assert "sample '000000000'" in call("--where", "nothing").stderr
