"""UniCLIP: worked values, the dense formula, the losses that it has inside, and what it refuses.

The dense formula knows no blocks: one matrix of all items, and loops over anchors and positives.
"""

import math
import random

import pytest
import torch
from torch import tensor
from torch.nn import functional as F

import losses
from engine import config
from loaders.errors import ConfigError
from losses._gather import Gather
from losses.uniclip import mp_nce, nce
from models.config import ModelConfig
from tests.engine import family, tiny
from tests.losses import dense

VIEWS = [
    tensor([[1, 0], [0.6, 0.8]], dtype=torch.float64),
    tensor([[0.8, -0.6], [0, 1]], dtype=torch.float64),
]
TEXT = tensor([[0.8, 0.6], [0.28, 0.96]], dtype=torch.float64)
DIMS = {"embed_dim": 6, "image_width": 6, "text_width": 6, "num_classes": 5}
PLAIN = [0.0, 0.0, 0.0]
# 1 / t and b of II, IT, TT; the loss of each item in the order I0, I~0, T0, I1, I~1, T1.
SETTINGS = {
    "A": ([1.0, 1.0, 1.0], PLAIN, [1.051723408720, 0.846560820274, 1.590801388646,
                                   1.188657258802, 0.875498019919, 0.973706723055]),
    "B": ([10.0, 10.0, 10.0], PLAIN, [0.132069220672, 0.030608078528, 4.482870389677,
                                      1.320990056389, 0.077123677845, 0.207207390935]),
    "C": ([10.0, 5.0, 2.0], [-1.0, 0.5, 0.0],
          [0.567904763778, 0.046853703444, 2.447965501680,
           0.681603207657, 0.092316447379, 0.061377048111]),
}  # fmt: skip


def double(values):
    return tensor(values, dtype=torch.float64)


def similarities(images, text, scales, offsets):
    """s of all items (M N, M N), view after view and then the texts, and the domain of each."""
    items = torch.cat([*images, text])
    domain = tensor([0] * (len(items) - len(text)) + [1] * len(text))
    kind = domain[:, None] + domain  # 0 two images, 1 image and text, 2 two texts
    return items @ items.T * scales[kind] + offsets[kind], domain


def terms(positives, negatives, form="mp"):
    """Loss of one anchor from its similarities (P,) and (n,): MP-NCE, or its two relatives."""
    everything = torch.cat([positives, negatives]).logsumexp(0)
    if form == "supcon":
        return (everything - positives).mean()
    if form == "mil":
        return everything - positives.logsumexp(0)
    each = [torch.cat([p[None], negatives]).logsumexp(0) - p for p in positives]
    return torch.stack(each).mean()


def anchors(images, text, scales, offsets, form="mp"):
    """The loss of each item (M N,)."""
    s, _ = similarities(images, text, scales, offsets)
    count, number = len(s), len(text)
    found = []
    for i in range(count):
        positives = [j for j in range(count) if j % number == i % number and j != i]
        negatives = [j for j in range(count) if j % number != i % number]
        found.append(terms(s[i, positives], s[i, negatives], form))
    return torch.stack(found)


def dense_loss(images, text, scales, offsets, weights=(1.0, 1.0)):
    """MP-NCE by one matrix, for any number of items and with weights."""
    s, domain = similarities(images, text, scales, offsets)
    pair = torch.arange(len(s)) % len(text)
    same = pair[:, None] == pair
    negatives = s.masked_fill(same, -math.inf).logsumexp(1, keepdim=True)
    loss = torch.logaddexp(s, negatives) - s
    weight = double((*weights, 0.0))[domain[:, None] + domain]
    positive = same & ~torch.eye(len(s), dtype=torch.bool)
    return (weight * loss)[positive].sum() / (len(s) * len(images))


