"""DeCLIP: worked values, the dense formula, its special cases, where gradients must not go."""

import itertools
import math
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import losses
from losses._core import pair_losses
from losses._gather import Gather
from losses.declip import simsiam
from models.config import ModelConfig
from tests.losses import dense, virtual
from tests.losses.small import leaves, run

DIMS = {"embed_dim": 6, "image_width": 6, "text_width": 6, "num_classes": 5, "vocab_size": 11}
SMALL = {"queue": 12, "hidden": 7, "bottleneck": 5}
FIRST = torch.tensor([[1, 0], [0.6, 0.8]], dtype=torch.float64)
SECOND = torch.tensor([[0.8, -0.6], [0, 1]], dtype=torch.float64)
CAPTION = torch.tensor([[0.8, 0.6], [0.28, 0.96]], dtype=torch.float64)
EDA = torch.tensor([[0.96, 0.28], [0, 1]], dtype=torch.float64)
BANK = torch.tensor([[0.6, 0.8], [1, 0], [-0.6, 0.8]], dtype=torch.float64)
VIEWS = ("first", "second")
TEXTS = ("caption", "eda")
TERMS = ("contrastive_loss", "simsiam_loss", "masked_loss", "neighbour_loss")


class Given(nn.Module):
    """Stands where a head stands and returns the outputs it was given, one by one."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = itertools.cycle(outputs)

    def forward(self, x, gather):
        return next(self.outputs)


def build(bank=None, **options):
    """The method in float64 with `bank` (K, D) in its queue."""
    torch.manual_seed(2)
    width = 6 if bank is None else bank.shape[1]
    method = losses.build("declip", {**SMALL, **options}, {**DIMS, "embed_dim": width}).double()
    if bank is not None:
        method.queue.keep(bank)
        method.step_end()
    return method


def case(seed, rows=None):
    """Features of a random batch: two views of any length, two texts, masked tokens, the scale."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    size = rows or rng.randint(2, 20), 6
    features = {name: torch.randn(size).double() for name in VIEWS}
    features |= {name: F.normalize(torch.randn(size).double(), dim=1) for name in TEXTS}
    features["masked_count"] = torch.randint(0, 3, size[:1]).double()
    features["masked_sum"] = torch.rand(size[0]).double() * features["masked_count"]
    features["scale"] = torch.full(size[:1], rng.choice([1.0, 14.3, 100.0])).double()
    return features


def total(out):
    return sum(out[name] for name in TERMS)


def clip(image, text, scale):
    """(both directions, images to texts) of CLIP's loss on cosines."""
    logits, own = scale * image @ text.T, torch.arange(len(image))
    to_texts = F.cross_entropy(logits, own)
    return 0.5 * (to_texts + F.cross_entropy(logits.T, own)), to_texts


def plain_head(head):
    """A head of ours as layers of torch that share its parameters."""
    layers = []
    for linear, norm in zip(head.layers, head.norms, strict=True):
        layers.append(linear)
        if hasattr(norm, "running_mean"):
            layers.append(nn.BatchNorm1d(len(norm.weight)).double().train())
            layers[-1].weight, layers[-1].bias = norm.weight, norm.bias
        layers.append(nn.ReLU())
    return nn.Sequential(*layers[:-1])


def expected(method, features, bank, weights):
    """The four terms by the dense formulas: weights of the pairs, of self-supervision, and of the
    neighbours in `bank`."""
    scale = features["scale"][0]
    images = [F.normalize(features[name], dim=1) for name in VIEWS]
    texts = [features[name] for name in TEXTS]
    pairs = [(image, text) for image in images for text in texts]
    contrastive = sum(w * clip(*pair, scale)[0] for w, pair in zip(weights[:4], pairs, strict=True))
    nearest = [bank[(text.detach() @ bank.T).argmax(1)] for text in texts]
    neighbours = [clip(image, near, scale)[1] for image in images for near in nearest]
    projector, predictor = plain_head(method.projector), plain_head(method.predictor)
    (z1, z2) = (projector(features[name]) for name in VIEWS)
    cosines = [
        (F.normalize(predictor(z), dim=1) * F.normalize(other.detach(), dim=1)).sum(1).mean()
        for z, other in ((z1, z2), (z2, z1))
    ]
    masked = features["masked_sum"].sum() / features["masked_count"].detach().sum().clamp(min=1)
    return {
        "contrastive_loss": contrastive,
        "simsiam_loss": -weights[4] * sum(cosines) / 2,
        "masked_loss": weights[4] * masked,
        "neighbour_loss": weights[5] * sum(neighbours) / 4,
    }


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, 0.499371382171),
        ({"contrastive": 0.6}, 0.584346565966),
        ({"weighting": "paper"}, 0.660316842617),
        ({"weighting": "paper", "multi_view": 0.6}, 0.799879099546),  # the three summed
    ],
)
def test_worked_values(options, value):
    method = build(BANK, **{**options, "queue": 3})
    prediction = [[1, 0], [0.6, 0.8]], [[0.8, 0.6], [0, 1]]
    projection = [[0, 2], [3, 4]], [[3, 4], [5, 0]]
    method.predictor = Given(*torch.tensor(prediction, dtype=torch.float64))
    method.projector = Given(*torch.tensor(projection, dtype=torch.float64))
    features = {
        "first": 3 * FIRST, "second": SECOND, "caption": CAPTION, "eda": EDA,
        "masked_sum": torch.tensor([2 * math.log(7), 0], dtype=torch.float64),
        "masked_count": torch.tensor([2, 0], dtype=torch.float64),
        "scale": torch.full((2,), 10.0).double(),
    }  # fmt: skip
    out = run(method, features)
    assert abs(out["simsiam_loss"].item() - 0.2 * -0.65) < 1e-12
    assert abs(out["masked_loss"].item() - 0.2 * 1.945910149055) < 1e-12
    assert abs(out["neighbour_loss"].item() - 0.2 * 0.351194923853) < 1e-12
    assert abs(total(out).item() - value) < 1e-11
    torch.testing.assert_close(out["sample_loss"].mean(), total(out))


