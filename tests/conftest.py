"""Which worker runs which tests, and in which order: what takes longest first.

`pytest -n 3` deals out units. A unit is a file, so that the fixtures of a module are made once; a
worker that is done with one takes the next. tests/durations.json holds the seconds of each unit;
`make durations` measures and writes it.
"""

import json
import statistics
from collections import Counter
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

DURATIONS = Path(__file__).with_name("durations.json")
# Not a file: tests that share a cluster or a download are one unit, by how their names begin,
# and long ones that share nothing are many.
TOGETHER = {
    "tests/slurm": ("tests/slurm/",),
    "tests/data_prep: one download": (
        "tests/data_prep/test_img2ds.py", "tests/data_prep/test_retry_failed.py",
        "tests/data_prep/test_img2ds_kill.py::test_killed_at_several_moments",
    ),
}  # fmt: skip
APART = (
    "tests/data_prep/test_img2ds_kill.py", "tests/engine/test_train.py",
    "tests/eval/test_two_processes.py",
)  # fmt: skip


def unit(nodeid: str) -> str:
    """The unit of a test."""
    for name, beginnings in TOGETHER.items():
        if nodeid.startswith(beginnings):
            return name
    file = nodeid.partition("::")[0]
    return nodeid if file in APART else file


class Units(LoadScopeScheduling):
    """Deals out units, in the order of the tests."""

    def _split_scope(self, nodeid: str) -> str:
        return unit(nodeid)


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is one process, and no such hook
def pytest_xdist_make_scheduler(config, log):
    """In the place of `--dist`."""
    config.option.loadscopereorder = False
    return Units(config, log)


def pytest_addoption(parser):
    """An option as of pytest-split."""
    parser.addoption("--store-durations", action="store_true", help=f"write {DURATIONS.name}")


def pytest_configure(config):
    """The process that gathers all reports may write what they say."""
    if config.option.store_durations and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())


def pytest_collection_modifyitems(items):
    """Sort the tests by the time of their unit; one that was never measured is an average one."""
    seconds = json.loads(DURATIONS.read_text())
    average = statistics.mean(seconds.values())
    items.sort(key=lambda item: -seconds.get(unit(item.nodeid), average))


class Recorder:
    """Adds up the seconds of each unit: set-up, calls and teardown."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report):
        """One phase of a test."""
        self.seconds[unit(report.nodeid)] += report.duration

    def pytest_sessionfinish(self):
        """Units that did not run now keep their place."""
        stored = json.loads(DURATIONS.read_text()) | self.seconds
        lines = {name: round(stored[name], 1) for name in sorted(stored) if exists(name)}
        DURATIONS.write_text(json.dumps(lines, indent=1) + "\n")


def exists(name: str) -> bool:
    """Whether the file of a unit is still there."""
    return (DURATIONS.parents[1] / name.partition("::")[0].partition(":")[0]).exists()
