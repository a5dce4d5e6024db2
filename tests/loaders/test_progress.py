"""A bar on a terminal; anywhere else whole lines, one in 30 seconds and the last."""

import io
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from loaders.progress import Progress
from tests.test_imports import MAY_USE, files

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def clock(monkeypatch):
    """The time that tqdm sees, as a list of one number."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_a_line_every_thirty_seconds_and_the_last(clock):
    file = io.StringIO()
    with Progress(desc="pack", unit="img", total=1000, initial=100, file=file) as bar:
        for _ in range(9):
            clock[0] += 10
            bar.update(100)
    assert file.getvalue().splitlines() == [
        "pack: 400 of 1000 img (40 %), 10 img/s, 00:30 elapsed, 01:00 left",
        "pack: 700 of 1000 img (70 %), 10 img/s, 01:00 elapsed, 00:30 left",
        "pack: 1000 of 1000 img (100 %), 10 img/s, 01:30 elapsed",
    ]


def test_work_that_polls_shows_that_it_waits(clock):
    file = io.StringIO()
    bar = Progress(desc="wait", unit="B", scaled=True, total=2_000_000, file=file)
    for _ in range(4):
        clock[0] += 16
        bar.update(0)
    assert file.getvalue().splitlines() == [
        "wait: 0.00 of 2.00MB (0 %), 0.00B/s, 00:32 elapsed",
        "wait: 0.00 of 2.00MB (0 %), 0.00B/s, 01:04 elapsed",
    ]


def test_iteration_facts_at_the_end_and_lines_of_others(clock):
    file = io.StringIO()
    for number in (bar := Progress(range(3), desc="read", unit="row", file=file)):
        clock[0] += 4
        bar.set_postfix(kept=f"{number}", refresh=False)
        Progress.write("note", file)
    last = "read: 3 of 3 row (100 %), 0.25 row/s, 00:12 elapsed, kept=2\n"
    assert file.getvalue() == "note\n" * 3 + last


@pytest.mark.parametrize("options", [{"show": False}, {"leave": False}, {"after": 2}])
def test_what_shall_not_be_shown_is_not(clock, options):
    file = io.StringIO()
    assert list(Progress("abc", desc="x", unit="row", file=file, **options)) == ["a", "b", "c"]
    assert file.getvalue() == ""


def test_a_terminal_has_a_bar():
    """And a process without one has no carriage return: the same program, once on each."""
    program = (
        "import sys; from loaders.progress import Progress\n"
        "for _ in Progress(range(4), desc='read', unit='row'): pass"
    )
    above, below = pty.openpty()
    termios.tcsetwinsize(below, (24, 80))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-c", program]
    subprocess.run(start, stderr=below, env=environment, check=True)
    os.close(below)
    shown = os.read(above, 10_000).decode()
    assert "\rread: 100%|" in shown
    assert "4/4" in shown
    piped = subprocess.run(start, capture_output=True, env=environment, check=True).stderr.decode()
    assert piped.startswith("read: 4 of 4 row (100 %), ")
    assert "\r" not in piped


def test_no_other_file_shows_progress_its_own_way():
    own = [
        str(path.relative_to(ROOT))
        for package in MAY_USE
        for path in files(package)
        if "import tqdm" in path.read_text()
    ]
    assert own == ["loaders/progress.py"]