@pytest.mark.parametrize(
    ("image", "text", "value"),
    [
        (FIRST, CAPTION, 0.652786748928), (SECOND, CAPTION, 0.817177689113),
        (FIRST, EDA, 0.219362763566), (SECOND, EDA, 0.010176474286),
    ],
)  # fmt: skip
def test_worked_values_of_the_pairs(image, text, value):
    each = pair_losses(image, text, torch.full((1,), 10.0).double(), Gather())
    assert abs(each.mean().item() - value) < 1e-11


@pytest.mark.parametrize("block", range(6))
def test_values_and_gradients_equal_dense_float64(block):
    for seed in range(10 * block, 10 * block + 10):
        features, rng = case(seed), random.Random(seed)
        bank = F.normalize(torch.randn(rng.choice([1, 5, 12]), 6).double(), dim=1)
        w = [rng.choice([0.0, 0.2, 1.3]) for _ in range(4)]
        options = {"contrastive": w[0], "self_supervision": w[1], "neighbours": w[2]}
        shares = [w[0] / 4] * 4
        if seed % 2:
            options |= {"weighting": "paper", "multi_view": w[3]}
            shares = [w[0], *[w[3] / 3] * 3]
        method = build(bank, **options)
        parameters = [p for p in method.parameters() if p is not method.head.weight]
        parameters = [p for p in parameters if p is not method.head.bias]
        ours, theirs = leaves(features), leaves(features)
        out = run(method, ours)
        reference = expected(method, theirs, bank, [*shares, w[1], w[2]])
        for name in TERMS:
            torch.testing.assert_close(out[name], reference[name], rtol=1e-10, atol=1e-11, msg=name)
        torch.testing.assert_close(out["sample_loss"].mean(), total(out))
        gradients = [
            torch.autograd.grad(loss, [*given.values(), *parameters], allow_unused=True)
            for loss, given in ((total(out), ours), (sum(reference.values()), theirs))
        ]
        for number, (actual, wanted) in enumerate(zip(*gradients, strict=True)):
            assert (actual is None) == (wanted is None)
            if wanted is not None:
                message = f"{seed} {number}"
                torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-10, msg=message)


@pytest.mark.parametrize("options", [{"contrastive": 1.0}, {"weighting": "paper"}])
def test_special_cases_that_are_clip(options):
    """The first pair alone; or all pairs, of equal views and equal texts."""
    features = case(3)
    features["image"] = features["first"] = F.normalize(features["first"], dim=1)
    features["text"] = features["caption"]
    if options == {"contrastive": 1.0}:
        features["second"], features["eda"] = features["first"], features["caption"]
    else:
        options = {**options, "contrastive": 1.0, "multi_view": 0.0}
    method = build(**options, self_supervision=0.0, neighbours=0.0)
    value = total(run(method, features))
    torch.testing.assert_close(
        value, run(losses.build("clip"), features)["contrastive_loss"], rtol=1e-12, atol=0
    )


def test_special_queues():
    """Of the texts themselves; of one vector; and none yet."""
    features = case(5, rows=6)
    scale, images = features["scale"][0], [F.normalize(features[v], dim=1) for v in VIEWS]
    of_texts = build(torch.cat([features[t] for t in TEXTS]), neighbours=1.0)
    pairs = [clip(image, features[t], scale)[1] for image in images for t in TEXTS]
    torch.testing.assert_close(run(of_texts, features)["neighbour_loss"], sum(pairs) / 4)
    of_one = build(features["caption"][:1], neighbours=1.0)
    assert abs(run(of_one, features)["neighbour_loss"].item() - math.log(6)) < 1e-12
    given = leaves(features)
    value = run(build(), given)["neighbour_loss"]
    assert value.item() == 0
    gradients = torch.autograd.grad(value, [given[v] for v in VIEWS])
    assert all(gradient.abs().max() == 0 for gradient in gradients)


def test_no_masked_token_gives_no_loss_and_no_gradient():
    features = case(7)
    features["masked_sum"] = features["masked_count"] = torch.zeros(len(features["scale"])).double()
    given = leaves(features)
    value = run(build(), given)["masked_loss"]
    assert value.item() == 0
    (gradient,) = torch.autograd.grad((value * given["masked_sum"]).sum(), given["masked_sum"])
    assert gradient.abs().max() == 0


