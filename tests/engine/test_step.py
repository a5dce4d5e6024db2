"""The distributed step against one process of plain torch: no DeepSpeed, no tiles, no ranks."""

import numpy as np
import pytest
import torch

import losses
import models
from engine import deepspeed_engine, optim
from engine.step import Stepper, saved_bytes
from losses._gather import Gather
from losses._queue import Queue
from tests import multiprocess
from tests.engine import tiny
from tests.losses import dense

# One view, two, masked tokens and a queue, a teacher: what replay has to do with. The others: soak.
TELLING = {"unicl", "supcon", "declip", "moco"}
NAMES = [
    name if name in TELLING else pytest.param(name, marks=pytest.mark.soak)
    for name in losses.names()
]
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def plain_torch(steps=3, size=12):
    """AdamW on the dense UniCL loss of the whole batch."""
    module = tiny.build()
    model = module.model
    optimizer = optim.build(model, module.method, tiny.OPTIM)
    values = []
    for step in range(steps):
        batch = tiny.make_batch(step, size)
        image = model.encode_image(batch["image"][:, 0])["feature"].double()
        text = model.encode_text(batch["text"][:, 0])["feature"].double()
        loss = dense.unicl(image, text, batch["label"], model.logit_scale.double().exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values, {k: v.float().numpy() for k, v in module.state_dict().items()}


def all_cases(rank, world_size):
    cases = [(stage, pieces) for stage in range(4) for pieces in (1, 3)]
    found = {f"zero{s} x{k}": tiny.train(rank, world_size, s, k) for s, k in cases}
    # Graphs of two of three micro-batches are alive at once.
    kept = {f"zero{s} kept": tiny.train(rank, world_size, s, 3, kept=2) for s in (0, 1, 2)}
    offload = {f"zero{s} offload": tiny.train(rank, world_size, s, 3, offload=True) for s in (1, 2)}
    return found | kept | offload


def test_two_ranks_any_stage_any_accumulation_equal_plain_torch():
    values, expected = plain_torch()
    first, second = multiprocess.run(all_cases, 2)
    assert len(first) == 13
    for case in first:
        mean = np.mean([first[case]["losses"], second[case]["losses"]], axis=0)
        np.testing.assert_allclose(mean, values, rtol=2e-5, err_msg=case)
        start = {k: v.detach().numpy() for k, v in tiny.build().state_dict().items()}
        for name, weight in expected.items():
            moved = np.abs(weight - start[name]).max()
            np.testing.assert_allclose(
                first[case]["weights"][name],
                weight,
                atol=2e-4 * moved + 2e-6,
                err_msg=f"{case} {name}",
            )


class Graph(torch.nn.Module):
    """Stands where the engine stands: plain backward, so that gradients can be read."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)

    def backward(self, loss, scale_wrt_gas=True):
        loss.backward()

    def step(self):
        pass


def build_with_drop_path(name):
    """Method `name` and its towers; queues hold something, or a loss could be 0."""
    module = tiny.build(name, drop_path=0.5)
    for part in module.method.modules():
        if isinstance(part, Queue):
            part.keep(torch.eye(8, part.rows.shape[1]))
            part.write()
    return module


@pytest.mark.parametrize(
    "kept", [pytest.param(1, marks=pytest.mark.soak), 2, pytest.param(3, marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("name", NAMES)
def test_cached_gradients_replay_drop_path(name, kept):
    """K = 3 with drop path 0.5: cached gradients equal those of one graph with the same noise."""
    cached = build_with_drop_path(name)
    views = len(cached.method.images), len(cached.method.texts)
    pieces = [tiny.cut(tiny.make_batch(0, 12, *views), part, 3) for part in range(3)]
    graph = saved_bytes(lambda: cached(pieces[0]), cached)
    stepper = Stepper(Graph(cached), Gather(), seed=3, graph_bytes=int((kept + 0.5) * graph))
    stepper(0, pieces)
    assert stepper.kept == kept

    whole = build_with_drop_path(name)
    stepper = Stepper(Graph(whole), Gather(), seed=3)
    features = []
    for number, piece in enumerate(pieces):
        stepper._seed(0, number)
        features.append({**whole(piece), **whole.targets(piece)})
    joined = {key: torch.cat([f[key] for f in features]) for key in features[0]}
    out = whole.method(joined, torch.cat([p["label"] for p in pieces]), Gather())
    sum(v for k, v in out.items() if k.endswith("_loss") and v.ndim == 0).backward()

    compared = 0
    for (key, a), (_, b) in zip(cached.named_parameters(), whole.named_parameters(), strict=True):
        if b.grad is None or not b.grad.abs().max():
            assert a.grad is None or not a.grad.abs().max(), key
            continue
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=key)
        compared += 1
    assert compared > 5


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_batch_norms_count_each_micro_batch_once_and_in_order(kept):
    text = {"width": 16, "layers": 1, "heads": 2, "context_length": 12}
    image = {"name": "resnet10t", "size": 32, "kwargs": {}}
    config = {"image": image, "text": text, "embed_dim": 8}
    pieces = [tiny.cut(tiny.make_batch(0, 12), part, 3) for part in range(3)]
    states = []
    for cached in (True, False):
        torch.manual_seed(5)
        method = losses.build("unicl", {}, tiny.DIMS)
        module = deepspeed_engine.TrainModule(models.build(config), method).train()
        if cached:
            stepper = Stepper(Graph(module), Gather(), seed=3, graph_bytes=1)
            stepper.kept = kept
            stepper(0, pieces)
        else:
            with torch.no_grad():
                for piece in pieces:
                    module(piece)
        states.append({k: v for k, v in module.state_dict().items() if k.split(".")[-1] in BUFFERS})
    assert len(states[0]) > 20
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-6, atol=0, msg=name)


def one_bf16_step(rank, world_size):
    return tiny.train(rank, world_size, stage=1, pieces=2, steps=1, size=4, bf16=True)


def test_bf16_step_is_finite_and_near_float32():
    (result,) = multiprocess.run(one_bf16_step, 1)
    values, _ = plain_torch(steps=1, size=4)
    assert abs(result["losses"][0] / values[0] - 1) < 0.05
    assert all(np.isfinite(weight).all() for weight in result["weights"].values())
