"""A run that is killed again and again ends as if nothing had happened.

Every life is the same command. Kills come at named moments (inside a save, between its two renames,
in an evaluation, while the run starts) and at moments of the clock.
"""

from collections.abc import Collection
from signal import SIGKILL, SIGTERM, SIGUSR1

import pytest

from tests.kill import drawn, lives
from tests.kill.lives import Kill
from tests.kill.rank import POINTS

# In this order each life finds what its moment needs: a checkpoint to read, or one to delete.
SIGNALS = (
    Kill(SIGUSR1, everyone=False, point="backward pass"),
    Kill(SIGTERM, everyone=True, point="weights whole"),
    Kill(SIGUSR1, everyone=True, point="evaluating"),
    Kill(SIGTERM, everyone=True, point="features gathered"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run = lives.Run(folder, *lives.SETTINGS, registry=drawn.registry(folder))
    assert run.live() == [0, 0], run.output()[-5000:]
    lives.check_checkpoints(run)
    return run


# Where one rank dies alone every day: in a save, a restart, a collective operation and an
# evaluation. The other may wait for it until `timeout_minutes`, so that these lives are the long
# ones; the others of their kind are in the long version.
ALONE = {"optimizer part half", "reading a checkpoint", "backward pass", "features gathered"}


def points(alone: Collection[str]) -> list[Kill]:
    """SIGKILL at every named moment, at those of `alone` to one rank only."""
    return [Kill(SIGKILL, everyone=name not in alone, point=name) for name in POINTS]


def test_killed_run_equals_the_uninterrupted_one(whole, tmp_path):
    kills = [*points(ALONE), *SIGNALS, *lives.random_kills(2, seed=10)]
    ended = lives.kill_all(tmp_path, whole, kills)
    assert len(ended) >= 20


@pytest.mark.soak
def test_killed_run_equals_the_uninterrupted_one_long(whole, tmp_path):
    kills = [*points(()), *points(POINTS), *SIGNALS, *lives.random_kills(30, seed=6)]
    ended = lives.kill_all(tmp_path, whole, kills)
    assert len(ended) >= 50
