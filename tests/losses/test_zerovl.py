"""ZeroVL: its worked values, dense targets, CLIP as its special case, and what a step mixes."""

import random
import types

import pytest
import torch
from torch.nn import functional as F

import losses
import models
from losses import zerovl
from losses._gather import Gather
from losses._mixing import blended, swapped
from tests.engine import tiny
from tests.losses import dense
from tests.losses.test_no_waiting import NoOperatorWaits, NoTensorIsRead

# Angles whose sines and cosines are rational; similarities as the tests below write them out.
IMAGES = torch.tensor([[1, 0], [0.6, 0.8], [0, 1], [-0.8, 0.6]], dtype=torch.float64)
TEXTS = torch.tensor([[0.8, 0.6], [0, 1], [-0.6, 0.8], [-1, 0]], dtype=torch.float64)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def worked(count, share, tau, partners):
    """The loss of the first samples, whose features are taken as mixed ones."""
    image, text = IMAGES[:count], TEXTS[:count]
    target = share * text + (1 - share) * text[partners]
    loss, each = zerovl.mixed_pairs_loss(image, text, target, double([1 / tau]), Gather())
    assert each.mean().item() == pytest.approx(loss.item(), rel=1e-12)
    return loss.item()


@pytest.mark.parametrize(
    ("count", "share", "tau", "expected"),
    [
        (3, 1.0, 0.5, 0.806810129068),
        (3, 0.3, 0.5, 1.553476795735),
        (3, 0.0, 0.5, 1.873476795735),
        (3, 0.3, 0.02, 24.666793604639),
        (2, 1.0, 0.5, 0.524896839034),
        (2, 0.3, 0.5, 0.972896839034),
    ],
)
def test_worked_values_of_reversed_partners(count, share, tau, expected):
    partners = list(reversed(range(count)))
    assert worked(count, share, tau, partners) == pytest.approx(expected, abs=1e-10)


def test_worked_value_of_neighbours():
    """Reversed inside two micro-batches of two: the partner is the neighbour."""
    assert worked(4, 0.3, 0.5, [1, 0, 3, 2]) == pytest.approx(1.359449611938, abs=1e-10)


