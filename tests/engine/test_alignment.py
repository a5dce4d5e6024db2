"""Every parameter starts on a 16-byte line, and checkpoints of before that go on."""

import contextlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import losses
import models
from engine import checkpoint, config, deepspeed_engine, optim
from engine.step import Stepper
from loaders.errors import ConfigError
from losses._gather import Gather
from tests import multiprocess
from tests.engine import tiny

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "ds_configs").glob("*.json"))
BATCH = 12
METHODS = {"quickstart": "unicl", "swin": "multitask"}  # the second has parameters of its own
# The odd towers under every file; the quickstart's under its own kind of file and where parameters
# are whole for a moment only.
LOOKED_AT = [(file, "swin") for file in FILES] + [
    (file, "quickstart") for file in FILES if file.stem in ("zero1_fp32", "zero3_bf16")
]
IDENTITY = {"train.global_batch": BATCH}
TEXT = {"width": 32, "layers": 1, "heads": 2, "context_length": 12}
# The structure of the quickstart's towers and of Swin-T with odd numbers of elements where those
# have them: logit_scale (1), biases of relative positions (49 x heads with windows of 4).
TOWERS = {
    "quickstart": {
        "image": {"name": "resnet10t", "size": 32,
                  "kwargs": {"channels": [32, 64, 128, 256], "stem_width": 16}},
        "text": TEXT, "embed_dim": 16,
    },
    "swin": {
        "image": {"name": "swin_tiny", "size": 32,
                  "kwargs": {"embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6],
                             "window_size": 4}},
        "text": TEXT, "embed_dim": 16,
    },
}  # fmt: skip


def resolved(file, world_size, pieces=1, **zero):
    """What a run makes of a DeepSpeed file; `zero` changes its zero_optimization."""
    values = deepspeed_engine.read_json(file)
    values["zero_optimization"] |= zero
    cfg = config.load(
        ROOT / "tests/engine/tiny.yaml",
        [f"train.global_batch={BATCH}", f"train.accumulation={pieces}", "train.steps=9"],
    )
    return deepspeed_engine.resolve(values, cfg, world_size, file.name)


def build(towers, method, ds):
    torch.manual_seed(5)
    model = models.build(towers)
    dims = {"embed_dim": model.embed_dim, "image_width": model.image_width,
            "text_width": model.text_width, "num_classes": 5}  # fmt: skip
    module = deepspeed_engine.TrainModule(model, losses.build(method, {}, dims)).train()
    optimizer = optim.build(module.model, module.method, tiny.OPTIM)
    return deepspeed_engine.initialise(module, optimizer, ds, torch.device("cpu"))


def batches(step, rank, world_size, pieces, dtype):
    share = tiny.cut(tiny.make_batch(step, BATCH), rank, world_size)
    share["image"] = share["image"].to(dtype)
    return [tiny.cut(share, piece, pieces) for piece in range(pieces)]


def count(rank, world_size, looked_at):
    """By file and towers: how many parameters lie how far behind a 16-byte line."""
    found = {}
    for file, towers in looked_at:
        ds = resolved(file, world_size)
        dtype = deepspeed_engine.precision(ds)
        engine = build(TOWERS[towers], METHODS[towers], ds)
        assert {parameter.dtype for parameter in engine.module.parameters()} == {dtype}
        if deepspeed_engine.stage(ds) < 3:
            places = [parameter.data_ptr() % 16 for parameter in engine.module.parameters()]
        else:
            places = in_use(engine, batches(0, rank, world_size, 1, dtype))
        found[file.stem, towers] = dict(Counter(places))
        engine.destroy()
    return found


def in_use(engine, micro_batches):
    """Under stage 3 a parameter is whole only while its module runs."""
    places = {}

    def look(module, _):
        for parameter in module.parameters(recurse=False):
            places[id(parameter)] = parameter.data_ptr() % 16

    for module in engine.module.modules():
        module.register_forward_pre_hook(look)
    Stepper(engine, Gather(), seed=3)(0, micro_batches)
    return list(places.values())