@pytest.mark.parametrize("setting", SETTINGS)
def test_worked_values_of_each_item(setting):
    scales, offsets, expected = SETTINGS[setting]
    scales, offsets = double(scales), double(offsets)
    # In the order of the items here: first views, second views, texts.
    expected = double(expected).view(2, 3)
    found = anchors(VIEWS, TEXT, scales, offsets)
    torch.testing.assert_close(found, expected.T.flatten(), rtol=0, atol=1e-10)
    loss, each = mp_nce(VIEWS, TEXT, scales, offsets, Gather())
    torch.testing.assert_close(each, expected.mean(1), rtol=0, atol=1e-10)
    mean = {"A": 1.087824603236, "B": 1.041811469008, "C": 0.649670112008}[setting]
    assert abs(loss.item() - mean) < 1e-10
    supcon = {"A": 1.387840891387, "B": 1.893650308716, "C": 1.615783320785}[setting]
    assert abs(anchors(VIEWS, TEXT, scales, offsets, "supcon").mean().item() - supcon) < 1e-10
    mil = {"A": 0.682621937764, "B": 0.477510521733, "C": 0.277531718635}[setting]
    assert abs(anchors(VIEWS, TEXT, scales, offsets, "mil").mean().item() - mil) < 1e-10


def test_worked_gradients_and_weights():
    scales, offsets = (double(values).requires_grad_() for values in SETTINGS["C"][:2])
    loss, _ = mp_nce(VIEWS, TEXT, scales, offsets, Gather())
    of_scales, of_offsets = torch.autograd.grad(loss, (scales, offsets))
    expected = double([0.063904853, -0.070967177, 0.007062323])
    torch.testing.assert_close(of_offsets, expected, rtol=0, atol=1e-9)
    of_log_t = -scales.detach() * of_scales
    expected = double([-0.289766244, 0.053973941, -0.011299717])
    torch.testing.assert_close(of_log_t, expected, rtol=0, atol=1e-9)
    loss, each = mp_nce(VIEWS, TEXT, scales, offsets, Gather(), (2.0, 0.5))
    assert abs(loss.item() - 0.379789214138) < 1e-10
    torch.testing.assert_close(each.mean(), loss)


def test_positives_are_never_pushed_away_and_do_not_share_a_denominator():
    expected = {
        "mp": (1.391045666771, [-0.017450245280, -0.467926157285]),
        "supcon": (3.037913450021, [0.462796267282, -0.497613466657]),
        "mil": (0.035437764883, [-0.034731109562, -0.000086089813]),
    }
    negatives = double([0.0, 0.5, 1.0]).requires_grad_()
    for form, (value, gradient) in expected.items():
        positives = double([5.0, -1.0]).requires_grad_()
        ours = nce(negatives.logsumexp(0), positives).mean()
        loss = ours if form == "mp" else terms(positives, negatives, form)
        assert abs(loss.item() - value) < 1e-11
        of_positives, of_negatives = torch.autograd.grad(loss, (positives, negatives))
        torch.testing.assert_close(of_positives, double(gradient), rtol=0, atol=1e-11)
        if form == "mp":
            expected = double([0.090437138492, 0.149105633893, 0.245833630180])
            torch.testing.assert_close(of_negatives, expected, rtol=0, atol=1e-11)