def test_neighbours_do_not_train_texts_and_simsiam_does_not_train_its_targets():
    features = case(9)
    given = leaves(features)
    out = run(build(F.normalize(torch.randn(8, 6).double(), dim=1)), given)
    found = torch.autograd.grad(out["neighbour_loss"], list(given.values()), allow_unused=True)
    pairs = zip(given, found, strict=True)
    reached = {name for name, gradient in pairs if gradient is not None and gradient.any()}
    assert reached == {"first", "second", "scale"}
    p1, p2, z1, z2 = (torch.randn(5, 3, requires_grad=True) for _ in range(4))
    value = simsiam([p1, p2], [z1, z2])
    gradients = torch.autograd.grad(value.sum(), (p1, p2, z1, z2), allow_unused=True)
    assert [gradient is not None for gradient in gradients] == [True, True, False, False]
    longer = simsiam([2 * p1, p2], [z1, 3 * z2])
    torch.testing.assert_close(longer, value)
    torch.testing.assert_close(simsiam([z2, z1], [z1, z2]), torch.full((5,), -1.0))


@pytest.mark.parametrize("weighting", ["released", "paper"])
def test_swapped_views_and_pairs_in_another_order(weighting):
    bank = F.normalize(torch.randn(8, 6).double(), dim=1)
    features, method = case(11), build(bank, weighting=weighting)
    value = total(run(method, features))
    swapped = {**features, "first": features["second"], "second": features["first"]}
    difference = (total(run(method, swapped)) - value).abs().item()
    assert (difference < 1e-12) == (weighting == "released")
    order = torch.randperm(len(features["scale"]))
    permuted = {name: value[order] for name, value in features.items()}
    torch.testing.assert_close(total(run(method, permuted)), value)


def test_a_step_meets_the_texts_of_earlier_steps_only():
    method, remembered = build(), []
    for step in range(4):
        features = case(step, rows=4)
        value = run(method, features)["neighbour_loss"]
        if remembered:
            held = torch.tensor(remembered, dtype=torch.float64)
            reference = expected(method, features, held, [0] * 5 + [0.2])["neighbour_loss"]
            torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-12)
        method.step_end()
        remembered += [*features["eda"].tolist(), *features["caption"].tolist()]
        remembered = remembered[-12:]


def queue_of_a_rank(rank, steps, shares):
    """What a rank's queue holds after some steps."""
    method = build()
    for features in steps:
        parts = {name: value.split(shares)[rank] for name, value in features.items()}
        method(parts, torch.zeros(shares[rank], dtype=torch.int64), Gather())
        method.step_end()
    return method.queue.rows


def test_the_queue_does_not_depend_on_the_number_of_ranks():
    """Its size of 12 is no multiple of the 14 texts of a step, so their order matters."""
    steps = [case(step, rows=7) for step in range(2)]
    whole = queue_of_a_rank(0, steps, [7])
    for rows in virtual.run(queue_of_a_rank, 3, steps, [2, 4, 1]):
        assert torch.equal(rows, whole)


def test_heads_are_the_released_ones():
    """Sense-GVT/DeCLIP, declip.py: batch norms behind all layers of one, within the other."""
    method = losses.build("declip", {"queue": 4}, DIMS)
    for head, widths, norms in (
        (method.projector, [6, 1024, 1024, 1024], [True, True, True]),
        (method.predictor, [1024, 512, 1024], [True, False]),
    ):
        assert [head.layers[0].in_features, *(x.out_features for x in head.layers)] == widths
        assert [hasattr(norm, "running_mean") for norm in head.norms] == norms
    assert method.head.weight.shape == (11, 6)


def test_weights():
    assert losses.find("declip").Config().shares() == [0.1] * 4
    paper = losses.find("declip").Config(weighting="paper").shares()
    assert paper == [0.4, *[0.2 / 3] * 3]
    with pytest.raises(ValueError, match="one of released, paper"):
        build(weighting="both")
    with pytest.raises(ValueError, match=r"multi_view=0\.3.*weighting=paper"):
        build(multi_view=0.3)


@pytest.mark.parametrize(
    "text",
    [
        {"vocab_size": 49408},
        {"vocab_size": 50000, "tokenizer": "bert-base-uncased"},
        {"vocab_size": 50000, "name": "hf", "hf_config": {"model_type": "bert"}},
    ],
)
def test_a_model_without_an_id_for_the_mask_is_refused(text):
    method = losses.find("declip")
    with pytest.raises(ValueError, match=r"model\.text\.vocab_size=49409 with model\.text\.name="):
        method.check_model(ModelConfig.from_dict({"text": text}))
    method.check_model(ModelConfig.from_dict({"text": {"vocab_size": 49409}}))


def test_dense_reference_agrees_with_that_of_the_other_methods():
    value, _ = clip(FIRST, CAPTION, 10.0)
    torch.testing.assert_close(value, dense.unicl(FIRST, CAPTION, torch.tensor([-1, -1]), 10.0))