def case(seed):
    """Features of a random batch, the share, and the target that `encode` makes of them."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    size = 2 * rng.randint(1, 15), rng.choice([2, 6, 16])
    image, text = (F.normalize(torch.randn(size).double(), dim=1) for _ in range(2))
    scale = torch.full((size[0],), rng.choice([1.0, 14.3, 50.0, 200.0])).double()
    return {"image": image, "text": text, "scale": scale}, rng.choice([0.0, 0.02, 0.3, 0.5, 1.0])


def cross_entropy(features, share):
    """Both directions against the soft target share I + (1 - share) F, from all logits."""
    logits = features["scale"][0] * features["image"] @ features["text"].T
    own = torch.eye(len(logits)).double()
    partner = own[[place ^ 1 for place in range(len(logits))]]
    sides = (
        F.cross_entropy(side, share * own + (1 - share) * partner) for side in (logits, logits.T)
    )
    return 0.5 * sum(sides)


@pytest.mark.parametrize("block", range(6))
def test_values_and_gradients_equal_dense_float64(block):
    for seed in range(10 * block, 10 * block + 10):
        features, share = case(seed)
        ours, theirs = (
            {key: value.clone().requires_grad_() for key, value in features.items()}
            for _ in range(2)
        )
        target = blended(ours["text"], double([share]))
        given = {**ours, "target": target}
        out = losses.build("zerovl")(given, torch.zeros(len(target)).long(), Gather())
        expected = cross_entropy(theirs, share)
        torch.testing.assert_close(out["contrastive_loss"], expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(out["sample_loss"].mean(), expected.detach())
        gradients = (
            torch.autograd.grad(loss, list(leaves.values()))
            for loss, leaves in ((out["contrastive_loss"], ours), (expected, theirs))
        )
        for name, actual, wanted in zip(ours, *gradients, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_clip_is_the_special_case(share):
    """With a share of 0 everyone has the partner's image, and stands for the partner's text."""
    for seed in range(5):
        features, _ = case(seed)
        own = torch.full((len(features["text"]),), -1)
        clip = dense.unicl(features["image"], features["text"], own, features["scale"][0])
        image = features["image"] if share else swapped(features["image"])
        target = blended(features["text"], double([share]))
        out = losses.build("zerovl")({**features, "image": image, "target": target}, own, Gather())
        torch.testing.assert_close(out["contrastive_loss"], clip, rtol=1e-11, atol=1e-11)


class Simple(torch.nn.Module):
    """A model that takes pixels for a feature, and has given projections of texts."""

    def __init__(self, texts):
        super().__init__()
        tokens = types.SimpleNamespace(name="transformer", tokenizer="clip", vocab_size=49409)
        self.cfg = types.SimpleNamespace(text=tokens)
        self.texts = texts

    def encode_image(self, images):
        return {"feature": F.normalize(images.flatten(1), dim=1)}

    def encode_text(self, ids):
        return {"projected": self.texts}

    def text_mask(self, ids):
        return torch.ones_like(ids).bool()

    def scale(self):
        return double([2.0])


def encoded(monkeypatch, image_share, text_share, images, texts):
    given = double([image_share]), double([text_share])
    monkeypatch.setattr(zerovl, "shares", lambda seed, alpha: given)
    batch = {
        "image": images[:, None], "text": torch.zeros(len(texts), 1, 5, dtype=torch.int64),
        "seed": torch.arange(len(texts)), "step_seed": torch.full((len(texts),), 5),
    }  # fmt: skip
    return losses.build("zerovl").encode(Simple(texts), batch)


def test_worked_value_of_mixed_texts(monkeypatch):
    """Three texts whose partners are in reversed order, written as neighbours: 1 3, 3 1, 2 2."""
    pairs, first = [0, 2, 2, 0, 1, 1], [0, 4, 2]
    found = encoded(monkeypatch, 1.0, 0.3, IMAGES[pairs][:, :, None, None], TEXTS[pairs])
    mixed = double([[-0.236351579148, 0.971667603162], [0, 1], [0.498964444867, 0.866622456874]])
    torch.testing.assert_close(found["text"][first], mixed, rtol=0, atol=3e-8)
    image, text, target = (found[name][first] for name in ("image", "text", "target"))
    loss, _ = zerovl.mixed_pairs_loss(image, text, target, double([2.0]), Gather())
    assert loss.item() == pytest.approx(1.150811821916, abs=1e-7)  # its lengths are without EPS
    # Mixed before they have unit length: of two texts the longer one weighs more.
    texts = TEXTS[pairs] * double([0.5, 2, 2, 0.5, 3, 3])[:, None]
    found = encoded(monkeypatch, 1.0, 0.3, IMAGES[pairs][:, :, None, None], texts)
    wanted = F.normalize(0.3 * 0.5 * TEXTS[0] + 0.7 * 2 * TEXTS[2], dim=0)
    torch.testing.assert_close(found["text"][0], wanted, rtol=0, atol=3e-8)


def test_images_are_mixed_as_pixels_and_texts_left(monkeypatch):
    torch.manual_seed(0)
    images, texts = torch.randn(4, 3, 5, 5).double(), torch.randn(4, 6).double()
    found = encoded(monkeypatch, 0.3, 1.0, images, texts)
    blend = torch.stack([0.3 * images[i] + 0.7 * images[i ^ 1] for i in range(4)])
    torch.testing.assert_close(found["image"], F.normalize(blend.flatten(1), dim=1))
    unit = F.normalize(texts, dim=1)
    torch.testing.assert_close(found["text"], unit, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(
        found["target"], 0.3 * unit + 0.7 * unit[[1, 0, 3, 2]], rtol=1e-7, atol=1e-7
    )


def test_one_of_the_two_is_mixed_by_an_amount_of_the_beta_distribution():
    of_image, of_text = zerovl.shares(torch.arange(20000), 0.1)
    assert bool(((of_image == 1) | (of_text == 1)).all())
    assert of_image.min() >= 0
    mixed = of_image < 1  # in the image turn, but for coefficients that round to 1
    share = of_image * of_text
    turns = torch.stack([mixed, of_text < 1]).double().mean(1)
    # A coefficient below 2^-25 of 1 rounds: P = (2^-25)^0.1 / (0.1 B(0.1, 0.1)) = 0.089.
    assert turns.tolist() == pytest.approx([0.5 * (1 - 0.089)] * 2, abs=0.02)
    exact = torch.distributions.Beta(0.1, 0.1).sample((20000,))
    places = torch.linspace(0.001, 0.999, 50)
    ours, theirs = ((values[:, None] < places).double().mean(0) for values in (share, exact))
    assert (ours - theirs).abs().max() < 0.02
    ranks, _ = zerovl.shares(torch.tensor([7, 7, 7]), 0.1)
    assert len(ranks.unique()) == 1


BERT = {
    "name": "hf", "tokenizer": "google-bert/bert-base-uncased", "context_length": 12,
    "hf_config": {
        "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("text", [tiny.MODEL["text"], BERT], ids=["clip", "bert"])
def test_encode_is_the_same_in_pieces_and_waits_for_nothing(text):
    torch.manual_seed(5)
    model = models.build({**tiny.MODEL, "text": text}).train()
    method, batch = losses.build("zerovl", {"altered": 0.5}, tiny.DIMS), tiny.make_batch(0, 12)
    if text is BERT:
        batch["text"] = 999 + batch["text"] % 29000
        batch["text"][..., 0], batch["text"][..., 8], batch["text"][..., 9:] = 101, 102, 0
    with NoTensorIsRead(), NoOperatorWaits():
        whole = method.encode(model, batch)
    pieces = [method.encode(model, tiny.cut(batch, part, 3)) for part in range(3)]
    for name, value in whole.items():
        parts = torch.cat([piece[name] for piece in pieces])
        torch.testing.assert_close(parts, value, rtol=1e-5, atol=1e-6, msg=name)
    as_they_are = losses.build("zerovl", {"altered": 0.0}, tiny.DIMS).encode(model, batch)
    assert (as_they_are["text"] - whole["text"]).abs().max() > 1e-3
    assert torch.equal(as_they_are["image"], whole["image"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 0.0}, r"loss\.alpha=0\.0 is not in \(0, 1\]"),
        ({"alpha": 1.5}, r"loss\.alpha=1\.5 is not in"),
        ({"altered": 1.0}, r"loss\.altered=1\.0 is not in \[0, 1\)"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        losses.build("zerovl", options)
