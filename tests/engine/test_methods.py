"""What holds of every method: its run does not depend on how it is computed, cut, or interrupted.

The formulas of a method are tested in tests/losses; here each is one run of three steps, which is
the same at any number of ranks and micro-batches, under every ZeRO stage, killed and continued, and
continued elsewhere.
"""

import functools
import json
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

import losses
from engine import checkpoint
from models import weights
from tests import multiprocess
from tests.engine import family, tiny

STEPS = 3
# Rounding moves a step of AdamW (eps = 1, rate 1) by far less than a wrong factor would.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def on_one(rank, world_size, folder):
    return guarded(on_one_rank, folder)


def on_two(rank, world_size, folder):
    return guarded(on_two_ranks, rank, folder)


def guarded(function, *args):
    """What a function finds of every method, or how it failed, so that one does not hide others."""
    found = {}
    for name in losses.names():
        try:
            found[name] = function(*args, name)
        except Exception:
            found[name] = traceback.format_exc()
    return found


def on_two_ranks(rank, folder, name):
    """Undisturbed; killed after a step; and the first life of a run that goes on elsewhere."""
    lives = functools.partial(family.lives, rank, 2, name)
    return {
        "whole": lives(f"{folder}/{name}/whole", [(1, 1, 0, STEPS)]),
        "parts": lives(f"{folder}/{name}/parts", [(1, 1, 0, 1), (1, 1, 1, STEPS)]),
        "wandering": lives(f"{folder}/{name}/wandering", [(3, 3, 0, 1)]),
        "half": half(rank, name),
    }


def on_one_rank(folder, name):
    """In one piece, in three, and the rest of the run that began on two ranks."""
    lives = functools.partial(family.lives, 0, 1, name)
    return {
        "whole": lives(f"{folder}/{name}/one", [(0, 1, 0, STEPS)]),
        "pieces": lives(f"{folder}/{name}/pieces", [(2, 3, 0, STEPS)]),
        "wandering": lives(f"{folder}/{name}/wandering", [(1, 3, 1, STEPS)]),
    }


def half(rank, name):
    """Losses of two steps in bfloat16."""
    engine = family.start(name, 1, 2, 2, bf16=True)
    return family.advance(engine, name, 0, 2, rank, 2, 2, torch.bfloat16)


@pytest.fixture(scope="module")
def found():
    """Per method what two ranks found, what one found, and where the checkpoints are."""
    with tempfile.TemporaryDirectory() as folder:
        two = multiprocess.run(on_two, 2, folder)
        one = multiprocess.run(on_one, 1, folder)[0]
        yield two, one, Path(folder)


def of(found, name):
    two, one, folder = found
    for result in (two[0][name], two[1][name], one[name]):
        assert isinstance(result, dict), result
    return two[0][name], two[1][name], one[name], folder / name


@pytest.mark.parametrize("name", losses.names())
def test_ranks_micro_batches_and_stages_change_nothing(found, name):
    two, other, one, _ = of(found, name)
    values, expected = one["whole"]
    assert np.isfinite(values).all()
    cases = {"two ranks": two["whole"], "three pieces": one["pieces"]}
    for case, (seen, weights_of) in cases.items():
        np.testing.assert_allclose(seen, values, rtol=2e-5, err_msg=case)
        assert weights_of.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(weights_of[key], value, **CLOSE, err_msg=f"{case} {key}")
    np.testing.assert_allclose(two["wandering"][0], values[:1], rtol=2e-5)
    for key, value in two["whole"][1].items():
        np.testing.assert_array_equal(other["whole"][1][key], value, err_msg=key)


@pytest.mark.parametrize("name", losses.names())
def test_a_killed_run_continues_to_the_last_bit(found, name):
    two, *_ = of(found, name)
    values, expected = two["whole"]
    again, bits = two["parts"]
    assert values == again
    for key, value in expected.items():
        np.testing.assert_array_equal(bits[key], value, err_msg=key)


@pytest.mark.parametrize("name", losses.names())
def test_a_run_goes_on_at_another_number_of_ranks_and_another_stage(found, name):
    _, _, one, folder = of(found, name)
    values, expected = one["whole"]
    seen, ours = one["wandering"]
    np.testing.assert_allclose(seen, values[1:], rtol=2e-5)
    for key, value in expected.items():
        np.testing.assert_allclose(ours[key], value, **CLOSE, err_msg=key)
    # Evaluation reads the model alone, and finds all it needs there.
    saved = folder / "wandering"
    (saved / "config.yaml").write_text(json.dumps({"model": tiny.MODEL}))  # JSON is YAML
    evaluated = weights.load(checkpoint.last_good(saved)).model.state_dict()
    assert {f"model.{key}" for key in evaluated} == {k for k in ours if k.startswith("model.")}
    for key, value in evaluated.items():
        np.testing.assert_array_equal(value.numpy(), ours[f"model.{key}"])


@pytest.mark.parametrize("name", losses.names())
def test_the_weights_move_and_bfloat16_is_finite(found, name):
    two, _, one, _ = of(found, name)
    assert np.isfinite(two["half"]).all()
    np.testing.assert_allclose(two["half"], one["whole"][0][:2], rtol=0.1, atol=0.1)
    trained, start = one["whole"][1], family.untrained(name)
    assert any(np.abs(trained[key] - start[key]).max() > 1e-3 for key in start)
