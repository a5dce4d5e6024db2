"""MixUp and CutMix in whole runs: ranks and micro-batches change nothing, odd ones are refused."""

import json
import os
from pathlib import Path

import pytest
import torch

from engine import build, config
from loaders.errors import ConfigError
from tests import multiprocess

ROOT = Path(__file__).parent.parent.parent
CONFIG = str(ROOT / "tests" / "engine" / "tiny.yaml")
SETTINGS = [
    "data.image_text=null", "data.augmentation=mixup_cutmix", "data.workers=0", "train.steps=4",
    "model.image.kwargs.drop_path_rate=0.0", "log.save_every_steps=99", "train.global_batch=8",
]  # fmt: skip


def runs(rank, world_size, folder, pieces):
    """Losses of the four steps of each method, with that many micro-batches."""
    from engine.run import Run

    os.chdir(ROOT)
    found = {}
    for name in ("unicl", "cross_entropy"):
        place = folder / f"{name}_{world_size}_{pieces}"
        settings = [*SETTINGS, f"loss.name={name}", f"output_dir={place}"]
        cfg = config.load(CONFIG, [*settings, f"train.accumulation={pieces}"])
        Run(build.plan(cfg, world_size), torch.device("cpu")).run()
        if rank == 0:
            lines = (place / "metrics.jsonl").read_text().splitlines()
            found[name] = [json.loads(line)["loss"] for line in lines]
    return found


def test_a_run_on_two_ranks_with_micro_batches_is_the_run_on_one(tmp_path):
    one = multiprocess.run(runs, 1, tmp_path, 1)[0]
    two = multiprocess.run(runs, 2, tmp_path, 2)[0]
    assert all(len(losses) == 4 for losses in one.values())
    for name, losses in one.items():
        assert two[name] == pytest.approx(losses, rel=2e-5), name


def test_what_cannot_be_blended_is_refused():
    with pytest.raises(
        ConfigError, match=r"blends samples in pairs, and a micro-batch of 1 leaves"
    ):
        build.plan(config.load(CONFIG, [*SETTINGS, "train.accumulation=8"]), 1)
    for name in ("multitask", "supcon"):
        with pytest.raises(ConfigError, match=r"mixup_cutmix: this method cannot .* unicl, clip"):
            config.load(CONFIG, [*SETTINGS, f"loss.name={name}"])
    with pytest.raises(ConfigError, match=r"data\.augmentation\.image='mixup_cutmix'; one of"):
        config.load(CONFIG, ["data.augmentation={image: mixup_cutmix}"])
