"""The UniCL loss against the dense float64 formula, its special cases and known traps."""

import math
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from losses._core import contrast, global_labels
from losses._gather import Gather
from losses.unicl import unicl_loss
from tests.losses import dense

SINGLE = Gather()


def make_case(seed):
    """Features, labels and scale of one random case; the seed decides the kind of labels."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, width = rng.randint(2, 40), rng.choice([2, 5, 16])
    kind = ["mixed", "one_class", "distinct", "captions", "labels", "groups"][seed % 6]
    labels = {
        "mixed": lambda: [rng.choice([-1, 0, 1, 2, 7]) for _ in range(batch)],
        "one_class": lambda: [0] * batch,
        "distinct": lambda: rng.sample(range(100), batch),
        "captions": lambda: [-1] * batch,
        "labels": lambda: [rng.randint(0, 3) for _ in range(batch)],
        "groups": lambda: [rng.choice([-1, -2, -(2**61), 0, 5]) for _ in range(batch)],
    }[kind]()
    scale = torch.tensor([rng.choice([1.0, 2.718, 14.3, 50.0, 100.0, 400.0])]).double()
    image, text = (F.normalize(torch.randn(batch, width).double(), dim=1) for _ in range(2))
    tile = (rng.randint(1, batch + 3), rng.randint(1, batch + 3))
    keep = rng.choice([0, 64, 10**9])
    return image, text, torch.tensor(labels), scale, tile, keep


def run_core(image, text, labels, scale, **options):
    image, text, scale = (t.clone().requires_grad_() for t in (image, text, scale))
    result = contrast(image, text, labels, scale, SINGLE, **options)
    gradients = torch.autograd.grad(result.loss, (image, text, scale))
    return (result.loss.detach(), *gradients), result


@pytest.mark.parametrize("block", range(12))
def test_values_and_gradients_equal_dense_float64(block):
    for seed in range(block * 20, block * 20 + 20):  # 240 cases in all
        image, text, labels, scale, tile, keep = make_case(seed)
        expected = dense.value_and_gradients(dense.unicl, image, text, labels, scale)
        actual, result = run_core(image, text, labels, scale, tile=tile, keep_bytes=keep)
        for name, a, e in zip(("loss", "image", "text", "scale"), actual, expected, strict=True):
            reference = max(e.abs().max().item(), 1e-3)
            error = (a.reshape(e.shape) - e).abs().max().item() / reference
            assert error < 1e-11, (seed, name, error)
        assert torch.allclose(result.sample_loss.mean(), expected[0], rtol=1e-10, atol=1e-12)
        assert result.positives.tolist() == dense.target_matrix(labels.tolist()).sum(1).tolist()


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0, 400.0])
def test_float32_is_close_to_float64(scale):
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(300, 64), dim=1) for _ in range(2))
    labels = torch.randint(-1, 9, (300,))
    scale = torch.tensor([scale])
    expected = dense.value_and_gradients(dense.unicl, image, text, labels, scale)
    actual, _ = run_core(image, text, labels, scale, tile=(128, 77), keep_bytes=50_000)
    for a, e in zip(actual, expected, strict=True):
        error = (a.double().reshape(e.shape) - e).abs().max() / e.abs().max()
        assert error < 2e-5, error


def test_half_precision_features_use_float32_softmax():
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(64, 32), dim=1).bfloat16() for _ in range(2))
    labels, scale = torch.arange(64), torch.tensor([100.0])
    loss = unicl_loss(image, text, labels, scale)
    expected = dense.unicl(image.double(), text.double(), labels, scale.double())
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) < 1e-4


def test_gradcheck():
    torch.manual_seed(1)
    image, text = (F.normalize(torch.randn(7, 4).double(), dim=1) for _ in range(2))
    labels = torch.tensor([0, 0, 3, -1, -1, 3, 0])
    image, text = image.requires_grad_(), text.requires_grad_()
    scale = torch.tensor([9.0]).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda i, t, s: unicl_loss(i, t, labels, s), (image, text, scale)
    )


def test_unique_labels_equal_clip():
    torch.manual_seed(2)
    image, text = (F.normalize(torch.randn(33, 8).double(), dim=1) for _ in range(2))
    logits = 20.0 * image @ text.T
    truth = torch.arange(33)
    clip = 0.5 * (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth))
    for labels in (torch.randperm(33), torch.full((33,), -1)):
        loss = unicl_loss(image, text, labels, torch.tensor(20.0).double())
        assert torch.allclose(loss, clip, atol=1e-12)


def test_class_embedding_texts_equal_cross_entropy():
    """unicl.md section 2: with texts W[y], m per class, i2t mean = CE + log m."""
    torch.manual_seed(3)
    classes, per_class = 6, 4
    embedding = torch.randn(classes, 10).double()
    labels = torch.arange(classes).repeat(per_class)[torch.randperm(classes * per_class)]
    image = torch.randn(len(labels), 10).double()
    classification = F.cross_entropy(image @ embedding.T, labels)
    text = embedding[labels]
    # The row direction alone: twice the loss minus the column direction's dense value.
    loss = unicl_loss(image, text, labels, torch.tensor(1.0).double())
    logits = image @ text.T
    columns = dense.soft_cross_entropy(logits.T, dense.target_matrix(labels.tolist()))
    assert torch.allclose(2 * loss - columns, classification + math.log(per_class), atol=1e-10)


def test_second_view_as_text_is_cross_view_supcon():
    """Image-to-text direction = SupCon whose candidates are the other view only."""
    torch.manual_seed(4)
    first, second = (F.normalize(torch.randn(12, 6).double(), dim=1) for _ in range(2))
    labels = torch.randint(0, 3, (12,))
    expected = 0.0
    for a, b in ((first, second), (second, first)):
        for i in range(12):
            scores = torch.stack([torch.dot(a[i], b[j]) / 0.1 for j in range(12)])
            same = [j for j in range(12) if labels[j] == labels[i]]
            expected += -(torch.log_softmax(scores, 0)[same]).mean() / 24
    loss = unicl_loss(first, second, labels, torch.tensor(10.0).double())
    assert torch.allclose(loss, expected, atol=1e-11)


def test_floor_and_flat_cases():
    labels = torch.tensor([0, 0, 0, 1, 1, -1])
    onehot = F.one_hot(torch.tensor([0, 0, 0, 1, 1, 2]), 3).double()
    floor = (3 * math.log(3) + 2 * math.log(2) + 0) / 6
    separated = unicl_loss(onehot, onehot, labels, torch.tensor(100.0).double())
    assert abs(separated.item() - floor) < 1e-12
    flat = unicl_loss(
        torch.ones(6, 3) / 3**0.5, torch.ones(6, 3) / 3**0.5, labels, torch.tensor(7.0)
    )
    assert abs(flat.item() - math.log(6)) < 1e-6


def test_permutation_and_relabelling_change_nothing():
    image, text, labels, scale, _, _ = make_case(0)
    order = torch.randperm(len(labels))
    renamed = torch.where(labels == -1, labels, labels * 17 + 3)
    reference = unicl_loss(image, text, labels, scale)
    assert torch.allclose(unicl_loss(image[order], text[order], labels[order], scale), reference)
    assert torch.allclose(unicl_loss(image, text, renamed, scale), reference)


# The traps of the published pseudo-code.


def test_class_zero_is_a_class():
    image, text, *_ = make_case(1)
    image, text = image[:4], text[:4]
    zero = unicl_loss(image, text, torch.tensor([0, 0, 1, 1]), torch.tensor(5.0).double())
    five = unicl_loss(image, text, torch.tensor([5, 5, 1, 1]), torch.tensor(5.0).double())
    assert torch.equal(zero, five)


def test_batch_without_any_class():
    image, text, *_ = make_case(2)
    loss = unicl_loss(image, text, torch.full((len(image),), -1), torch.tensor(5.0).double())
    assert torch.isfinite(loss)


def test_labels_are_not_changed_in_place():
    labels = torch.tensor([0, -1, 0, -1])
    before = labels.clone()
    global_labels(labels)
    unicl_loss(torch.eye(4), torch.eye(4), labels, torch.ones(1))
    assert torch.equal(labels, before)


def test_captions_get_labels_of_their_own():
    ids, counts = global_labels(torch.tensor([-1, 3, -1, 3, 0, -1]))
    captions = [ids[i].item() for i in (0, 2, 5)]
    assert len(set(captions)) == 3
    assert not set(captions) & {ids[1].item(), ids[4].item()}
    assert counts[ids].tolist() == [1, 2, 1, 2, 1, 1]


def test_no_underflow_at_large_scale():
    image = F.normalize(torch.randn(16, 4), dim=1)
    loss = unicl_loss(image, -image, torch.arange(16), torch.tensor([400.0]))
    expected = dense.unicl(image.double(), -image.double(), torch.arange(16), 400.0)
    assert abs(loss.item() / expected.item() - 1) < 1e-5


def test_nan_reaches_the_loss():
    image = torch.eye(3)
    image[0, 0] = float("nan")
    assert torch.isnan(unicl_loss(image, torch.eye(3), torch.arange(3), torch.ones(1)))


def test_worked_clip_fixture():
    """Values computed independently in numpy for two pairs (image-to-text differs from t2i)."""
    image = torch.tensor([[1, 0], [0.6, 0.8]], dtype=torch.float64)
    text = torch.tensor([[0.8, 0.6], [0.28, 0.96]], dtype=torch.float64)
    for scale, expected in ((1.0, 0.591534374556), (10.0, 0.652786748928), (100.0, 4.621709066172)):
        loss = unicl_loss(image, text, torch.tensor([-1, -1]), torch.tensor(scale).double())
        np.testing.assert_allclose(loss.item(), expected, atol=1e-11)
