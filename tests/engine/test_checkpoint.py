"""Saving when the disk fails on one rank or on all, and what the keep policy deletes."""

import json
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine import checkpoint, deepspeed_engine, optim
from engine.step import Stepper
from loaders.errors import DataError
from losses._gather import Gather
from tests import multiprocess
from tests.engine import tiny

IDENTITY = {"train.global_batch": 12}
KINDS = ((0, False), (1, False), (1, True), (3, True))


def build(stage, world_size, bf16=False):
    module = tiny.build()
    config = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 12 // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }
    optimizer = optim.build(module.model, module.method, tiny.OPTIM)
    engine = deepspeed_engine.initialise(module, optimizer, config, torch.device("cpu"))
    share = tiny.cut(tiny.make_batch(0, 12), dist.get_rank(), world_size)
    share["image"] = share["image"].to(next(module.parameters()).dtype)
    Stepper(engine, Gather(), seed=3)(0, [share])  # the moments of AdamW exist from here on
    return engine


def attempt(action, *arguments):
    """The words of the error, or None."""
    try:
        action(*arguments)
    except DataError as error:
        return str(error)


def limit(size):
    """Let this process write no file beyond a size; -1 for any."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def names(folder, pattern="*step_*"):
    return sorted(path.name for path in (folder / "checkpoints").glob(pattern))


def everything(rank, world_size, folder):
    """All that needs two ranks and an ordinary disk, in one pair of processes."""
    actions = (write_with_limits, measure, save_in_turn)
    return {do.__name__: do(rank, world_size, folder / do.__name__) for do in actions}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    both = multiprocess.run(everything, 2, tmp_path_factory.mktemp("run"))
    return {name: [outcome[name] for outcome in both] for name in both[0]}


def write_with_limits(rank, world_size, folder):
    """A save that fails on rank 1 alone, on rank 0 alone, a good one, and a conversion."""
    engine = build(1, world_size)
    seen = {}
    for victim, size in ((1, 100_000), (0, 100_000)):
        if rank == victim:
            limit(size)
        seen[f"rank {victim}"] = attempt(checkpoint.save, engine, folder, 1, IDENTITY, 2)
        limit(-1)
        dist.barrier()
        seen[f"left {victim}"] = names(folder, "*")
        dist.barrier()
    checkpoint.save(engine, folder, 1, IDENTITY, 2)
    other = build(2, world_size)
    if rank == 0:
        limit(100_000)
    last = checkpoint.last_good(folder)
    seen["conversion"] = attempt(checkpoint.load, other, last, IDENTITY)
    limit(-1)
    dist.barrier()
    seen["left of it"] = names(folder, "*universal")
    dist.barrier()
    assert checkpoint.load(other, last, IDENTITY) == 1
    return seen


def test_a_write_that_fails_on_one_rank_is_an_error_on_all(outcomes):
    for seen in outcomes["write_with_limits"]:
        for victim in (0, 1):
            words = seen[f"rank {victim}"]
            assert "step_0000001 could not be written" in words
            assert f"(rank {victim}: [Errno 27] File too large" in words
            assert "there is no earlier checkpoint" in words
            # zero_to_fp32.py and zero_to_torch.py may be there; nothing of a checkpoint is.
            assert not [name for name in seen[f"left {victim}"] if not name.startswith("zero_to")]
        assert "could not be converted" in seen["conversion"]
        assert "(rank 0: torch.save could not write a whole file)" in seen["conversion"]
        assert not seen["left of it"]


def fill_and_save(rank, world_size, folder):
    """Saves on a disk that is full at another moment each time; who raised what."""
    engine, seen = build(1, world_size), {}

    def resize(size):
        if rank == 0:
            command = ["mount", "-o", f"remount,size={size // 1024}k", str(folder)]
            subprocess.run(command, check=True)
        dist.barrier()

    def used():
        return shutil.disk_usage(folder).used

    empty = used()
    checkpoint.save(engine, folder, 1, IDENTITY, 1)
    last = folder / "checkpoints" / "step_0000001"
    sizes = {path.name: path.stat().st_size for path in last.iterdir()}
    weights, parts = sizes["model.safetensors"], sum(s for n, s in sizes.items() if ".pt" in n)
    full = used()
    moments = {"parts": parts // 3, "weights": parts + weights // 2, "half": (full - empty) // 2}
    for moment, room in moments.items():
        resize(full + room)
        seen[moment] = attempt(checkpoint.save, engine, folder, 2, IDENTITY, 1)
        dist.barrier()
        seen[f"{moment} left"] = names(folder)
        dist.barrier()
    seen["start"] = attempt(checkpoint.check_space, engine, folder)
    resize(full + 2 * (parts + weights))
    seen["start with room"] = attempt(checkpoint.check_space, engine, folder)
    checkpoint.save(engine, folder, 2, IDENTITY, 1)
    seen["end"] = names(folder)
    seen["size"] = (parts + weights) / checkpoint.size(engine)
    return seen


def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_what_is_needed(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount).returncode:
        pytest.skip("a small file system cannot be mounted here (mount -t tmpfs)")
    try:
        for seen in multiprocess.run(fill_and_save, 2, place):
            for moment in ("parts", "weights", "half"):
                assert "No space left on device" in seen[moment]
                assert "LAST_GOOD is kept and names step_0000001" in seen[moment]
                assert "Make room and run the same command again" in seen[moment]
                assert seen[f"{moment} left"] == ["step_0000001"]
            assert "rank 0: Error while serializing" in seen["weights"]
            assert "a checkpoint needs about 0.0" in seen["start"]
            assert seen["start with room"] is None
            assert seen["end"] == ["step_0000002"]
    finally:
        subprocess.run(["umount", str(place)], check=True)


def measure(rank, world_size, folder):
    """Bytes of a checkpoint by what `size` says, for all kinds of engines."""
    ratios = {}
    for stage, bf16 in KINDS:
        engine = build(stage, world_size, bf16)
        target = checkpoint.save(engine, folder / f"{stage}{bf16}", 1, IDENTITY, 1)
        written = sum(path.stat().st_size for path in target.iterdir())
        ratios[stage, bf16] = written / checkpoint.size(engine)
    return ratios


def test_size_is_about_what_is_written(outcomes):
    ratios = outcomes["measure"][0]
    assert all(0.98 < ratio < 1.05 for ratio in ratios.values()), ratios


def save_in_turn(rank, world_size, folder):
    """Saves with LAST_GOOD set back in between; what is there after each."""
    engine = build(1, world_size)
    root = folder / "checkpoints"
    seen = []

    def save(step, keep=2):
        checkpoint.save(engine, folder, step, IDENTITY, keep)
        dist.barrier()
        seen.append([*names(folder), (root / "LAST_GOOD").read_text()])
        assert (root / "latest").read_text() == f"step_{step:07d}\n"
        dist.barrier()

    def by_hand(action, *arguments):
        if rank == 0:
            action(*arguments)
        dist.barrier()

    for step in (1, 2, 3):
        save(step)
    by_hand(shutil.copytree, root / "step_0000002", root / "step_0000002_kept")
    by_hand(shutil.copytree, root / "step_0000003", root / "step_0000004")
    by_hand((root / "step_0000009").mkdir)  # as an older version left it when it was killed
    by_hand((root / ".step_0000003.tmp").mkdir)
    by_hand((root / ".step_0000001.old").mkdir)
    by_hand((root / "LAST_GOOD").write_text, "step_0000002\n")
    by_hand((root / "step_0000003" / "run.json").write_text, json.dumps({"step": 3}))
    save(3)
    assert "identity" in json.loads((root / "step_0000003" / "run.json").read_text())
    by_hand((root / "LAST_GOOD").write_text, "step_0000002\n")
    save(5, keep=1)
    save(9, keep=1)
    by_hand((root / "LAST_GOOD").unlink)
    save(2, keep=1)
    return seen


def test_keep_policy_counts_the_line_of_last_good(outcomes):
    one, two, three, four, five, nine = (f"step_000000{step}" for step in (1, 2, 3, 4, 5, 9))
    assert outcomes["save_in_turn"][0] == [
        [one, f"{one}\n"],
        [one, two, f"{two}\n"],
        [two, three, f"{three}\n"],
        [two, f"{two}_kept", three, four, nine, f"{three}\n"],  # 4 is later and not counted
        [f"{two}_kept", five, nine, f"{five}\n"],  # 3, 4 were passed; 2 is more than 1 to keep
        [f"{two}_kept", nine, f"{nine}\n"],
        [two, f"{two}_kept", nine, f"{two}\n"],  # without a pointer nothing is deleted
    ]


def test_a_folder_that_is_being_deleted_is_no_checkpoint(tmp_path, monkeypatch):
    """The deletion is cut off at once: the name is gone before the first file."""
    from engine import disk

    old = tmp_path / "step_0000001"
    old.mkdir()
    (old / "run.json").write_text("{}")
    calls = []

    def cut_off(path, **_):
        calls.append(path)
        assert not old.exists() or not path.exists()

    monkeypatch.setattr(disk.shutil, "rmtree", cut_off)
    disk.discard(old)
    assert len(calls) == 2
    assert [path.name for path in Path(tmp_path).iterdir()] == [".step_0000001.old"]
