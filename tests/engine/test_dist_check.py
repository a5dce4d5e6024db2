"""`python -m engine.dist_check`: what it shows, and whom it names."""

import os
import re
import subprocess
import sys
from importlib import metadata

import torch

from engine import dist_check
from engine.dist import spans
from tests.commands import ROOT, Command
from tests.multiprocess import free_port


def start(*options, **place):
    environment = {key: str(value) for key, value in place.items()}
    return Command(dist_check.main, *options, environment=environment)


def test_check_under_torchrun_prints_one_table():
    port = free_port()
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "engine.dist_check"], cwd=ROOT, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    out = done.stdout
    assert done.returncode == 0, done.stderr
    lines = out.splitlines()
    assert len(lines) == 6, out
    assert lines[0].split() == ["rank", "local", "rank", "node", "process", "device", "backend"]
    for rank, line in enumerate(lines[1:3]):
        assert re.fullmatch(rf"{rank} +{rank} +\S+ +\d+ +(cpu +gloo|cuda:\d .* nccl)", line)
    assert lines[3] == f"ranks 2, nodes 1, rank 0 at 127.0.0.1 port {port}"
    assert f"torch {torch.__version__.split('+')[0]}" in lines[4]
    assert f"deepspeed {metadata.version('deepspeed')}, CUDA " in lines[4]
    assert "NCCL" in lines[4]
    assert lines[5].startswith("all-reduce over 2 ranks: 3, as expected")


def test_ranks_that_do_not_come_are_named():
    """Of four ranks two start; another job has its rank 1 only; a third one is complete."""
    place = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": 4, "MASTER_PORT": free_port()}
    quick = ["--timeout-minutes", "0.2"]
    halves = [start(*quick, RANK=rank, LOCAL_RANK=rank, **place) for rank in (0, 3)]
    lonely = start(*quick, RANK=1, LOCAL_RANK=1, **{**place, "MASTER_PORT": free_port()})
    complete = start("--timeout-minutes", "2")
    errors = [process.communicate(timeout=100)[1] for process in [*halves, lonely]]
    assert [process.returncode for process in [*halves, lonely]] == [3, 3, 3], errors
    assert "ranks 1-2 of 4 did not arrive at 127.0.0.1:" in errors[0]
    assert "rank 3 on " in errors[1] or "ranks 1-2 of 4" in errors[1]
    assert "rank 1 on " in errors[2]
    assert "rank 0 of 4 did not arrive" in errors[2]
    out, err = complete.communicate(timeout=100)
    assert complete.returncode == 0, err
    assert "all-reduce over 1 ranks: 1, as expected" in out


def test_ranks_in_words():
    assert spans([4]) == "rank 4"
    assert spans([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
