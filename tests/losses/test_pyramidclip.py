"""PyramidCLIP: values of its equations, dense float64, what makes it CLIP, and what it refuses."""

import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import losses
import models
from engine import config_rules
from loaders.errors import ConfigError
from losses._gather import Gather
from losses._method import loss_terms
from losses.pyramidclip import softened
from models.config import ModelConfig
from tests.engine import tiny
from tests.losses import small
from tests.losses.small import leaves

IMAGES, TEXTS = ("global", "local", "regions"), ("summary", "caption", "tags")
# Unit vectors with rational entries, and the cosines of all pairs of them.
IMAGE = [[1, 0], [0.6, 0.8], [0, 1]]
TEXT = [[0.8, 0.6], [0, 1], [-0.6, 0.8]]
SETTINGS = [(0.2, "normalised"), (0.2, "literal"), (0.0, "normalised"), (0.5, "literal")]


def dense_pair(x, y, scale, softening, targets):
    """The softened loss of one pair from all logits and the whole target matrix."""
    count, logits = len(x), scale * x @ y.T
    target = torch.full((count, count), softening / (count - 1), dtype=torch.float64)
    own = torch.eye(count, dtype=torch.float64)
    if targets == "literal":
        target = target + (1 - softening) * own
    else:
        target = target * (1 - own) + (1 - softening) * own
    sides = [-(target * F.log_softmax(one, 1)).sum() for one in (logits, logits.T)]
    return sum(sides) / (2 * count)


def dense_loss(features, cfg):
    """The six pairs, or four, written out."""
    g, l, r, s, t, a = (features.get(name) for name in (*IMAGES, *TEXTS))

    def pair(x, y):
        return dense_pair(x, y, features["scale"][0], cfg.softening, cfg.targets)

    peer = (pair(g, s) + pair(l, t)) / 2
    if cfg.objects:
        far, near = (pair(g, a) + pair(r, s)) / 2, (pair(l, a) + pair(r, t)) / 2
    else:
        far, near = pair(g, a), pair(l, a)
    rest = 1 - cfg.global_weight - cfg.local_weight
    return rest * peer + cfg.global_weight * far + cfg.local_weight * near


