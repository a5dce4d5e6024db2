"""OneR: worked values, the dense formula, its identities, CLIP as its special case, its passes."""

import math
import random

import pytest
import torch
from torch.nn import functional as F

import losses
import models
from losses import _masking, oner
from losses._gather import Gather
from losses._masking import mask_tokens
from losses._method import loss_terms
from models.config import ModelConfig
from tests.engine import tiny
from tests.losses import dense
from tests.losses.small import leaves, run
from tests.losses.test_no_waiting import NoOperatorWaits, NoTensorIsRead

ALL = list(oner.OBJECTIVES)
NAMES = ("image", "text", "image_in_text", "text_in_image", "both")


def build(objectives=ALL, mixes="raw", masked=1.0):
    """The method in float64, whose head guesses among four words of width 3."""
    torch.manual_seed(0)
    options = {"objectives": list(objectives), "mixes": mixes, "masked": masked}
    return losses.build("oner", options, {"text_width": 3, "vocab_size": 4}).double()


def degrees(*angles):
    turns = torch.tensor(angles, dtype=torch.float64).deg2rad()
    return torch.stack([turns.cos(), turns.sin()], 1)


def case(seed):
    """Features of a random batch, of unit length, with masked tokens and the scale."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    size = rng.randint(1, 20), rng.choice([2, 6, 16])
    features = {name: F.normalize(torch.randn(size).double(), dim=1) for name in NAMES}
    features["masked_count"] = torch.randint(0, 3, size[:1]).double()
    features["masked_sum"] = torch.rand(size[0]).double() * features["masked_count"]
    features["scale"] = torch.full(size[:1], rng.choice([1.0, 14.3, 100.0])).double()
    return features


def clip(first, second, scale):
    """Both directions of CLIP's loss, from all products."""
    return dense.unicl(first, second, torch.full((len(first),), -1), scale)


def expected(features, mixes):
    """The four objectives and the mean over masked tokens, by the table's formulas."""
    i, t, i_t, t_i, j = (features[name] for name in NAMES)
    z, p = (i + t) / 2, (i_t + t_i) / 2
    if mixes == "normalised":
        z, p = (mix / mix.square().sum(1, keepdim=True).sqrt() for mix in (z, p))
    scale = features["scale"][0]
    total, count = features["masked_sum"].sum(), features["masked_count"].sum().item()
    return {
        "itc_loss": clip(i, t, scale),
        "xmc_loss": clip(z, z, scale),
        "cic_loss": clip(p, z, scale),
        "cmc_loss": clip(j, z, scale),
        "masked_loss": total / max(count, 1),
    }


@pytest.mark.parametrize(
    ("mixes", "values"),
    [
        (
            "raw",
            [0.5327116617289092, 0.48815030021649286, 0.4830192032020669, 0.48681323607591565],
        ),
        (
            "normalised",
            [0.5327116617289092, 0.47407698418010646, 0.4740769841801068, 0.47989366247587845],
        ),
    ],
)
def test_worked_values(mixes, values):
    features = {
        "image": degrees(0, 90), "text": degrees(20, 50), "image_in_text": degrees(5, 80),
        "text_in_image": degrees(15, 60), "both": degrees(12, 70),
        "scale": torch.ones(2, dtype=torch.float64),
    }  # fmt: skip
    out = loss_terms(run(build(mixes=mixes, masked=0.0), features))
    assert list(out) == [f"{name}_loss" for name in ALL]
    for value, wanted in zip(out.values(), values, strict=True):
        assert abs(value.item() - wanted) < 1e-6
    if mixes == "normalised":  # the mixes are 60 degrees apart
        assert values[1] == pytest.approx(math.log(1 + math.exp(-0.5)))
        return
    for objectives, total in (
        (["itc", "xmc"], 1.020861961945402),
        (["itc", "xmc", "cic"], 1.5038811651474688),
        (["itc", "cmc"], 1.0195248978048248),
    ):
        out = run(build(objectives, masked=0.0), features)
        assert abs(sum(loss_terms(out).values()).item() - total) < 1e-6
        torch.testing.assert_close(out["sample_loss"].mean().item(), total)


@pytest.mark.parametrize("mixes", oner.MIXES)
def test_values_and_gradients_equal_dense_float64(mixes):
    for seed in range(30):
        features = case(seed)
        ours, theirs = leaves(features), leaves(features)
        out = run(build(mixes=mixes), ours)
        wanted = expected(theirs, mixes)
        assert loss_terms(out).keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(out[name], value, rtol=1e-11, atol=1e-12, msg=name)
        found = []
        for terms, given in ((loss_terms(out), ours), (wanted, theirs)):
            total, inputs = sum(terms.values()), list(given.values())
            found.append(torch.autograd.grad(total, inputs, allow_unused=True))
        for name, gradient, reference in zip(features, *found, strict=True):
            if name == "masked_count":
                assert gradient is None
            else:
                torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-11, msg=name)


def test_equal_features_make_the_mixed_loss_clips():
    same = torch.eye(2, dtype=torch.float64)
    features = {"image": same, "text": same, "scale": torch.ones(2, dtype=torch.float64)}
    out = run(build(["itc", "xmc"], masked=0.0), features)
    for value in loss_terms(out).values():
        assert abs(value.item() - 0.3132616875182228) < 1e-12


def test_products_of_raw_mixes_and_swapped_modalities():
    features = case(3)
    i, t = features["image"], features["text"]
    z, other = oner.sides(features, ["xmc"], "raw")["xmc"]
    assert z is other
    torch.testing.assert_close(z @ z.T, (i @ i.T + i @ t.T + t @ i.T + t @ t.T) / 4)
    swapped = {**features, "image": t, "text": i}
    plain, turned = (run(build(["xmc"], masked=0.0), each) for each in (features, swapped))
    assert torch.equal(plain["xmc_loss"], turned["xmc_loss"])


