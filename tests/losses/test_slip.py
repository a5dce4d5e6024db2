"""SLIP: its worked value, its two terms, CLIP as its special case, and its head under ZeRO."""

import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import losses
import models
from engine import deepspeed_engine, optim
from engine.step import Stepper
from losses._gather import Gather
from tests import multiprocess
from tests.engine import tiny
from tests.losses import dense
from tests.losses.small import leaves

DIMS = {"embed_dim": 6, "image_width": 6, "text_width": 6, "num_classes": 5}
HEAD = {"hidden": 7, "projection": 4}
BATCH, STEPS = 12, 3


class Same(torch.nn.Module):
    """Stands where the head stands, so that features are the projections."""

    def forward(self, x, gather):
        return x


def case(seed):
    """Features of a random batch, weight and temperature of the self-supervised term."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    size = rng.randint(1, 30), rng.choice([2, 6, 16])
    names = ("image", "text", "strong1", "strong2")
    features = {name: F.normalize(torch.randn(size).double(), dim=1) for name in names}
    features["scale"] = torch.full((size[0],), rng.choice([1.0, 14.3, 100.0])).double()
    return features, rng.choice([0.0, 0.3, 1.0]), rng.choice([0.1, 0.5])


def build(weight=1.0, temperature=0.1, head=None):
    made = losses.build("slip", {"weight": weight, "temperature": temperature, **HEAD}, DIMS)
    made.head = head or made.head
    return made.double()


def gradients(total, leaves):
    return torch.autograd.grad(total, list(leaves.values()), allow_unused=True)


def test_worked_value():
    image = torch.tensor([[1, 0], [0.6, 0.8]], dtype=torch.float64)
    text = torch.tensor([[0.8, 0.6], [0.28, 0.96]], dtype=torch.float64)
    strong2 = torch.tensor([[0.8, -0.6], [0, 1]], dtype=torch.float64)
    scale = torch.full((2,), 10.0).double()
    features = {
        "image": image, "text": text, "scale": scale, "strong1": image, "strong2": strong2
    }  # fmt: skip
    out = build(head=Same())(features, torch.tensor([3, 3]), Gather())
    assert abs(out["contrastive_loss"].item() - 0.652786748928) < 1e-11
    assert abs(out["simclr_loss"].item() - 0.063779839762) < 1e-11
    total = out["contrastive_loss"] + out["simclr_loss"]
    assert abs(total.item() - 0.716566588690) < 1e-11
    torch.testing.assert_close(out["sample_loss"].mean(), total)


@pytest.mark.parametrize("block", range(6))
def test_values_and_gradients_equal_dense_float64(block):
    for seed in range(10 * block, 10 * block + 10):
        features, weight, temperature = case(seed)
        ours, theirs = leaves(features), leaves(features)
        count = len(features["image"])
        out = build(weight, temperature, Same())(ours, torch.zeros(count).long(), Gather())
        strong = (F.normalize(theirs[name], dim=1) for name in ("strong1", "strong2"))
        labels = torch.full((count,), -1)
        expected = dense.unicl(theirs["image"], theirs["text"], labels, theirs["scale"][0])
        expected = expected + weight * dense.nt_xent(*strong, temperature)
        total = out["contrastive_loss"] + out["simclr_loss"]
        torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-12)
        pairs = zip(gradients(total, ours), gradients(expected, theirs), strict=True)
        for name, (actual, wanted) in zip(ours, pairs, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11, msg=name)


def test_without_its_second_term_it_is_clip():
    features, *_ = case(4)
    labels = torch.zeros(len(features["image"]), dtype=torch.int64)
    results = []
    for method in (build(weight=0.0, head=Same()), losses.build("clip")):
        copies = leaves(features)
        out = method(copies, labels, Gather())
        total = sum(
            value for name, value in out.items() if name.endswith("_loss") and value.ndim == 0
        )
        results.append((total, *gradients(total, copies)))
    for name, ours, theirs in zip(("loss", *features), *results, strict=True):
        if name.startswith("strong"):
            assert theirs is None
            assert ours.abs().max() == 0
        else:
            assert torch.equal(ours, theirs), name


def make_batch(step):
    """Three views, of which the third is new, beside what `tiny` makes."""
    batch = tiny.make_batch(step, BATCH)
    third = torch.randn(BATCH, 1, 3, 32, 32, generator=torch.Generator().manual_seed(step))
    return {**batch, "image": torch.cat([batch["image"], third], 1)}


def module():
    torch.manual_seed(5)
    method = losses.build("slip", {"hidden": 24, "projection": 8}, tiny.DIMS)
    return deepspeed_engine.TrainModule(models.build(tiny.MODEL), method).train()


def plain_torch():
    """AdamW on the dense losses of the whole batch."""
    made, values = module(), []
    model, head = made.model, made.method.head
    optimizer = optim.build(model, made.method, tiny.OPTIM)
    for step in range(STEPS):
        batch = make_batch(step)
        views = [model.encode_image(view) for view in batch["image"].unbind(1)]
        text = model.encode_text(batch["text"][:, 0])["feature"]
        labels = torch.full((BATCH,), -1)
        loss = dense.unicl(
            views[0]["feature"].double(), text.double(), labels, model.logit_scale.double().exp()
        )
        strong = (F.normalize(head(view["pooled"], Gather()), dim=1) for view in views[1:])
        loss = loss + dense.nt_xent(*strong, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values, {name: value.numpy() for name, value in made.state_dict().items()}


def on_two(rank, world_size):
    found = {}
    for stage, pieces in ((1, 3), (3, 1), (3, 3)):
        made = module()
        config = {
            "train_batch_size": BATCH,
            "train_micro_batch_size_per_gpu": BATCH // (world_size * pieces),
            "gradient_accumulation_steps": pieces,
            "gradient_clipping": 0.0,
            # Every weight of the head is sharded at stage 3.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "steps_per_print": 10**9,
        }
        optimizer = optim.build(made.model, made.method, tiny.OPTIM)
        engine = deepspeed_engine.initialise(made, optimizer, config, torch.device("cpu"))
        stepper, seen = Stepper(engine, Gather(), seed=3), []
        for step in range(STEPS):
            mine = tiny.cut(make_batch(step), rank, world_size)
            out = stepper(step, [tiny.cut(mine, piece, pieces) for piece in range(pieces)])
            seen.append(float(out["loss"]))
        weights = dict(deepspeed_engine.full_state(engine))
        found[f"zero{stage} x{pieces}"] = seen, weights
    return found


@pytest.mark.soak  # its runs are also in tests/engine/test_methods.py
def test_its_head_runs_over_ranks_and_micro_batches_as_over_the_whole_batch():
    values, expected = plain_torch()
    before = {name: value.numpy() for name, value in module().state_dict().items()}
    first, second = multiprocess.run(on_two, 2)
    for name in first:
        mean = np.mean([first[name][0], second[name][0]], axis=0)
        np.testing.assert_allclose(mean, values, rtol=2e-5, err_msg=name)
        for key, value in expected.items():
            moved = np.abs(value - before[key]).max()
            np.testing.assert_allclose(
                first[name][1][key], value, atol=2e-4 * moved + 2e-6, err_msg=f"{name} {key}"
            )
    assert np.abs(expected["method.head.norms.0.running_mean"]).max() > 1e-3
