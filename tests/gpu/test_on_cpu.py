"""The checks of this folder, tried on the CPU: what they compare and when they fail."""

import math
import subprocess
import sys

import pytest
import torch

from tests.gpu import conftest, methods, runs, table


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A float32 run of three steps whose loop tells when waiting would be an error."""
    folder = tmp_path_factory.mktemp("cpu") / "run"
    size = ("train.steps=9", "train.global_batch=8", "data.workers=0")
    process = runs.start(folder, *size, cuda=False, hook="say_modes")
    return folder, runs.finish(process, folder)


@pytest.mark.soak  # a training of its own, for a check that only a GPU needs
def test_a_run_and_its_losses(trained):
    folder, text = trained
    found = runs.losses(folder)
    assert len(found) == 9
    assert runs.difference(found, found) == 0
    other = [*found[:-1], found[-1] * 1.5]
    assert math.isclose(runs.difference(other, found), 0.5)
    assert runs.difference([*found[:-1], math.nan], found) == math.inf
    assert runs.difference(found[:-1], found) == math.inf
    assert text.index("waiting is: error") < text.index("waiting is: default")
    before = text[: text.index("waiting is: error")]
    between = text[len(before) : text.index("waiting is: default")]
    assert "step 3/9" in before
    assert "step 4/9" not in before
    assert "step 7/9" in between
    assert "step 8/9" not in between


@pytest.mark.parametrize("name", ["unicl", pytest.param("multitask", marks=pytest.mark.soak)])
def test_a_method_against_float64(name, monkeypatch):
    loss, gradient = methods.worst(name, torch.device("cpu"))
    assert loss < 1e-5
    assert gradient < 1e-4
    plain = methods.passes

    def wrong(*arguments):
        """A gradient that is off by a hundredth in float32."""
        found = plain(*arguments)
        if arguments[1] == torch.float32:
            key = max(found.keys() - {"loss"}, key=lambda name: found[name].abs().max())
            found[key] = found[key] * 1.01
        return found

    monkeypatch.setattr(methods, "passes", wrong)
    assert methods.worst(name, torch.device("cpu"))[1] > 5e-3


def test_the_table_says_what_happened():
    rows = [
        table.Row("a", "passed", {"error": 0.00012345, "operators": "none"}),
        table.Row("b", "FAILED", {}, "assert 1 < 0 | x"),
    ]
    lines = table.render(rows).splitlines()
    assert "torch " + torch.__version__.split("+")[0] in lines[0]
    assert "| a | passed | error 0.000123, operators none |" in lines
    assert "| b | FAILED | assert 1 < 0 \\| x |" in lines
    assert lines[-1] == "1 passed, 1 FAILED, 0 skipped"


def test_without_a_device_the_command_says_so_in_one_sentence():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu"], cwd=runs.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("no CUDA device: ")
    assert len(done.stderr.splitlines()) == 1


def test_every_file_of_this_folder_has_its_place_in_the_order():
    files = {path.stem for path in (runs.ROOT / "tests/gpu").glob("test_*.py")}
    assert files == set(conftest.ORDER)


PROBE = """
import pytest
pytestmark = pytest.mark.gpu
def test_good(figures):
    figures["error"] = 0.5
def test_bad(figures):
    figures["error"] = 2.0
    assert figures["error"] < 1
def test_left_out():
    pytest.skip("no time left")
"""


def test_figures_and_outcomes_reach_the_table(tmp_path):
    """The same plugin, in a folder of its own, as if there were a device."""
    (tmp_path / "test_losses.py").write_text(PROBE)
    (tmp_path / "conftest.py").write_text(
        "import torch\ntorch.cuda.is_available = lambda: True\n"
        "torch.cuda.get_device_name = lambda: 'some card'\n"
        "from tests.gpu.conftest import *\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(tmp_path), f"--rootdir={tmp_path}",
         f"--confcutdir={tmp_path}", "-m", "gpu", "--gpu-seconds=100", "-p", "no:cacheprovider"],
        cwd=runs.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert "card some card, driver " in done.stdout, done.stdout + done.stderr
    assert "| losses: good | passed | error 0.5 |" in done.stdout
    assert "| losses: bad | FAILED | error 2; assert 2.0 < 1 |" in done.stdout
    assert "| losses: left_out | skipped | Skipped: no time left |" in done.stdout
    assert "1 passed, 1 FAILED, 1 skipped" in done.stdout
