"""No step of the loop asks the device for a value: no host waits, but where DeepSpeed does."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine import moves, optim
from tests import multiprocess
from tests.commands import CONFIG, ROOT
from tests.engine import tiny

ATEN = torch.ops.aten
# What waits for a GPU: its result, or the size of its result, is known to the device alone.
WAITS = {
    ATEN._local_scalar_dense, ATEN.item, ATEN.equal, ATEN.is_nonzero, ATEN.nonzero,
    ATEN.masked_select, ATEN.unique_dim, ATEN._unique2, ATEN._unique, ATEN.unique_consecutive,
    ATEN.unique_dim_consecutive, ATEN.repeat_interleave, ATEN.bincount,
}  # fmt: skip
MASKED = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_}
STEADY = 3  # the steps before have a name to agree on, a record to write
# The loss of the whole batch is not looked at here.
CORE = ("_core.py", "_tiles.py", "_half.py", "_gather.py")


class Waits(TorchDispatchMode):
    """Counts operators that wait, by the innermost file of this repository or of DeepSpeed."""

    def __init__(self):
        super().__init__()
        self.found = Counter()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        packet = func.overloadpacket
        indices = args[1] if packet in MASKED else ()
        if packet in WAITS or any(i is not None and i.dtype == torch.bool for i in indices):
            self.found[f"{self._where()}: {packet}"] += 1
        return func(*args, **(kwargs or {}))

    def _where(self) -> str:
        frame = sys._getframe(2)
        while frame:
            path = Path(frame.f_code.co_filename)
            if "deepspeed" in path.parts:
                return "deepspeed"
            if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
                return "core" if path.name in CORE else str(path.relative_to(ROOT))
            frame = frame.f_back
        return "unknown"


def live(rank, world_size, folder, pieces, hugging_face):
    """A run of the tiny configuration, watched from its fourth step on."""
    from engine import build, config
    from engine.loop import Trainer
    from engine.run import Run

    os.chdir(ROOT)
    watched = Waits()

    def watch(method):
        def call(self, *args):
            if self.done < STEADY:
                return method(self, *args)
            with watched:
                return method(self, *args)

        return call

    for name in ("_set_learning_rate", "_step", "_count"):
        setattr(Trainer, name, watch(getattr(Trainer, name)))
    settings = [
        f"output_dir={folder}", "train.steps=6", "log.every_steps=6", "data.workers=0",
        f"train.accumulation={pieces}",
    ]  # fmt: skip
    if hugging_face:
        settings += [
            "model.text.name=hf", "model.text.pooling=mean",
            "model.text.hf_config={model_type: bert, vocab_size: 49408, hidden_size: 16, "
            "num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16, "
            "hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}",
        ]  # fmt: skip
    trainer = Run(build.plan(config.load(CONFIG, settings), world_size), torch.device("cpu")).run()
    return trainer.done, watched.seen, dict(watched.found)


@pytest.mark.parametrize(("pieces", "hugging_face"), [(1, False), (2, True)])
def test_a_step_waits_for_nothing_but_in_deepspeed(tmp_path, pieces, hugging_face):
    ((done, seen, found),) = multiprocess.run(live, 1, tmp_path / "run", pieces, hugging_face)
    assert done == 6
    assert seen > 1000
    ours = {where: n for where, n in found.items() if not where.startswith(("deepspeed", "core"))}
    assert not ours
    assert any(where.startswith("deepspeed") for where in found)  # so the watch sees something


def test_a_batch_is_read_when_its_step_is_due_and_prepared_once():
    asked, prepared = [], []

    def read():
        for number in range(3):
            asked.append(number)
            yield [{"image": torch.full((2,), number), "step": number, "bad": []} for _ in range(2)]

    def prepare(batch):
        prepared.append(int(batch["image"][0]))
        return {**batch, "image": batch["image"] + 1}

    for number, batches in enumerate(moves.on_device(read(), torch.device("cpu"), prepare)):
        assert asked == list(range(number + 1))
        assert prepared == [n for n in range(number + 1) for _ in range(2)]
        assert [batch["image"].tolist() for batch in batches] == [[number + 1] * 2] * 2
        assert batches[0]["bad"] == []


@pytest.mark.parametrize("fused", [False, True])
def test_a_fused_update_is_the_plain_one_and_goes_on_from_either(fused):
    """The step counts of a checkpoint of the other kind go where they are wanted."""

    def made(fused):
        module = tiny.build().double()
        return module, optim.build(module.model, module.method, tiny.OPTIM, fused=fused)

    def update(module, optimizer, number):
        generator = torch.Generator().manual_seed(number)
        for parameter in module.parameters():
            parameter.grad = torch.randn(
                parameter.shape, dtype=parameter.dtype, generator=generator
            )
        optimizer.step()

    plain, one = made(False)
    for number in range(4):
        update(plain, one, number)
    first, other = made(not fused)
    for number in range(2):
        update(first, other, number)
    second, another = made(fused)
    second.load_state_dict(first.state_dict())
    another.load_state_dict(other.state_dict())
    optim.after_loading(another)
    assert {group["fused"] for group in another.param_groups} == {fused or None}
    for number in (2, 3):
        update(second, another, number)
    for (name, got), wanted in zip(second.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12, msg=name)