def test_every_parameter_starts_on_a_16_byte_line():
    for found in multiprocess.run(count, 2, LOOKED_AT):
        assert found.keys() == {(file.stem, towers) for file, towers in LOOKED_AT}
        for case, offsets in found.items():
            assert list(offsets) == [0], f"{case}: {offsets}"
            assert offsets[0] > 40


def test_so_does_every_parameter_of_a_single_rank_under_stage_3():
    """Where DeepSpeed gathers nothing and takes parameters out of its flat buffer."""
    alone = [(file, "swin") for file in FILES if "zero3" in file.stem]
    (found,) = multiprocess.run(count, 1, alone)
    assert len(found) == len(alone) == 2
    for case, offsets in found.items():
        assert list(offsets) == [0], f"{case}: {offsets}"
        assert offsets[0] > 40


def train(rank, world_size, file, deepspeeds_choice=False):
    """Losses and weights of 3 steps in 3 micro-batches; `deepspeeds_choice`: the optimizer that
    DeepSpeed takes by itself."""
    ds = resolved(file, world_size, pieces=3)
    chosen = deepspeed_engine._aligning_optimizer
    if deepspeeds_choice:
        deepspeed_engine._aligning_optimizer = contextlib.nullcontext
    engine = build(TOWERS["swin"], "multitask", ds)
    deepspeed_engine._aligning_optimizer = chosen
    stepper, seen = Stepper(engine, Gather(), seed=3), []
    for step in range(3):
        pieces = batches(step, rank, world_size, 3, deepspeed_engine.precision(ds))
        seen.append(float(stepper(step, pieces)["loss"]))
    return type(engine.optimizer).__name__, seen, dict(deepspeed_engine.full_state(engine))


def both_optimizers(rank, world_size):
    file = ROOT / "ds_configs/zero1_bf16.json"
    made = [train(rank, world_size, file, choice) for choice in (True, False)]
    return [
        (name, seen, {k: v.float() for k, v in weights.items()}) for name, seen, weights in made
    ]


def test_the_aligning_optimizer_of_stage_1_steps_as_the_one_of_deepspeed():
    """Sums of three micro-batches' gradients in float32, over two ranks, from bfloat16 weights."""
    (theirs, expected, before), (ours, seen, after) = multiprocess.run(both_optimizers, 2)[0]
    assert (theirs, ours) == ("BF16_Optimizer", "DeepSpeedZeroOptimizer")
    np.testing.assert_allclose(seen, expected, rtol=5e-3)
    for name, value in before.items():  # two units in the last place of bfloat16
        np.testing.assert_allclose(after[name], value, rtol=2**-6, atol=2e-3, err_msg=name)


@pytest.mark.parametrize("value", [False, "no"])
def test_a_file_that_leaves_parameters_unaligned_is_refused(value):
    with pytest.raises(ConfigError, match=r"zero2_fp32.json: .*parameter_alignment.*16-byte"):
        resolved(ROOT / "ds_configs/zero2_fp32.json", 1, parameter_alignment=value)


def test_a_file_that_says_nothing_is_completed_and_the_run_says_so():
    for file in FILES:
        before = deepspeed_engine.read_json(file)
        stated = before["zero_optimization"].pop("parameter_alignment", None)
        cfg = config.load(ROOT / "tests/engine/tiny.yaml", ["train.steps=9"])
        ds = deepspeed_engine.resolve(before, cfg, 1, file.name)
        notes = deepspeed_engine.additions(before, ds)
        flat = ds["zero_optimization"]["stage"] in (1, 2)
        assert stated == (True if flat else None), "the shipped files state what holds"
        assert ds["zero_optimization"].get("parameter_alignment") == stated
        assert len(notes) == flat
        assert not flat or "parameter_alignment=true was added" in notes[0]
        assert not deepspeed_engine.additions(deepspeed_engine.read_json(file), ds)


