"""CLIP, cross-entropy, SupCon and multi-task against formulas of their own."""

import pytest
import torch
from torch.nn import functional as F

import losses
from losses._gather import Gather
from losses.supcon import supcon_loss
from tests.losses import dense

DIMS = {"embed_dim": 6, "image_width": 6, "text_width": 6, "num_classes": 5}
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
