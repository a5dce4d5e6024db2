"""studies/run.py with real trainings: killed and continued, failures, locks, costs."""

import contextlib
import json
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from studies import _cells, _evaluations, _study, _work, report
from studies import run as command
from tests.multiprocess import fork_server
from tests.studies import warm
from tests.studies.parts import ROOT, TINY, study_file

EVALUATIONS = [{"task": "zero_shot", "datasets": ["emoji_twemoji"]}]
ARMS = {
    "one": {"config": TINY},
    "two": {"config": TINY, "overrides": ["loss.name=supcon"], "without": ["zero_shot"]},
}


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    """Words that start a script in a process with everything imported."""
    address = tmp_path_factory.mktemp("warm") / "socket"
    server = fork_server().Process(target=warm.serve, args=(address,), daemon=False)
    server.start()
    deadline = time.monotonic() + 120
    while not address.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield warm.words(address)
    server.kill()
    server.join()


def made(folder, launcher, **changes):
    """The study of these tests, small enough for seconds."""
    changes = {"arms": ARMS, "evaluations": EVALUATIONS, **changes}
    return study_file(
        folder, launcher=launcher, evaluation_launcher=launcher, output=str(folder / "out"),
        **changes,
    )  # fmt: skip


def cells_of(path):
    study = _study.read(path)
    return _cells.make(study, path, _evaluations.plan(study), path.parent / "out")