def test_stage_0_sums_16_bit_gradients_in_their_own_type():
    values = json.loads((ROOT / "ds_configs/zero0_bf16.json").read_text())
    cfg = config.load(ROOT / "tests/engine/tiny.yaml", ["train.steps=9"])
    for name in ("bf16", "torch.bfloat16"):
        deepspeed_engine.resolve({**values, "data_types": {"grad_accum_dtype": name}}, cfg, 1)
    with pytest.raises(ConfigError, match="grad_accum_dtype=fp32 does not work with ZeRO stage 0"):
        deepspeed_engine.resolve({**values, "data_types": {"grad_accum_dtype": "fp32"}}, cfg, 1)


class Life:
    """One start of a run: which file, and whether as versions before the alignment made it."""

    def __init__(self, file, steps, old=False):
        self.file, self.steps, self.old = ROOT / f"ds_configs/{file}.json", steps, old

    def run(self, rank, world_size, folder):
        """Continue by `steps` steps and save; losses, whole weights, ways of loading."""
        ds = resolved(self.file, world_size)
        chosen = deepspeed_engine._aligning_optimizer
        if self.old:
            ds["zero_optimization"]["parameter_alignment"] = False
            deepspeed_engine._aligning_optimizer = contextlib.nullcontext
        engine = build(TOWERS["swin"], "multitask", ds)
        deepspeed_engine._aligning_optimizer = chosen
        last = checkpoint.last_good(folder)
        done = checkpoint.load(engine, last, IDENTITY) if last else 0
        converted = last is not None and last.with_name(f"{last.name}.universal").exists()
        stepper, seen = Stepper(engine, Gather(), seed=3), []
        dtype = deepspeed_engine.precision(ds)
        for step in range(done, done + self.steps):
            seen.append(float(stepper(step, batches(step, rank, world_size, 1, dtype))["loss"]))
        target = checkpoint.save(engine, folder, done + self.steps, IDENTITY, 5)
        torch.distributed.barrier()
        if self.old and rank == 0:  # as it was written then
            facts = json.loads((target / "run.json").read_text())
            del facts["parameter_alignment"]
            (target / "run.json").write_text(json.dumps(facts))
        torch.distributed.barrier()
        weights = {k: v.float() for k, v in deepspeed_engine.full_state(engine)}
        engine.destroy()
        return seen, weights, converted


HISTORIES = {
    "float32, begun without": (Life("zero1_fp32", 1, old=True), Life("zero1_fp32", 1)),
    "bfloat16, begun without": (Life("zero1_bf16", 1, old=True), Life("zero1_bf16", 1)),
    "bfloat16, 0 to 1": (Life("zero0_bf16", 1), Life("zero1_bf16", 1)),
    "bfloat16, 1 to 0": (Life("zero1_bf16", 1), Life("zero0_bf16", 1)),
    "bfloat16, 0": (Life("zero0_bf16", 1), Life("zero0_bf16", 1)),
    "bfloat16, 1": (Life("zero1_bf16", 1), Life("zero1_bf16", 1)),
}


def histories(rank, world_size, folder):
    first = {lives[0].file.stem for lives in HISTORIES.values()}
    whole = {name: Life(name, 2).run(rank, world_size, folder / name) for name in first}
    return whole, {
        name: [life.run(rank, world_size, folder / name) for life in lives]
        for name, lives in HISTORIES.items()
    }


@pytest.mark.soak  # two minutes of lives under every stage
def test_runs_begun_without_alignment_and_16_bit_runs_of_stage_0_continue(tmp_path):
    """Against an undisturbed run of the first life's file; where nothing changes, to the bit."""
    wholes, parts = multiprocess.run(histories, 2, tmp_path)[0]
    for name, (first, second) in parts.items():
        lives, whole = HISTORIES[name], wholes[HISTORIES[name][0].file.stem]
        changes = lives[0].old or lives[0].file != lives[1].file
        assert second[2] == changes, f"{name}: converted only where it must be"
        near = (0, 0) if not changes else (2e-2, 1e-2) if "bfloat16" in name else (1e-6, 1e-6)
        np.testing.assert_allclose(first[0] + second[0], whole[0], rtol=near[0], err_msg=name)
        for key, value in whole[1].items():
            np.testing.assert_allclose(
                second[1][key], value, *near, err_msg=f"{name}: {key}"
            )  # fmt: skip
