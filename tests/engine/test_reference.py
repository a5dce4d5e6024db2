"""Runs of models of the kind `reference`: which folder they take, and that ranks change nothing."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from engine import build, checkpoint, config, record
from loaders.errors import ConfigError, DataError
from loaders.manifest import open_shards
from tests import multiprocess
from tests.engine import family, tiny
from tests.models import reference_folders

ROOT = Path(__file__).parent.parent.parent
CONFIG = str(ROOT / "tests" / "engine" / "tiny.yaml")
SHARDS = ROOT / "data/quickstart/openclipart_train/shards"
NO_SUM = {"path": "00004.tar", "samples": 68, "bytes": 266240, "sha256": None}


def plan(reference, *overrides, shards="{00000..00003}.tar"):
    settings = [
        "train.steps=2", "loss.name=clip", "model.kind=reference", "data.image_label=null",
        f"data.image_text={SHARDS}/{shards}", f"model.reference.folder={reference}",
        "model.reference.neighbours=3", "model.reference.heads=2", *overrides,
    ]  # fmt: skip
    return build.plan(config.load(CONFIG, settings), world_size=1)


def test_a_run_notes_which_reference_it_has(tmp_path, monkeypatch):
    _, checksum = reference_folders.make(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    made = plan("folder")
    section = made.cfg.model.reference
    assert (section.folder, section.checksum) == (str(tmp_path / "folder"), checksum)
    assert made.identity()["model.reference"] == {
        "neighbours": 3, "heads": 2, "checksum": checksum,
    }  # fmt: skip
    assert "reference" not in made.identity()["model"]
    line = f"reference {tmp_path}/folder: 9 pairs of random, 3 looked up for each image, checksum "
    assert line + checksum[:12] in made.describe()
    assert "model 0." in build.describe_parts(made)
    plain = build.plan(config.load(CONFIG, ["train.steps=2"]), 1).identity()
    assert "model.reference" not in plain


def test_a_run_continues_with_its_reference_alone(tmp_path):
    reference_folders.make(tmp_path / "one")
    other = reference_folders.make(tmp_path / "two", seed=1)
    before = plan(tmp_path / "one")
    facts = {"identity": before.identity()}
    (tmp_path / "one").rename(tmp_path / "moved")
    checkpoint.check_identity(facts, plan(tmp_path / "moved").identity(), tmp_path)
    with pytest.raises(DataError, match=rf"Different: model\.reference: .* now .*{other[1]}"):
        checkpoint.check_identity(facts, plan(tmp_path / "two").identity(), tmp_path)
    pinned = f"model.reference.checksum={before.cfg.model.reference.checksum}"
    with pytest.raises(DataError, match="the model was trained with the reference"):
        plan(tmp_path / "two", pinned)


def test_a_finished_run_whose_reference_moved_has_nothing_to_do(tmp_path):
    reference_folders.make(tmp_path / "one")
    run = tmp_path / "run"
    before = plan(tmp_path / "one", f"output_dir={run}")
    step = run / "checkpoints" / "step_0000002"
    step.mkdir(parents=True)
    (run / "checkpoints/LAST_GOOD").write_text(step.name)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(before.cfg, resolve=True))
    (run / "ds_config.json").write_text(json.dumps(before.deepspeed))
    (step / "run.json").write_text(json.dumps({"identity": before.identity(), "step": 2}))
    (tmp_path / "one").rename(tmp_path / "moved")
    start = record.examine(plan(tmp_path / "moved", f"output_dir={run}"))
    assert start.finished


@pytest.mark.parametrize("named", [NO_SUM, None])
def test_what_is_trained_on_is_no_reference(tmp_path, named):
    held = open_shards(str(SHARDS / "00004.tar")).shards[0]
    known = {"path": "x.tar", "samples": 1, "bytes": 1, "sha256": held.sha256}
    reference_folders.make(tmp_path / "folder", shards=[named or known])
    plan(tmp_path / "folder")
    with pytest.raises(ConfigError, match=r"1 of 5 shards of openclipart_train.*\(00004\.tar\)"):
        plan(tmp_path / "folder", shards="{00000..00004}.tar")


def test_a_folder_that_is_nowhere_is_refused_before_anything_is_built(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no reference folder.*eval\.reference .*DIR$"):
        plan(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"nowhere: .*a relative path is looked for in"):
        plan("nowhere")


def lives(rank, world_size, name, folder, reference, parts):
    """`family.lives` of CLIP with a model that looks into `reference`."""
    section = {"folder": reference, "neighbours": 3, "heads": 2}
    tiny.MODEL |= {"kind": "reference", "reference": section}
    return family.lives(rank, world_size, name, folder, parts)


@pytest.mark.soak
def test_ranks_micro_batches_stages_and_a_kill_change_nothing(tmp_path):
    reference, _ = reference_folders.make(tmp_path / "reference")
    cases = {
        "one": (1, [(0, 1, 0, 2)]),
        "pieces": (1, [(2, 2, 0, 2)]),
        "two ranks": (2, [(1, 1, 0, 2)]),
        "stage 3": (2, [(3, 2, 0, 2)]),
        "killed": (2, [(3, 2, 0, 1), (3, 2, 1, 2)]),
    }
    found = {}
    for case, (ranks, parts) in cases.items():
        folder = tempfile.mkdtemp(dir=tmp_path) if len(parts) > 1 else None
        found[case] = multiprocess.run(lives, ranks, "clip", folder, reference, parts)[0]
    values, expected = found["one"]
    start = family.untrained("clip")
    assert np.abs(expected["model.enrichment.text.gate"]).max() > 1e-4
    assert any(np.abs(expected[key] - start[key]).max() > 1e-3 for key in start)
    for case, (seen, weights) in found.items():
        np.testing.assert_allclose(seen, values, rtol=2e-5, err_msg=case)
        for key, value in expected.items():
            np.testing.assert_allclose(weights[key], value, rtol=2e-5, atol=2e-4, err_msg=case)
    for key, value in found["stage 3"][1].items():
        np.testing.assert_array_equal(found["killed"][1][key], value, err_msg=key)


def half(rank, world_size, reference):
    section = {"folder": reference, "neighbours": 3, "heads": 2}
    tiny.MODEL |= {"kind": "reference", "reference": section}
    engine = family.start("clip", 3, world_size, 2, bf16=True)
    return family.advance(engine, "clip", 0, 2, rank, world_size, 2, torch.bfloat16)


@pytest.mark.soak
def test_bfloat16_is_finite_and_near(tmp_path):
    reference, _ = reference_folders.make(tmp_path / "reference")
    found = multiprocess.run(half, 2, reference)[0]
    exact = multiprocess.run(lives, 1, "clip", None, reference, [(0, 1, 0, 2)])[0][0]
    np.testing.assert_allclose(found[:1], exact[:1], rtol=0.1)
    assert np.isfinite(found).all()