@pytest.fixture
def start():
    """Function: (study, arguments) -> `studies.run` in the background; killed with the test."""
    with contextlib.ExitStack() as stack:

        def call(path, *arguments):
            process = subprocess.Popen(
                [sys.executable, "-m", "studies.run", str(path), *arguments], cwd=ROOT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            stack.callback(process.kill)
            return process

        yield call


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def state(folder):
    """Path -> time of change of what a repeated cell would write anew."""
    paths = [*folder.glob("runs/*/checkpoints/step_*/model.safetensors")]
    paths += folder.glob("runs/*/environment.json")
    return {path: path.stat().st_mtime_ns for path in paths}


def test_killed_and_continued_makes_only_what_is_missing(tmp_path, launcher, start, capsys):
    """SIGKILL in the second training; the trainings of four cells, one of them in two lives."""
    overrides = ["data.workers=0", "train.steps=20", "log.save_every_steps=3"]
    path = made(tmp_path, launcher, overrides=overrides)
    process = start(path)
    log = tmp_path / "out/runs/two-seed3/metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 7, process)
    process.kill()
    process.communicate()
    first, second, third, fourth = cells_of(path)
    pointer = second.run / "checkpoints/LAST_GOOD"
    process = start(path, "--dry-run")  # an orphan has some seconds to save and stop
    said = process.communicate()[0]
    assert first.trained()
    assert not first.lacking()
    assert not second.trained(), "killed too late to say anything"
    stopped = second.done_steps()
    assert 3 <= stopped < 20
    assert "3 of 4 cells are missing" in said
    left = 20 - stopped
    assert f"two-seed3                    {left} steps, {8 * left} samples" in said
    assert f"(after step {stopped})" in said
    before = state(tmp_path / "out")

    command.main([str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"small: 3 of 4 cells are missing, into {tmp_path / 'out'}"
    assert [line.split()[1] for line in lines if ": done in" in line] == [
        "two-seed3:", "one-seed5:", "two-seed5:"
    ]  # fmt: skip
    assert f"two-seed3: train from step {stopped};" in "\n".join(lines)
    assert all(cell.trained() and not cell.lacking() for cell in (first, second, third, fourth))
    after = state(tmp_path / "out")
    kept = {path: time for path, time in before.items() if "one-seed3" in path.parts}
    assert len(kept) == 3  # two checkpoints and the record
    assert all(after[path] == time for path, time in kept.items())
    assert [e["after_step"] for e in json.loads((second.run / "environment.json").read_text())[
        "starts"]] == [0, stopped]  # fmt: skip
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 21))
    assert pointer.read_text().strip() == "step_0000020"
    assert [line["what"] for line in first.usage()] == ["train", "zero_shot"]
    assert first.finished()["parameters"] == first.parameters()
    assert [line["what"] for line in fourth.usage()] == ["train"]

    # Now nothing is left to do, and the report is whole.
    after, started = state(tmp_path / "out"), time.monotonic()
    command.main([str(path)])
    assert "0 of 4 cells are missing" in capsys.readouterr().out
    assert time.monotonic() - started < 60
    assert state(tmp_path / "out") == after
    report.main([str(path)])
    text = capsys.readouterr().out
    assert "studies.run" not in text
    assert "(1 of 2" not in text

    # Rows that are gone are made again, without a training.
    (third.results / "one-seed5_zero_shot.jsonl").unlink()
    command.main([str(path)])
    assert "[1/1] one-seed5: zero_shot;" in capsys.readouterr().out
    assert not third.lacking()
    assert state(tmp_path / "out") == after


def test_a_failure_is_written_and_keeps_no_other_cell_from_being_made(tmp_path, launcher, capsys):
    arms = {
        "bad": {**ARMS["two"], "overrides": [f"data.image_label={tmp_path / 'nowhere'}"]},
        "one": {"config": TINY, "without": ["zero_shot"]},
    }
    small = {"seeds": [3], "overrides": ["data.workers=0", "train.steps=2"]}
    path = made(tmp_path, launcher, arms=arms, **small)
    with pytest.raises(command.CellsFailed, match=r"1 of 2 cells failed: bad-seed3") as caught:
        command.main([str(path)])
    assert caught.value.exit_code == 3  # that of train.py
    bad, one = cells_of(path)
    said = capsys.readouterr().out
    assert "exit code 3: " in said
    assert "nowhere" in (bad.notes / "failure.txt").read_text()
    assert said.count(str(tmp_path / "nowhere")) >= 2  # the command, and the program's own words
    assert one.trained()
    assert not one.lacking()
    report.main([str(path)])
    assert f"bad-seed3 failed: {bad.notes / 'failure.txt'}" in capsys.readouterr().out

    # Mended, it leaves no failure behind.
    arms["bad"]["overrides"] = []
    command.main([str(made(tmp_path, launcher, arms=arms, **small))])
    assert not (bad.notes / "failure.txt").exists()


@pytest.mark.soak  # as a kill, which is tested every day
def test_a_signal_saves_and_stops_and_the_same_command_goes_on(tmp_path, launcher, start):
    path = made(
        tmp_path, launcher, seeds=[3], arms={"one": ARMS["one"]},
        overrides=["data.workers=0", "train.steps=2000", "log.save_every_steps=4000"],
    )  # fmt: skip
    process = start(path)
    (cell,) = cells_of(path)
    log = cell.run / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 3, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert cell.done_steps() >= 3
    assert f"stopped by SIGTERM in one-seed3 after step {cell.done_steps()}" in said


@pytest.mark.soak
def test_a_cell_that_another_process_holds_comes_last(tmp_path, launcher, start, capsys):
    path = made(
        tmp_path, launcher, seeds=[3],
        arms={"one": {"config": TINY, "without": ["zero_shot"]}, "two": ARMS["two"]},
        overrides=["data.workers=0", "train.steps=2"],
    )  # fmt: skip
    first, _ = cells_of(path)
    code = (
        "import sys, time; from pathlib import Path; from engine.run_lock import RunLock; "
        f"RunLock(Path({str(first.notes)!r}), print); print('held', flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        process = start(path)
        wait_for((tmp_path / "out/runs/two-seed3/checkpoints/LAST_GOOD").exists, process)
        assert not first.run.exists()
        holder.stdin.close()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert said.index("one-seed3: another process") < said.index("two-seed3: done")
    assert said.index("two-seed3: done") < said.index("one-seed3: done")


def test_time_and_memory_are_those_of_the_process_and_its_children(tmp_path):
    cell = SimpleNamespace(notes=tmp_path, config="c", overrides=[], done_steps=lambda: 0)
    code = (
        "import subprocess, sys, time\n"
        "subprocess.run([sys.executable, '-c', 'x = bytearray(b\"1\") * (200 << 20)'])\n"
        "end = time.process_time() + 0.5\n"
        "while time.process_time() < end: pass\n"
    )
    (tmp_path / "code.py").write_text(code)
    signals = _work.Signals()
    assert _work.train(cell, f"python {tmp_path / 'code.py'}", signals) is None
    line = json.loads((tmp_path / "usage.jsonl").read_text())
    assert 0.5 <= line["cpu_seconds"] < 20
    # A child begins as large as the process that starts it, which here may hold much.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    assert 200 << 20 < line["peak_bytes"] < max(400 << 20, 1.1 * own)
    failure = _work.train(cell, "no-such-program", signals)
    assert (failure.code, failure.lines) == (127, ["no-such-program: No such file or directory"])
