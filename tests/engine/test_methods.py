"""What holds of every method: its run does not depend on how it is computed, cut, or interrupted.

The formulas of a method are tested in tests/losses; here each is one run of two steps, which is
the same at any number of ranks and micro-batches, under every ZeRO stage, killed and continued, and
continued elsewhere.
"""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import losses
from engine import checkpoint
from models import weights
from tests import multiprocess
from tests.engine import family, tiny

STEPS = 2
# It has a queue, heads over ranks, a teacher, and a parameter in the loss. The methods, which
# are made of these parts, are run by `make soak`.
NAMES = [
    family.EVERYTHING,
    *[pytest.param(name, marks=pytest.mark.soak) for name in losses.names()],
]
# Rounding moves a step of AdamW (eps = 1, rate 1) by far less than a wrong factor would.
CLOSE = {"rtol": 2e-5, "atol": 2e-4}


def on_two_ranks(rank, world_size, folder, name):
    """Undisturbed; killed after a step; and the first life of a run that goes on elsewhere."""
    lives = functools.partial(family.lives, rank, 2, name)
    return {
        "whole": lives(None, [(1, 1, 0, STEPS)]),
        "parts": lives(f"{folder}/parts", [(1, 1, 0, 1), (1, 1, 1, STEPS)]),
        "wandering": lives(f"{folder}/wandering", [(3, 2, 0, 1)]),
        "half": half(rank, name),
    }


def on_one_rank(rank, world_size, folder, name):
    """In one piece, in two, and the rest of the run that began on two ranks."""
    lives = functools.partial(family.lives, 0, 1, name)
    return {
        "whole": lives(None, [(0, 1, 0, STEPS)]),
        "pieces": lives(None, [(2, 2, 0, STEPS)]),
        "wandering": lives(f"{folder}/wandering", [(1, 2, 1, STEPS)]),
    }


def half(rank, name):
    """The loss of a step in bfloat16."""
    engine = family.start(name, 1, 2, 2, bf16=True)
    return family.advance(engine, name, 0, 1, rank, 2, 2, torch.bfloat16)


@pytest.fixture(scope="module")
def found():
    """Of a name: what both of two ranks found, what one alone found, and where checkpoints are."""
    kept = Path(tempfile.mkdtemp())

    @functools.cache
    def run(name):
        folder = kept / name
        two = multiprocess.run(on_two_ranks, 2, str(folder), name)
        return *two, multiprocess.run(on_one_rank, 1, str(folder), name)[0], folder

    yield run
    shutil.rmtree(kept)


@pytest.mark.parametrize("name", NAMES)
def test_ranks_micro_batches_and_stages_change_nothing(found, name):
    two, other, one, _ = found(name)
    values, expected = one["whole"]
    assert np.isfinite(values).all()
    cases = {"two ranks": two["whole"], "two pieces": one["pieces"]}
    for case, (seen, weights_of) in cases.items():
        np.testing.assert_allclose(seen, values, rtol=2e-5, err_msg=case)
        assert weights_of.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(weights_of[key], value, **CLOSE, err_msg=f"{case} {key}")
    np.testing.assert_allclose(two["wandering"][0], values[:1], rtol=2e-5)
    for key, value in two["whole"][1].items():
        np.testing.assert_array_equal(other["whole"][1][key], value, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_continues_to_the_last_bit(found, name):
    two, *_ = found(name)
    values, expected = two["whole"]
    again, bits = two["parts"]
    assert values == again
    for key, value in expected.items():
        np.testing.assert_array_equal(bits[key], value, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_at_another_number_of_ranks_and_another_stage(found, name):
    _, _, one, folder = found(name)
    values, expected = one["whole"]
    seen, ours = one["wandering"]
    np.testing.assert_allclose(seen, values[1:], rtol=2e-5)
    for key, value in expected.items():
        np.testing.assert_allclose(ours[key], value, **CLOSE, err_msg=key)
    # Evaluation reads the model alone, and finds all it needs there.
    saved = folder / "wandering"
    settings = json.dumps({"model": tiny.model_settings(name)})  # JSON is YAML
    (saved / "config.yaml").write_text(settings)
    evaluated = weights.load(checkpoint.last_good(saved)).model.state_dict()
    assert {f"model.{key}" for key in evaluated} == {k for k in ours if k.startswith("model.")}
    for key, value in evaluated.items():
        np.testing.assert_array_equal(value.numpy(), ours[f"model.{key}"])


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_move_and_bfloat16_is_finite(found, name):
    two, _, one, _ = found(name)
    assert np.isfinite(two["half"]).all()
    np.testing.assert_allclose(two["half"], one["whole"][0][:1], rtol=0.1, atol=0.1)
    trained, start = one["whole"][1], family.untrained(name)
    assert any(np.abs(trained[key] - start[key]).max() > 1e-3 for key in start)
