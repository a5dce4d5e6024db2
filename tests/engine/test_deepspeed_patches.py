"""What is changed of DeepSpeed from outside, beside DeepSpeed as it comes."""

import contextlib
import math

import numpy as np
import pytest
import torch

from engine import deepspeed_engine, deepspeed_patches, optim
from engine.step import Stepper
from losses._gather import Gather
from tests import multiprocess
from tests.engine import tiny

BAD = 1  # the step whose gradients are not finite
STEPS = 3


def train(rank, world_size, stage, bf16, fused, clip, changed):
    """Norms and weights of three steps, one of which does not count, and the optimizer's state."""
    module = tiny.build()
    optimizer = optim.build(module.model, module.method, tiny.OPTIM, fused=fused)
    config = tiny.deepspeed_settings(12, stage, world_size, 1, bf16)
    config |= {"gradient_clipping": clip}
    with contextlib.ExitStack() as stack:
        if not changed:
            patch = pytest.MonkeyPatch()
            stack.callback(patch.undo)
            patch.setattr(deepspeed_patches, "shorten", lambda engine: None)
        engine = deepspeed_engine.initialise(module, optimizer, config, torch.device("cpu"))
    stepper, norms = Stepper(engine, Gather(), seed=3), []
    for step in range(STEPS):
        batch = tiny.cut(tiny.make_batch(step, 12), rank, world_size)
        batch["image"] = batch["image"].to(torch.bfloat16 if bf16 else torch.float32)
        if step == BAD and rank == 0:  # one image of one rank
            batch["image"][0] = math.nan
        stepper(step, [batch])
        norms.append(float(engine.get_global_grad_norm()))
    inner = engine.optimizer.optimizer
    state = [
        (state["step"].item(), state["exp_avg"].clone()) for state in inner.state.values()
    ]  # fmt: skip
    weights = {k: v.float() for k, v in deepspeed_engine.full_state(engine)}
    return norms, weights, state


CASES = [(1, False, True, 0.5), (1, True, True, 0.0), (2, False, False, 0.5), (2, True, True, 0.5)]


def all_cases(rank, world_size):
    return [
        [train(rank, world_size, *case, changed) for changed in (False, True)] for case in CASES
    ]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_the_update_is_that_of_deepspeed_and_a_step_that_is_not_finite_is_left_out(ranks):
    for pairs in multiprocess.run(all_cases, ranks):
        for (stage, bf16, fused, clip), (theirs, ours) in zip(CASES, pairs, strict=True):
            case = f"stage {stage}, bf16 {bf16}, fused {fused}, clip {clip}"
            assert not math.isfinite(ours[0][BAD]), case
            assert not math.isfinite(theirs[0][BAD]), case
            counted = [step for step in range(STEPS) if step != BAD]
            for step in counted:
                assert math.isclose(ours[0][step], theirs[0][step], rel_tol=1e-6), case
            for name, value in theirs[1].items():
                assert np.isfinite(value).all(), case
                np.testing.assert_allclose(ours[1][name], value, 1e-6, 1e-7, err_msg=case)
            for (steps, average), (expected, other) in zip(ours[2], theirs[2], strict=True):
                assert steps == expected == len(counted), case
                np.testing.assert_allclose(average, other, 1e-6, 1e-8, err_msg=case)
