"""The disk fills up while a run saves: all ranks end in words, and the same command continues."""

import re
import shutil
import subprocess

import pytest

from tests.kill import lives


@pytest.fixture
def disk(tmp_path):
    """A file system of 100 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount).returncode:
        pytest.skip("a small file system cannot be mounted here (mount -t tmpfs)")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_the_run_on_all_ranks_and_it_continues(disk, tmp_path):
    steps = ("train.steps=4", "log.save_every_steps=2")
    whole = lives.Run(tmp_path / "whole", *steps)
    assert whole.live() == [0, 0], whole.output()[-3000:]

    run = lives.Run(tmp_path, *steps, out=disk / "run")
    filler = disk / "filler"
    size = sum(path.stat().st_size for path in (whole.out / "checkpoints/step_0000002").iterdir())
    filler.write_bytes(bytes(100 * 2**20 - size * 3 // 2))
    assert run.live() == [3, 3], run.output()[-3000:]
    words = re.findall(r"error: (?:rank 1 on \S+: )?(checkpoint .*)", run.output())
    assert len(words) == 2, run.output()[-3000:]
    for line in words:
        assert "step_0000004 could not be written" in line
        assert "No space left on device" in line
        needed = re.search(r"needs about (0\.\d+) GB", line)
        assert float(needed[1]) == pytest.approx(size / 1e9, rel=0.1)
        assert re.search(r"0\.0\d\d GB are free now that its half-written files", line)
        assert "LAST_GOOD is kept and names step_0000002" in line
    assert run.last_good() == 2
    lives.check_checkpoints(run)
    filler.unlink()
    assert run.live() == [0, 0], run.output()[-3000:]
    assert "after step 2" in run.output()
    assert lives.trace(run.out) == lives.trace(whole.out)
    lives.check_weights(run, whole, 4)