def case(seed):
    """Features of a random batch as leaves, and options of the method."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    size = rng.randint(2, 30), rng.choice([2, 6, 16])
    names = IMAGES + TEXTS
    features = {name: F.normalize(torch.randn(size).double(), dim=1) for name in names}
    features["scale"] = torch.full((size[0],), rng.choice([1.0, 14.3, 100.0])).double()
    softening, targets = rng.choice(SETTINGS)
    far, near = rng.choice([(1 / 3, 1 / 3), (0.0, 0.0), (0.2, 0.7)])
    options = {"softening": softening, "targets": targets, "objects": seed % 3 > 0}
    options |= {"global_weight": far, "local_weight": near, "keep_mib": rng.choice([0, 64])}
    return leaves(features), options


def build(**options):
    return losses.build("pyramidclip", options)


def run(features, **options):
    labels = torch.zeros(len(features["global"]), dtype=torch.int64)  # all equal: not used
    return build(**options)(features, labels, Gather())


def total(features, **options):
    return sum(loss_terms(run(features, **options)).values())


@pytest.mark.parametrize(
    ("temperature", "hard", "literal", "normalised"),
    [
        (1.0, 0.891169119237, 1.065619364495, 0.976502452571),
        (0.5, 0.806810129068, 1.058157808641, 0.977476795735),
        (0.07, 1.766695993991, 3.162413212438, 2.985743613038),
    ],
)
def test_worked_values(temperature, hard, literal, normalised):
    """Of a pair, and of six equal pairs, whose mean is that of one."""
    image, text = (torch.tensor(side, dtype=torch.float64) for side in (IMAGE, TEXT))
    features = dict.fromkeys(IMAGES, image) | dict.fromkeys(TEXTS, text)
    features["scale"] = torch.full((3,), 1 / temperature, dtype=torch.float64)
    for softening, targets, value in (
        (0.0, "normalised", hard), (0.0, "literal", hard),
        (0.2, "literal", literal), (0.2, "normalised", normalised),
    ):  # fmt: skip
        loss, each = softened(image, text, features["scale"][:1], softening, Gather(), targets)
        assert abs(loss.item() - value) < 1e-11
        assert abs(each.mean().item() - value) < 1e-11
        for far, near in ((1 / 3, 1 / 3), (0.0, 0.0), (0.9, 0.05)):
            options = {"softening": softening, "targets": targets}
            options |= {"global_weight": far, "local_weight": near}
            assert abs(total(features, **options).item() - value) < 1e-11


@pytest.mark.parametrize("block", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in (1, 2))])
def test_values_and_gradients_equal_dense_float64(block):
    for seed in range(20 * block, 20 * block + 20):
        features, options = case(seed)
        other, method = leaves(features), build(**options)
        out = run(features, **options)
        expected = dense_loss(other, method.cfg)
        loss = sum(loss_terms(out).values())
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(out["sample_loss"].mean(), loss.detach(), rtol=1e-10, atol=0)
        found = torch.autograd.grad(loss, list(features.values()), allow_unused=True)
        wanted = torch.autograd.grad(expected, list(other.values()), allow_unused=True)
        for name, actual, exact in zip(features, found, wanted, strict=True):
            if name == "regions" and not options["objects"]:
                assert actual is None
                assert exact is None
                continue
            torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-11, msg=f"{seed} {name}")


def test_without_softening_and_with_equal_levels_it_is_clip():
    torch.manual_seed(2)
    image, text = (F.normalize(torch.randn(9, 5).double(), dim=1) for _ in range(2))
    scale = torch.full((9,), 14.3).double()
    clip = {"image": image, "text": text, "scale": scale}
    own = torch.arange(9)
    expected = losses.build("clip")(clip, own, Gather())
    features = dict.fromkeys(IMAGES, image) | dict.fromkeys(TEXTS, text) | {"scale": scale}
    for objects in (True, False):
        out = run(features, softening=0.0, objects=objects)
        loss = sum(loss_terms(out).values())
        torch.testing.assert_close(loss, expected["contrastive_loss"], rtol=1e-12, atol=0)
        torch.testing.assert_close(out["sample_loss"], expected["sample_loss"])


def test_peer_level_alone_needs_no_other():
    """Without weights for crossed levels, only the pairs of equal level count."""
    features, _ = case(5)
    loss = total(features, global_weight=0.0, local_weight=0.0)
    pairs = [("global", "summary"), ("local", "caption")]
    expected = sum(
        dense_pair(features[x], features[y], features["scale"][0], 0.2, "normalised")
        for x, y in pairs
    )
    torch.testing.assert_close(loss, expected / 2, rtol=1e-11, atol=0)
    gradients = torch.autograd.grad(loss, [features["regions"], features["tags"]])
    assert not any(gradient.abs().max() for gradient in gradients)


def test_equal_logits_and_the_lower_bound():
    """log N where nothing is known, N = 3; and never below the entropy of the targets."""
    same = torch.ones(3, 2).double() / 2**0.5
    scale = torch.tensor([5.0]).double()
    for targets, value in (("normalised", 1.098612288668), ("literal", 1.208473517535)):
        assert abs(softened(same, same, scale, 0.2, Gather(), targets)[0].item() - value) < 1e-11
    for count, bound in ((3, 0.639031859650), (1024, 1.886501376729)):
        exact = torch.eye(count).double()
        # The logits of the targets themselves: log(q_ii / q_ij).
        best = torch.tensor([np.log(0.8 * (count - 1) / 0.2)])
        assert abs(softened(exact, exact, best, 0.2, Gather())[0].item() - bound) < 1e-11
        for factor in (0.5, 2.0):
            assert softened(exact, exact, factor * best, 0.2, Gather())[0].item() > bound + 1e-3


def test_one_multiplier_has_the_gradients_of_all_pairs():
    module = tiny.build("pyramidclip")
    assert not list(module.method.parameters())
    assert [name for name, _ in module.named_parameters() if "scale" in name] == [
        "model.logit_scale"
    ]
    features, _ = case(7)
    loss, scale = total(features), features["scale"]
    (found,) = torch.autograd.grad(loss, scale)
    each = [
        torch.autograd.grad(total(features, softening=0.2, **weights), scale)[0].sum()
        for weights in (
            {"global_weight": 0.0, "local_weight": 0.0},
            {"global_weight": 1.0, "local_weight": 0.0},
            {"global_weight": 0.0, "local_weight": 1.0},
        )
    ]
    torch.testing.assert_close(found.sum(), sum(each) / 3)


def test_a_batch_of_one_and_wrong_options_are_refused():
    one = torch.ones(1, 2)
    with pytest.raises(ValueError, match="at least 2 samples"):
        softened(one, one, torch.ones(1), 0.2, Gather())
    assert losses.find("pyramidclip").smallest_batch == 2
    for options, words in (
        ({"softening": 1.0}, r"softening=1\.0 is not in"),
        ({"targets": "none"}, "is not one of normalised, literal"),
        ({"global_weight": 0.6, "local_weight": 0.6}, "not more than 1 together"),
        ({"global_weight": -0.1}, "negative"),
    ):
        with pytest.raises(ValueError, match=words):
            build(**options)


def test_what_a_batch_and_a_model_must_have_follows_from_the_options():
    method = losses.find("pyramidclip")
    assert method.needs(method.Config()) == ("objects",)
    assert method.needs(method.Config(objects=False)) == ()
    plain, with_regions = ModelConfig(), ModelConfig(regions={})
    config_rules._check_objects(True, with_regions, "pyramidclip")
    config_rules._check_objects(False, plain, "pyramidclip")
    with pytest.raises(ConfigError, match=r"model\.regions=\{width: W, count: R\}.*objects=false"):
        config_rules._check_objects(True, plain, "pyramidclip")
    with pytest.raises(ConfigError, match=r"loss\.name=clip does not read objects"):
        config_rules._check_objects(False, with_regions, "clip")


@pytest.mark.parametrize("objects", [True, False])
def test_views_objects_and_texts_come_into_the_features(objects):
    """Each feature is that of its own crop, text or array; without objects none is encoded."""
    model = tiny.build("pyramidclip").model.eval()
    method, batch = build(objects=objects), tiny.make_batch(0, 5, 2, 3)
    with torch.no_grad():
        found = method.encode(model, batch)
        for view, name in enumerate(("global", "local")):
            expected = model.encode_image(batch["image"][:, view])["feature"]
            assert torch.equal(found[name], expected)
        for view, name in enumerate(TEXTS):
            expected = model.encode_text(batch["text"][:, view])["feature"]
            torch.testing.assert_close(found[name], expected)
        assert ("regions" in found) == objects
        if objects:
            expected = model.encode_regions(batch["objects"], batch["objects_mask"])["feature"]
            assert torch.equal(found["regions"], expected)
    assert torch.equal(found["scale"], model.scale().expand(5))


def test_a_model_without_regions_trains_without_objects():
    model = models.build(tiny.MODEL).train()
    method = small.build("pyramidclip", tiny.DIMS, objects=False)
    batch = tiny.make_batch(1, 6, 2, 3)
    out = method(method.encode(model, batch), batch["label"], Gather())
    sum(loss_terms(out).values()).backward()
    assert model.image_projection.weight.grad.abs().max() > 0