def case(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    size, views = (rng.randint(1, 12), rng.choice([2, 5])), rng.choice([1, 2, 3, 4])
    # Not all of unit length: the formula does not assume it.
    features = [
        F.normalize(torch.randn(size).double(), dim=1) * rng.choice([1, 1.3])
        for _ in range(views + 1)
    ]
    scales = double([rng.choice([1.0, 14.3, 100.0]) for _ in range(3)])
    return features, scales, torch.randn(3).double(), (rng.choice([0.0, 1.0, 2.0]), 0.7)


@pytest.mark.parametrize("block", range(6))
def test_values_and_gradients_equal_dense_float64(block):
    for seed in range(10 * block, 10 * block + 10):
        features, scales, offsets, weights = case(seed)
        ours, theirs = (
            [x.clone().requires_grad_() for x in (*features, scales, offsets)] for _ in "ab"
        )
        loss, each = mp_nce(ours[:-3], ours[-3], *ours[-2:], Gather(), weights)
        torch.testing.assert_close(each.mean(), loss)
        gradients = torch.autograd.grad(3 * loss, ours)
        if len(features[0]) == 1:  # of nothing the dense formula has NaN
            assert loss == 0
            assert all((gradient == 0).all() for gradient in gradients)
            continue
        expected = dense_loss(theirs[:-3], theirs[-3], *theirs[-2:], weights)
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
        wanted = torch.autograd.grad(3 * expected, theirs)
        for actual, gradient in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_one_view_without_its_own_domains_is_clip(scale):
    scales = double([scale] * 3)
    labels = torch.full((2,), -1)
    expected = dense.unicl(VIEWS[0], TEXT, labels, scales[1])
    masked = double([-math.inf, 0.3, -math.inf]).requires_grad_()
    leaves = [x.clone().requires_grad_() for x in (VIEWS[0], TEXT, scales)]
    loss, _ = mp_nce([leaves[0]], leaves[1], leaves[2], masked, Gather())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    of_image, _, of_scales, of_offsets = torch.autograd.grad(loss, [*leaves, masked])
    values = dense.value_and_gradients(dense.unicl, VIEWS[0], TEXT, labels, scales[1])
    torch.testing.assert_close(of_image, values[1], rtol=1e-10, atol=1e-12)
    assert torch.equal(of_scales[[0, 2]], torch.zeros(2).double())
    assert of_offsets.abs().max() < 1e-12
    whole, _ = mp_nce(VIEWS[:1], TEXT, scales, double(PLAIN), Gather())
    assert whole > loss  # more negatives
    if scale == 10:
        assert abs(loss.item() - 0.652786748928) < 1e-11
        assert abs(whole.item() - 0.784011215011) < 1e-11


def test_two_views_whose_texts_are_far_are_simclr():
    """Two of the three items of a pair are images, with one positive each of two."""
    far = double([0.0, -1e4, 0.0])
    loss, _ = mp_nce(VIEWS, TEXT, double([10.0] * 3), far, Gather(), (1.0, 0.0))
    expected = dense.nt_xent(*VIEWS, 0.1)
    torch.testing.assert_close(3 * loss, expected, rtol=1e-11, atol=0)
    assert abs(expected.item() - 0.063779839762) < 1e-11


def test_it_lies_between_its_two_relatives():
    for seed in range(8):
        features, scales, offsets, _ = case(seed)
        if len(features[0]) == 1:
            continue
        mp, supcon, mil = (
            anchors(features[:-1], features[-1], scales, offsets, form)
            for form in ("mp", "supcon", "mil")
        )
        assert (mil <= mp + 1e-12).all()
        assert (mp <= supcon + 1e-12).all()
        if len(features) == 2:  # one positive
            torch.testing.assert_close(mil, supcon)


@pytest.mark.parametrize(("pairs", "expected"), [(2, math.log(4)), (300, math.log(898))])
def test_features_that_are_all_equal(pairs, expected):
    """ln(1 + M (N - 1)) with M = 3 items a pair."""
    same = torch.full((pairs, 4), 0.5).double()
    loss, _ = mp_nce([same, same], same, double([7.0] * 3), double(PLAIN), Gather())
    assert abs(loss.item() - expected) < 1e-10


def test_what_changes_nothing():
    features, scales, offsets, _ = case(3)
    offsets.requires_grad_()
    loss, each = mp_nce(features[:-1], features[-1], scales, offsets, Gather())
    (gradient,) = torch.autograd.grad(loss, offsets)
    assert abs(gradient.sum()) < 1e-12 < gradient.abs().max()
    higher, _ = mp_nce(features[:-1], features[-1], scales, offsets + 1.7, Gather())
    torch.testing.assert_close(higher, loss, rtol=1e-12, atol=0)
    order = torch.randperm(len(features[0]))
    moved = [x[order] for x in features]
    permuted, found = mp_nce(moved[:-1][::-1], moved[-1], scales, offsets, Gather())
    torch.testing.assert_close(permuted, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, each[order], rtol=1e-12, atol=0)
    other, _ = mp_nce(features[:-1], features[-1].roll(1, 0), scales, offsets, Gather())
    assert abs(other - loss) > 1e-3


def test_positives_that_win_by_far_lose_no_digits():
    """exp(100) beside exp(-60): a sum over others cannot be had by subtracting the own pair's."""
    pair = F.normalize(double([[1.0, 0.0, 0.2], [-0.8, 0.6, 0.0]]), dim=1)
    cosine = (pair[0] @ pair[1]).item()
    pair.requires_grad_()
    loss, _ = mp_nce([pair, pair], pair, double([100.0] * 3), double(PLAIN), Gather())
    logarithm = math.log(3) + 100 * (cosine - 1)  # softplus(a) is exp(a) here
    assert loss.log().item() == pytest.approx(logarithm, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, pair)
    # d loss / d cosine, and the same for the three cosines of a pair, which are all 1.
    mine, other = pair.detach(), pair.detach().flip(0)
    expected = 100 * math.exp(logarithm) * (other - mine)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=0)


