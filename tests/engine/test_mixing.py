"""MixUp and CutMix in whole runs: ranks and micro-batches change nothing, odd ones are refused."""

import json
import os
from pathlib import Path

import pytest
import torch

from engine import build, config
from loaders.errors import ConfigError
from losses import _mixing
from tests import multiprocess

ROOT = Path(__file__).parent.parent.parent
CONFIG = str(ROOT / "tests" / "engine" / "tiny.yaml")
SETTINGS = [
    "data.image_text=null", "data.augmentation=mixup_cutmix", "data.workers=0", "train.steps=4",
    "model.image.kwargs.drop_path_rate=0.0", "log.save_every_steps=99", "train.global_batch=8",
]  # fmt: skip


def runs(rank, world_size, folder, pieces):
    """Losses of the four steps with that many micro-batches, and the share of each of these."""
    from engine.run import Run

    os.chdir(ROOT)
    shares, mixed = [], _mixing.mixed
    _mixing.mixed = lambda images, chosen: shares.append(chosen.share) or mixed(images, chosen)
    settings = [*SETTINGS, f"output_dir={folder}", f"train.accumulation={pieces}"]
    Run(build.plan(config.load(CONFIG, settings), world_size), torch.device("cpu")).run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], shares


def test_a_run_on_two_ranks_with_micro_batches_is_the_run_on_one(tmp_path):
    drawn = [_mixing.draw(0, step, 32, 32) for step in range(4)]
    assert {chosen.box is None for chosen in drawn} == {True, False}
    one, shares = multiprocess.run(runs, 1, tmp_path / "one", 1)[0]
    assert shares == [chosen.share for chosen in drawn]
    two, shares = multiprocess.run(runs, 2, tmp_path / "two", 2)[0]
    assert shares == [chosen.share for chosen in drawn for _ in range(2)]
    assert len(one) == 4
    assert two == pytest.approx(one, rel=2e-5)


def test_what_cannot_be_blended_is_refused():
    with pytest.raises(
        ConfigError, match=r"blends samples in pairs, and a micro-batch of 1 leaves"
    ):
        build.plan(config.load(CONFIG, [*SETTINGS, "train.accumulation=8"]), 1)
    for name in ("multitask", "supcon"):
        with pytest.raises(ConfigError, match=r"mixup_cutmix: this method cannot .* unicl, clip"):
            config.load(CONFIG, [*SETTINGS, f"loss.name={name}"])
    with pytest.raises(ConfigError, match=r"data\.augmentation\.image='mixup_cutmix'; one of"):
        config.load(CONFIG, [*SETTINGS, "data.augmentation={image: mixup_cutmix}"])
