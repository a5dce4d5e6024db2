"""A run that is killed again and again ends as if nothing had happened.

Every life is the same command. Kills come at named moments (inside a save, between its two renames,
in an evaluation, while the run starts) and at moments of the clock.
"""

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


def points(everyone_but: int) -> list[Kill]:
    """SIGKILL at every named moment; to one rank alone at every third."""
    return [
        Kill(SIGKILL, everyone=number % 3 != everyone_but, point=name)
        for number, name in enumerate(POINTS)
    ]


def test_killed_run_equals_the_uninterrupted_one(whole, tmp_path):
    ended = lives.kill_all(tmp_path, whole, [*points(1), *SIGNALS, *lives.random_kills(3, seed=5)])
    assert len(ended) >= 20


@pytest.mark.soak
def test_killed_run_equals_the_uninterrupted_one_long(whole, tmp_path):
    kills = [*points(0), *points(2), *SIGNALS, *lives.random_kills(30, seed=6)]
    ended = lives.kill_all(tmp_path, whole, kills)
    assert len(ended) >= 50
