"""Checks on a GPU: skipped by name without one, most telling first, a table at the end.

A check that gives figures puts them into `figures`, a dictionary; they become its row's. With
`--gpu-seconds N` (`python -m tests.gpu` does it) what would begin later than that is left out by
name.
"""

import time

import pytest
import torch

from tests.gpu import table

NO_DEVICE = "no CUDA device: the checks of tests/gpu need one"
START = time.monotonic()
# Files in the order of what they tell; within a file tests stand in order.
ORDER = ("test_configurations", "test_losses", "test_loop", "test_on_cpu")


def pytest_addoption(parser):
    """How long checks may begin."""
    parser.addoption("--gpu-seconds", type=float, default=None, help="leave out what begins later")


def pytest_configure(config):
    """The marker, where pyproject.toml is not read."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device; `make gpu-check` runs it")
    if config.getoption("gpu_seconds", None):
        config.pluginmanager.register(Rows(), "gpu rows")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Skip by name, and put the checks in order where they are all there is."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NO_DEVICE))
    if config.getoption("gpu_seconds", None):
        items.sort(key=lambda item: ORDER.index(item.path.stem))


def pytest_runtest_setup(item):
    """Leave out what would begin too late."""
    limit = item.config.getoption("gpu_seconds", None)
    if limit and time.monotonic() - START > limit:
        pytest.skip(f"no time left of {limit:g} s")


@pytest.fixture
def figures(record_property):
    """A dictionary of what a check measured."""
    found: dict[str, object] = {}
    yield found
    for name, value in found.items():
        record_property(name, value)


class Rows:
    """Keeps what the checks reported, and prints the table."""

    def __init__(self) -> None:
        self.rows: list[table.Row] = []

    def pytest_runtest_logreport(self, report):
        """Of the last phase that says anything."""
        name = report.nodeid.rpartition("/")[2].replace(".py::test_", ": ").removeprefix("test_")
        if report.when == "teardown" or (report.when == "setup" and report.failed):
            facts = dict(report.user_properties)
            outcome = "FAILED" if report.failed else facts.pop("outcome", self.outcome)
            self.rows.append(table.Row(name, outcome, facts, self.reason))
            self.outcome, self.reason = "passed", ""
        else:
            if report.failed:
                lines = str(report.longrepr).splitlines()
                self.outcome, self.reason = "FAILED", next(
                    (line[2:].strip() for line in lines if line.startswith("E ")), ""
                )  # fmt: skip
            elif report.skipped:
                self.outcome, self.reason = "skipped", str(report.longrepr[2])

    outcome, reason = "passed", ""

    def pytest_terminal_summary(self, terminalreporter):
        """The table."""
        terminalreporter.write_line("\n" + table.render(self.rows))
