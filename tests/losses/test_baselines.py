"""CLIP, ALIGN, SigLIP, cross-entropy, SupCon and multi-task against formulas of their own."""

import pytest
import torch
from torch.nn import functional as F

import losses
from losses import _block
from losses._gather import Gather
from losses._method import loss_terms
from losses.align import align_loss
from losses.siglip import siglip_loss
from losses.supcon import supcon_loss
from tests.losses import dense, small
from tests.losses.on_ranks import leaves_of, make_batch

DIMS = {"embed_dim": 6, "image_width": 6, "text_width": 6, "num_classes": 5, "vocab_size": 11}
FIRST = torch.tensor([[1, 0], [0.6, 0.8]], dtype=torch.float64)
SECOND = torch.tensor([[0.8, -0.6], [0, 1]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("labels", "temperature", "expected"),
    [
        ([-1, -1], 1.0, 0.673576788887),
        ([-1, -1], 0.1, 0.063779839762),
        ([4, 4], 1.0, 1.206910122220),
        ([4, 4], 0.1, 5.397113173095),
    ],
)
def test_supcon_worked_values(labels, temperature, expected):
    loss, *_ = supcon_loss(FIRST, SECOND, torch.tensor(labels), temperature, Gather())
    assert abs(loss.item() - expected) < 1e-10


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.1, 0.01])
def test_supcon_without_labels_is_nt_xent(temperature):
    """SimCLR: cross-entropy over 2B - 1 candidates, of which the other view is the truth."""
    torch.manual_seed(5)
    views = [F.normalize(torch.randn(11, 5).double(), dim=1).requires_grad_() for _ in range(2)]
    for labels in (torch.full((11,), -1), torch.randperm(11)):
        z = torch.cat(views)
        logits = (z @ z.T / temperature).masked_fill(torch.eye(22, dtype=torch.bool), -torch.inf)
        expected = F.cross_entropy(logits, (torch.arange(22) + 11) % 22)
        loss, *_ = supcon_loss(*views, labels, temperature, Gather())
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
        gradients = torch.autograd.grad(loss, views)
        expected = torch.autograd.grad(expected, views)
        torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-11)
    if temperature == 0.5:
        loss, *_ = supcon_loss(FIRST, SECOND, torch.tensor([-1, -1]), temperature, Gather())
        assert abs(loss.item() - 0.430190277137) < 1e-10


def test_supcon_equals_loops_over_anchors():
    torch.manual_seed(0)
    first, second = (F.normalize(torch.randn(9, 5).double(), dim=1) for _ in range(2))
    labels = torch.tensor([0, 1, 1, -1, 0, 2, -1, 1, 0])
    actual = [t.clone().requires_grad_() for t in (first, second)]
    loss, sample_loss, positives = supcon_loss(*actual, labels, 0.1, Gather())
    reference = [t.clone().requires_grad_() for t in (first, second)]
    expected = dense.supcon(*reference, labels.tolist(), 0.1)
    assert torch.allclose(loss, expected, atol=1e-11)
    for a, e in zip(
        torch.autograd.grad(loss, actual), torch.autograd.grad(expected, reference), strict=True
    ):
        assert torch.allclose(a, e, atol=1e-11)
    assert torch.allclose(sample_loss.mean(), expected)
    assert positives.tolist() == [5, 5, 5, 1, 5, 1, 1, 5, 5]


def test_cross_entropy_ignores_pairs():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, -1, 4, -7, 2, -1])
    out = losses.build("cross_entropy", {}, DIMS)({"logits": logits}, labels, Gather())
    kept = torch.tensor([0, 2, 4])
    expected = F.cross_entropy(logits[kept].float(), labels[kept])
    assert torch.allclose(out["classification_loss"].float(), expected, atol=1e-6)