def test_normalised_mixes_only_repel():
    """The positive of XMC is then 1, so that its loss is that of the other mixes alone."""
    features = case(5)
    z, _ = oner.sides(features, ["xmc"], "normalised")["xmc"]
    torch.testing.assert_close((z * z).sum(1), torch.ones(len(z), dtype=torch.float64))
    raw, _ = oner.sides(features, ["xmc"], "raw")["xmc"]
    cosines = (features["image"] * features["text"]).sum(1)
    torch.testing.assert_close((raw * raw).sum(1), (1 + cosines) / 2)


def test_image_text_contrast_alone_is_clip():
    features = {name: case(4)[name] for name in ("image", "text", "scale")}
    found = []
    for method in (build(["itc"], masked=0.0), losses.build("clip")):
        given = leaves(features)
        total = sum(loss_terms(run(method, given)).values())
        found.append((total, *torch.autograd.grad(total, list(given.values()))))
    for name, ours, theirs in zip(("loss", *features), *found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13, msg=name)


def test_no_masked_token_anywhere_is_a_zero():
    features = case(8)
    features["masked_sum"], features["masked_count"] = torch.zeros(2, len(features["scale"]))
    given = leaves(features)
    out = run(build(), given)
    assert out["masked_loss"] == 0
    out["masked_loss"].backward()
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in given.values())


def tower(name="oner"):
    """The small model of the method, in training, and a batch whose texts differ in length."""
    torch.manual_seed(5)
    model = models.build(tiny.model_settings(name)).train()
    batch = tiny.make_batch(0, 6)
    for row, end in enumerate((11, 3, 7, 2, 11, 5)):
        batch["text"][row, :, end] = 49407
        batch["text"][row, :, end + 1 :] = 0
    return model, batch


@pytest.mark.parametrize(
    ("objectives", "masked", "passes", "names"),
    [
        (["itc"], 0.0, 2, {"image", "text", "scale"}),
        (["itc", "xmc"], 1.0, 2, {"image", "text", "scale", "masked_sum", "masked_count"}),
        (["cic"], 0.0, 3, {*NAMES, "scale"} - {"both"}),
        (["cmc"], 0.0, 3, {"image", "text", "both", "scale"}),
        (ALL, 1.0, 3, {*NAMES, "scale", "masked_sum", "masked_count"}),
    ],
)
def test_passes_of_the_tower_and_what_they_give(objectives, masked, passes, names):
    model, batch = tower()
    seen = []
    model.transformer.register_forward_pre_hook(lambda *_: seen.append(1))
    options = {"objectives": objectives, "masked": masked}
    method = losses.build("oner", options, tiny.dims(model))
    features = method.encode(model, batch)
    assert len(seen) == passes
    assert features.keys() == names
    assert all(len(value) == 6 for value in features.values())
    assert bool(list(method.parameters())) == (masked > 0)
    loss = sum(loss_terms(method(features, batch["label"], Gather())).values())
    loss.backward()
    unused = {name for name, p in (*model.named_parameters(), *method.named_parameters())
              if p.grad is None}  # fmt: skip
    assert unused == set()


def test_without_masks_the_features_are_those_of_clip():
    model, batch = tower()
    ours = losses.build("oner", {"objectives": ["itc"], "masked": 0.0}).encode(model, batch)
    theirs = losses.build("clip").encode(model, batch)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_masked_tokens_are_guessed_from_the_text_and_from_text_and_image():
    model, batch = tower()
    method = losses.build("oner", {}, tiny.dims(model))
    torch.nn.init.normal_(method.head.weight)
    features = method.encode(model, batch)
    ids = batch["text"][:, 0]
    shown, chosen = mask_tokens(ids, model.text_mask(ids), batch["seed"])
    assert 0 < chosen.sum() < chosen.numel() / 4
    pair = model.encode_pair(batch["image"][:, 0], shown)
    torch.testing.assert_close(features["both"], pair["both"])
    torch.testing.assert_close(features["text"], model.encode_text(shown)["feature"])
    wanted = torch.zeros(6)
    for states in (model.encode_text(shown)["tokens"], pair["text_tokens"]):
        for row, place in chosen.nonzero().tolist():
            logits = method.head.weight @ states[row, place] + method.head.bias
            wanted[row] += logits.logsumexp(0) - logits[ids[row, place]]
    torch.testing.assert_close(features["masked_sum"], wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(features["masked_count"], 2.0 * chosen.sum(1))


def test_nothing_in_its_passes_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(_masking, "computed", lambda chosen, tokens: _masking.room(tokens))
    model, batch = tower()
    method = losses.build("oner", {"objectives": ALL}, tiny.dims(model))
    with NoOperatorWaits(), NoTensorIsRead():
        features = method.encode(model, batch)
        sum(value.sum() for value in features.values() if value.requires_grad).backward()


@pytest.mark.parametrize(
    "options",
    [
        {"objectives": []}, {"objectives": ["itc", "mlm"]}, {"objectives": ["itc", "itc"]},
        {"objectives": "itc"}, {"mixes": "unit"}, {"masked": -1.0},
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=f"loss.{next(iter(options))}="):
        losses.build("oner", options, {"text_width": 3, "vocab_size": 4})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "model.kind=one_tower"),
        ({"kind": "one_tower"}, "model.text.vocab_size=49409, not 49408"),
    ],
)
def test_a_model_that_it_cannot_train_is_refused(settings, words):
    method = losses.find("oner")
    with pytest.raises(ValueError, match=words):
        method.check_model(ModelConfig.from_dict(settings))
    method.check_model(ModelConfig.from_dict(tiny.model_settings("oner")))
