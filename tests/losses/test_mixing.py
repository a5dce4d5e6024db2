"""MixUp and CutMix against timm's, and the losses of blended targets against dense formulas."""

import numpy as np
import pytest
import timm.data.mixup as timm_mixup
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy

import losses
from losses import _mixing
from losses._gather import Gather
from losses._mixing import Mix
from tests.losses import dense

DIMS = {"embed_dim": 8, "image_width": 6, "text_width": 6, "num_classes": 5}
HEIGHT, WIDTH = 20, 30


def theirs(monkeypatch, chosen):
    """timm's Mixup, made to draw what was chosen, without smoothing."""
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=5)
    drawn = (chosen.share, chosen.box is not None)
    monkeypatch.setattr(mixup, "_params_per_batch", lambda: drawn)
    monkeypatch.setattr(
        timm_mixup, "cutmix_bbox_and_lam", lambda *_, **__: (chosen.box, chosen.share)
    )
    return mixup


@pytest.mark.parametrize("step", range(12))
def test_pairs_are_blended_as_by_timm(step, monkeypatch):
    chosen = _mixing.draw(3, step, HEIGHT, WIDTH)
    images = torch.randn(6, 1, 3, HEIGHT, WIDTH)
    kept = images.clone()
    found = _mixing.mixed(images, chosen)
    assert torch.equal(images, kept)
    assert found["mix"].tolist() == pytest.approx([chosen.share] * 6)
    for first in (0, 2, 4):  # of two images timm's mirror image is the neighbour
        pair = images[first : first + 2, 0].clone()
        expected, _ = theirs(monkeypatch, chosen)(pair, torch.tensor([0, 1]))
        torch.testing.assert_close(found["image"][first : first + 2, 0], expected)


def test_shares_and_boxes_are_distributed_as_timm_s():
    ours = [_mixing.draw(0, step, HEIGHT, WIDTH) for step in range(4000)]
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0)
    np.random.seed(0)  # noqa: NPY002
    drawn = [mixup._params_per_batch() for _ in range(4000)]
    assert abs(sum(one.box is not None for one in ours) - 2000) < 5 * 1000**0.5
    blended = [one.share for one in ours if one.box is None]
    expected = [share for share, cut in drawn if not cut]
    assert distance(blended, expected) < 0.06
    cuts = [timm_mixup.cutmix_bbox_and_lam((HEIGHT, WIDTH), share) for share, cut in drawn if cut]
    mine = [one for one in ours if one.box is not None]
    assert distance([one.share for one in mine], [share for _, share in cuts]) < 0.06
    for edge in range(4):
        assert distance([one.box[edge] for one in mine], [box[edge] for box, _ in cuts]) < 0.06
    for one in mine:
        top, bottom, left, right = one.box
        assert 0 <= top <= bottom <= HEIGHT
        assert 0 <= left <= right <= WIDTH
        assert one.share == pytest.approx(1 - (bottom - top) * (right - left) / (HEIGHT * WIDTH))


def distance(one, other):
    """Largest distance of two empirical distributions (Kolmogorov and Smirnov)."""
    places = np.sort(np.concatenate([one, other]))
    ranks = [np.searchsorted(np.sort(x), places, side="right") / len(x) for x in (one, other)]
    return np.abs(ranks[0] - ranks[1]).max()


def test_a_function_of_seed_and_step():
    assert _mixing.draw(3, 5, 8, 8) == _mixing.draw(3, 5, 8, 8)
    assert len({_mixing.draw(seed, step, 8, 8) for seed in (1, 2) for step in range(9)}) > 15


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_micro_batches_change_nothing(pieces):
    images, labels = torch.rand(8, 1, 3, 8, 8).bfloat16(), torch.arange(8)
    for chosen in (Mix(0.3, None), Mix(0.75, (0, 4, 2, 6))):
        whole = _mixing.mixed(images, chosen)["image"]
        parts = [_mixing.mixed(part, chosen)["image"] for part in images.chunk(pieces)]
        assert torch.equal(torch.cat(parts), whole)
        assert whole.dtype == torch.bfloat16
    assert _mixing.swapped(labels).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_cross_entropy_equals_timm_s_soft_targets(share, monkeypatch):
    method = losses.build("cross_entropy", {}, DIMS)
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    labels, mix = torch.tensor([1, 4]), torch.full((2,), share)
    out = method.loss({"logits": logits, "mix": mix}, labels, Gather())
    mixup = theirs(monkeypatch, Mix(share, None))
    _, targets = mixup(torch.zeros(2, 3, 4, 4), labels)
    expected = SoftTargetCrossEntropy()(logits, targets.double())
    torch.testing.assert_close(out["classification_loss"], expected, rtol=1e-6, atol=1e-7)
    assert out["sample_loss"].mean() == pytest.approx(float(expected.detach()), rel=1e-5)
    found, wanted = (torch.autograd.grad(x, logits)[0] for x in
                     (out["classification_loss"], expected))  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["classes", "pairs", "both"])
def test_unicl_equals_the_dense_loss_of_blended_targets(share, kind):
    generator = torch.Generator().manual_seed(1)
    image, text = (
        torch.nn.functional.normalize(
            torch.randn(8, 6, generator=generator, dtype=torch.float64), dim=1
        ).requires_grad_()
        for _ in range(2)
    )
    labels = {
        "classes": [0, 1, 1, 2, 0, 0, 3, 1], "pairs": [-1] * 8, "both": [0, -1, 1, -1, 0, 0, 1, -1]
    }[kind]  # fmt: skip
    labels, scale = torch.tensor(labels), torch.tensor([5.0], dtype=torch.float64)
    scale.requires_grad_()
    mix = torch.full((8,), share, dtype=torch.float64)
    features = {"image": image, "text": text, "scale": scale.expand(8), "mix": mix}
    out = losses.build("unicl", {}, DIMS).loss(features, labels, Gather())
    # Row i of the target: share of its own texts, and the rest for those of its neighbour.
    own = torch.arange(8) + 10
    names = torch.where(labels < 0, own, labels)
    same = (names[:, None] == names[None, :]).double()
    same = same / same.sum(1, keepdim=True)
    order = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    target = share * same + (1 - share) * same[order]
    assert torch.allclose(target.sum(0), torch.ones(8).double())
    logits = scale * image @ text.T
    expected = 0.5 * (
        -(target * logits.log_softmax(1)).sum() / 8 - (target * logits.log_softmax(0)).sum() / 8
    )
    torch.testing.assert_close(out["contrastive_loss"], expected, rtol=1e-9, atol=1e-11)
    assert out["sample_loss"].mean() == pytest.approx(float(expected.detach()), rel=1e-6)
    wanted = torch.autograd.grad(expected, (image, text, scale), retain_graph=True)
    found = torch.autograd.grad(out["contrastive_loss"], (image, text, scale))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    if share == 1:
        plain = dense.unicl(image, text, labels, scale)
        torch.testing.assert_close(out["contrastive_loss"], plain.reshape(()), rtol=1e-9, atol=0)
