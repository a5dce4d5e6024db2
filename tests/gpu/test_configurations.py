"""Every file of ds_configs/ in 1 and 4 micro-batches, ten steps on a GPU, against the CPU."""

from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.gpu import runs

pytestmark = pytest.mark.gpu
TOGETHER = 6  # runs at a time; each has a data worker, and starting takes most of its time


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A future of the losses of (file, micro-batches, on the device), all begun at once.

    The CPU's two are in float32 at ZeRO-0; batch norms see micro-batches, so each number of them
    has its own.
    """
    root = tmp_path_factory.mktemp("runs")
    wanted = [("zero0_fp32", pieces, False) for pieces in runs.PIECES]
    # The one that once crashed comes first.
    files = sorted(runs.FILES, key=lambda file: file != "zero1_fp32")
    wanted += [(file, pieces, True) for file in files for pieces in runs.PIECES]
    with ThreadPoolExecutor(TOGETHER) as pool:
        futures: dict[tuple, Future] = {
            run: pool.submit(runs.train, root / "-".join(map(str, run)), *run) for run in wanted
        }
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.mark.parametrize("pieces", runs.PIECES)
@pytest.mark.parametrize("file", sorted(runs.FILES, key=lambda file: file != "zero1_fp32"))
def test_trains_as_the_cpu_does(running, figures, file, pieces):
    found = running[file, pieces, True].result()
    expected = running["zero0_fp32", pieces, False].result()
    bound = next(bound for kind, bound in runs.BOUNDS.items() if kind in file)
    figures["largest difference of a loss"] = runs.difference(found, expected)
    figures["bound"] = bound
    assert runs.difference(found, expected) < bound, f"{found} on the GPU, {expected} on the CPU"