def test_multitask_is_the_sum_of_its_parts():
    torch.manual_seed(1)
    image, text = (F.normalize(torch.randn(8, 6).double(), dim=1) for _ in range(2))
    logits, labels = torch.randn(8, 5).double(), torch.tensor([0, -1, -1, 3, -1, 2, 2, -1])
    scale = torch.full((8,), 9.0).double()
    features = {"image": image, "text": text, "logits": logits, "scale": scale}
    out = losses.build("multitask", {}, DIMS)(features, labels, Gather())
    label, pair = labels >= 0, labels < 0
    truth = torch.arange(int(pair.sum()))
    similarity = 9.0 * image[pair] @ text[pair].T
    clip = (F.cross_entropy(similarity, truth) + F.cross_entropy(similarity.T, truth)) / 2
    assert torch.allclose(out["classification_loss"], F.cross_entropy(logits[label], labels[label]))
    assert torch.allclose(out["contrastive_loss"], clip, atol=1e-11)
    assert torch.allclose(out["sample_loss"][pair].double().mean(), clip)


@pytest.mark.parametrize("labels", [[0, 1, 2, 2], [-1, -2, -2, -1]])
def test_multitask_with_one_kind_alone(labels):
    torch.manual_seed(1)
    image, text = (F.normalize(torch.randn(4, 6), dim=1).requires_grad_() for _ in range(2))
    features = {"image": image, "text": text, "logits": torch.zeros(4, 5, requires_grad=True)}
    features["scale"] = torch.full((4,), 100.0, requires_grad=True)
    out = losses.build("multitask", {}, DIMS)(features, torch.tensor(labels), Gather())
    loss = out["contrastive_loss"] + out["classification_loss"]
    gradients = torch.autograd.grad(loss, list(features.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (out["contrastive_loss"] == 0) == (labels[0] >= 0)
    assert (gradients[0].abs().sum() == 0) == (labels[0] >= 0)


# Two pairs of which image-to-text differs from text-to-image; computed independently.
TEXT = torch.tensor([[0.8, 0.6], [0.28, 0.96]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("scale", "total", "mean"),
    [
        (1.0, 1.207868749112, 0.603934374556),
        (10.0, 1.553573497857, 0.776786748928),
        (64.0, 7.572688791376, 3.786344395688),
    ],
)
def test_align_worked_values(scale, total, mean):
    features = {"image": FIRST, "text": TEXT, "scale": torch.full((2,), scale).double()}
    for options, expected in (({}, total), ({"directions": "mean"}, mean)):
        out = losses.build("align", options)(features, torch.tensor([0, 0]), Gather())
        assert abs(out["contrastive_loss"].item() - expected) < 1e-11
        assert abs(out["sample_loss"].mean().item() - expected) < 1e-11


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_align_equals_smoothed_cross_entropy(smoothing):
    for seed in range(20):
        torch.manual_seed(seed)
        size = 1 + seed
        leaves = [F.normalize(torch.randn(size, 4).double(), dim=1) for _ in range(2)]
        leaves.append(torch.tensor([1.0, 14.3, 100.0, 400.0][seed % 4]).double())
        x, y, scale = (leaf.requires_grad_() for leaf in leaves)
        truth, logits = torch.arange(size), scale * x @ y.T
        sides = [F.cross_entropy(s, truth, label_smoothing=smoothing) for s in (logits, logits.T)]
        loss, sample_loss = align_loss(x, y, scale, smoothing, Gather())
        pairs = [(loss, sum(sides) / 2)]
        pairs += zip(*(torch.autograd.grad(value, leaves) for value in pairs[0]), strict=True)
        for actual, expected in pairs:
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(sample_loss.mean(), loss.detach())
        if smoothing == 0:
            clip = dense.unicl(x, y, torch.full((size,), -1), scale)
            torch.testing.assert_close(loss, clip, rtol=1e-11, atol=1e-11)


def siglip(image, text, labels, scale, bias):
    """The loss of SigLIP's paper pair by pair; equal labels are positives."""
    total = 0.0
    for i in range(len(image)):
        for j in range(len(text)):
            positive = i == j or (labels[i] != -1 and labels[i] == labels[j])
            logit = (scale * torch.dot(image[i], text[j]) + bias) * (1 if positive else -1)
            total = total - F.logsigmoid(logit)
    return total.sum() / len(image)


@pytest.mark.parametrize("captions", [True, False])
def test_siglip_equals_the_sum_over_pairs(captions):
    for seed in range(25):
        torch.manual_seed(seed)
        size = 1 + seed % 12
        image, text = (F.normalize(torch.randn(size, 4).double(), dim=1) for _ in range(2))
        labels = torch.tensor([-1] * 4 if captions else [-1, 0, 1, -2])
        labels = labels[torch.randint(4, (size,))]
        scale = torch.tensor([[1.0], [10.0], [100.0], [400.0]][seed % 4]).double()
        bias = torch.tensor([[-10.0], [-2.71], [3.0]][seed % 3]).double()
        leaves = [leaf.requires_grad_() for leaf in (image, text, scale, bias)]
        values = (
            siglip_loss(image, text, labels, scale, bias, Gather()),
            siglip(image, text, labels, scale, bias),
        )
        gradients = (torch.autograd.grad(value, leaves) for value in values)
        for actual, expected in (values, *zip(*gradients, strict=True)):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=str(seed))


def test_siglip_starts_at_its_bias_and_learns_it():
    method = losses.build("siglip", {"bias_init": -2.5}, DIMS)
    assert losses.build("siglip", {}, DIMS).bias.item() == -10
    assert method.bias.tolist() == [-2.5]
    features = {"image": FIRST, "text": TEXT, "scale": torch.full((2,), 3.0).double()}
    method(features, torch.tensor([-1, -1]), Gather())["contrastive_loss"].backward()
    assert method.bias.grad.abs() > 0


def test_options_of_align_are_checked():
    with pytest.raises(ValueError, match=r"directions='both' is not one of sum, mean"):
        losses.build("align", {"directions": "both"})
    with pytest.raises(ValueError, match=r"smoothing=1 is not in \[0, 1\)"):
        losses.build("align", {"smoothing": 1})


def test_clip_ignores_labels():
    torch.manual_seed(2)
    image, text = (F.normalize(torch.randn(8, 6).double(), dim=1) for _ in range(2))
    features = {"image": image, "text": text, "scale": torch.full((8,), 9.0)}
    out = losses.build("clip")(features, torch.zeros(8, dtype=torch.int64), Gather())
    expected = dense.unicl(image, text, torch.full((8,), -1), torch.tensor(9.0).double())
    assert torch.allclose(out["contrastive_loss"], expected, atol=1e-11)


def test_every_method_builds_without_zero_dimensional_parameters():
    for name in losses.names():
        method = losses.build(name, {}, DIMS)
        assert all(p.ndim > 0 for p in [*method.parameters(), *method.buffers()]), name


def test_unknown_names_and_keys_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"there are: .*unicl"):
        losses.build("unicle")
    with pytest.raises(ValueError, match="did you mean 'temperature'"):
        losses.build("supcon", {"temprature": 0.1}, DIMS)


# Those without products of pairs of features; `filip` has tiles of its own (test_filip.py).
OTHERS = {"cross_entropy", "moco", "filip"}


@pytest.mark.parametrize("name", sorted(set(losses.names()) - OTHERS))
def test_the_precision_of_the_training_reaches_the_core_and_changes_nothing_on_a_cpu(
    name, monkeypatch
):
    seen, found, backend = [], [], _block.backend  # `seen`: of every walk

    def watched(x, y, scale, excluded, walk):
        seen.append(walk.precision)
        return backend(x, y, scale, excluded, walk)

    monkeypatch.setattr(_block, "backend", watched)
    for precision in (torch.float32, torch.bfloat16):
        method = small.build(name, DIMS)
        method.precision = precision
        out = method(leaves_of(slice(None)), make_batch()[-1], Gather())
        found.append(sum(loss_terms(out).values()))
    walks = len(seen) // 2
    assert walks > 0
    assert seen == [torch.float32] * walks + [torch.bfloat16] * walks
    assert found[0] == found[1]


def test_features_in_bfloat16_are_products_in_bfloat16():
    x = torch.eye(3)
    for dtypes, expected in (((torch.bfloat16,) * 2, torch.bfloat16),
                             ((torch.bfloat16, torch.float32), torch.float32)):  # fmt: skip
        block = _block.Block(x.to(dtypes[0]), x.to(dtypes[1]), Gather())
        assert block.walk.precision == expected
        assert block.x.dtype == block.y.dtype == torch.float32