def test_the_method_hands_over_its_views_scales_and_offsets():
    torch.manual_seed(2)
    method = losses.build("uniclip", {"pair_weight": 0.5}, DIMS).double()
    assert torch.equal(method.log_scales.float(), torch.full((2,), math.log(1 / 0.07)))
    names = (*method.images, "text")
    features = {name: F.normalize(torch.randn(7, 6).double(), dim=1) for name in names}
    features["scale"] = torch.full((7,), 12.0).double()
    with torch.no_grad():
        method.offsets.copy_(double([0.3, -0.2, 0.6]))
        # The second is beyond the bound of 100.
        method.log_scales.copy_(double([math.log(9), 9.0]))
    out = method(features, torch.zeros(7).long(), Gather())
    expected = dense_loss(
        [features[name] for name in method.images], features["text"],
        double([9.0, 12.0, 100.0]), method.offsets, (1.0, 0.5),
    )  # fmt: skip
    torch.testing.assert_close(out["contrastive_loss"], expected, rtol=1e-11, atol=0)
    assert out["image_scale"].item() == pytest.approx(9)
    assert out["text_scale"].item() == pytest.approx(100)
    out["contrastive_loss"].backward()
    assert (method.log_scales.grad != 0).all()  # also beyond the bound


@torch.no_grad()
def test_each_view_is_encoded_with_what_was_done_to_it():
    module = family.build("uniclip").eval()
    model, batch = module.model, tiny.make_batch(0, 4, images=3)
    torch.nn.init.normal_(model.augmentation.encoder[-1].weight)  # zero at the start
    found = module.method.encode(model, batch)
    for view, name in enumerate(("image1", "image2", "image3")):
        pixels, told = batch["image"][:, view], batch["augmentation"][:, view]
        expected = model.encode_image(pixels, told)["feature"]
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)
        assert (found[name] - model.encode_image(pixels)["feature"]).abs().max() > 1e-4
    text = model.encode_text(batch["text"][:, 0])["feature"]
    torch.testing.assert_close(found["text"], text, rtol=0, atol=1e-6)
    assert torch.equal(found["scale"], model.scale().expand(4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "model.augmentation=null",
            r"model\.augmentation is missing: .* model\.augmentation=\{wid",
        ),
        ("data.augmentation=clipart", r"data\.augmentation=clipart: .* use one that does: uniclip"),
        (
            "data.augmentation={image1: uniclip, image2: uniclip, image3: slip_strong}",
            r"data\.augmentation\.image3=slip_strong: this method tells the model",
        ),
        ("data.augmentation=unicl_release", "does not report it"),
        ("loss.image_weight=-1", r"loss\.image_weight=-1 must be at least 0"),
    ],
)
def test_what_it_needs_is_asked_for_before_anything_is_built(change, words):
    with pytest.raises(ConfigError, match=words):
        config.load("configs/quickstart_uniclip.yaml", [change])


def test_a_model_without_the_part_is_refused_by_the_method():
    with pytest.raises(ValueError, match=r"model\.augmentation is missing"):
        losses.find("uniclip").check_model(ModelConfig())
