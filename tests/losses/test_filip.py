"""FILIP against its worked example and a dense formula in float64; its special cases, its tiles."""

import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from loaders import tokenizers
from loaders.text_shapes import shaped_texts
from losses import _late, filip
from losses._block import WALK, Walk
from losses._gather import Gather
from tests.engine import tiny
from tests.losses import dense, small, virtual
from tests.losses.on_ranks import DIMS, leaves_of, make_batch

# Two pairs with three tokens a side; the last one of the second text is padding.
IMAGE = torch.tensor(
    [[[1, 0], [0, 1], [0.6, 0.8]], [[-1, 0], [0, -1], [-0.6, 0.8]]], dtype=torch.float64
)
TEXT = torch.tensor(
    [[[1, 0], [0.8, 0.6], [0.6, -0.8]], [[-0.8, 0.6], [0, -1], [0, 1]]], dtype=torch.float64
)
MASK = torch.tensor([[True, True, True], [True, True, False]])
OF_IMAGE = [[0.853333333333, 0.2], [0.066666666667, 0.92]]
OF_TEXT = [[0.853333333333, 0.3], [0.266666666667, 0.98]]


def scores(image, text, mask):
    """sI and sT of all pairs (n, m) from all products, one text after the other."""
    products = [torch.einsum("ikd,rd->ikr", image, y[m]) for y, m in zip(text, mask, strict=True)]
    of_image = torch.stack([of.amax(2).mean(1) for of in products], 1)
    return of_image, torch.stack([of.amax(1).mean(1) for of in products], 1)


def dense_loss(image, text, mask, scale):
    """The two directions: softmax over texts for an image, over images for a text."""
    of_image, of_text = scores(image, text, mask)
    own = torch.arange(len(image))
    return F.cross_entropy(scale * of_image, own), F.cross_entropy(scale * of_text.T, own)


def ours(image, text, mask, scale, walk=WALK):
    return filip.filip_loss(image, text, mask, torch.tensor([scale]).double(), Gather(), walk)


def tokens(generator, *shape):
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


def case(seed, sizes=None):
    """Images, texts, a mask with at least one token, and a scale."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    b, n, m, d = sizes or (rng.randint(1, 14), rng.randint(1, 9), rng.randint(1, 7), 5)
    lengths = torch.randint(1, m + 1, (b, 1), generator=generator)
    mask = torch.arange(m) < lengths
    return tokens(generator, b, n, d), tokens(generator, b, m, d), mask, rng.choice([1, 14.3, 100])


@pytest.mark.parametrize(
    ("temperature", "of_image", "of_text", "expected"),
    [
        (1.0, 0.386890706271, 0.426049815314, 0.406470260792),
        (0.5, 0.203171790557, 0.248988359412, 0.226080074984),
        (0.07, None, None, 9.576984468980e-05),
    ],
)
def test_worked_example(temperature, of_image, of_text, expected):
    loss, each = ours(IMAGE, TEXT, MASK, 1 / temperature)
    assert abs(loss.item() - expected) < 1e-11
    torch.testing.assert_close(each.mean(), loss)
    scale = torch.tensor([1 / temperature]).double()
    rows, columns = _late.late_normalisers(IMAGE, TEXT, MASK, scale, Gather())
    own = _late.paired_scores(IMAGE, TEXT, MASK)
    if of_image is not None:
        assert abs((rows - scale * own[0]).mean().item() - of_image) < 1e-11
        assert abs((columns - scale * own[1]).mean().item() - of_text) < 1e-11
    for found, table in zip(own, (OF_IMAGE, OF_TEXT), strict=True):
        np.testing.assert_allclose(found, np.diag(table), atol=1e-12)


def test_scores_of_the_worked_example_and_what_they_are_not():
    for found, table in zip(scores(IMAGE, TEXT, MASK), (OF_IMAGE, OF_TEXT), strict=True):
        np.testing.assert_allclose(found, table, atol=1e-12)
    pad_taken_in = ours(IMAGE, TEXT, torch.ones_like(MASK), 1.0)[0]
    assert abs(pad_taken_in.item() - 0.472492463402) < 1e-11
    # Both directions normalised over images, as in a public re-implementation.
    transposed = F.cross_entropy(torch.tensor(OF_IMAGE).T.double(), torch.arange(2))
    wrong = 0.5 * (transposed + 0.426049815314)
    assert abs(wrong.item() - 0.405986765841) < 1e-8
    assert abs(wrong - ours(IMAGE, TEXT, MASK, 1.0)[0]) > 1e-4


@pytest.mark.parametrize("block", range(6))
def test_values_and_gradients_equal_the_dense_formula(block, monkeypatch):
    for seed in range(10 * block, 10 * block + 10):
        image, text, mask, scale = case(seed)
        # From one pair a tile to all of them; kept, kept in part, and computed again.
        monkeypatch.setitem(_late.PRODUCTS, "cpu", (1, 400, 2**20)[seed % 3])
        walk = Walk(keep_bytes=(0, 500, 2**20)[seed // 3 % 3])
        found = []
        for formula in ("ours", "dense"):
            leaves = [image.clone(), text.clone(), torch.tensor([scale]).double()]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            x, y, s = leaves
            if formula == "ours":
                loss, each = filip.filip_loss(x, y, mask, s, Gather(), walk)
                torch.testing.assert_close(each.mean(), loss, rtol=1e-12, atol=1e-12)
            else:
                loss = sum(dense_loss(x, y, mask, s)) / 2
            found.append((loss, *torch.autograd.grad(3 * loss, leaves)))
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_any_gradient_of_the_normalisers_is_right():
    image, text, mask, _ = case(3, (7, 4, 5, 6))
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(7, generator=generator, dtype=torch.float64) for _ in "rc"]
    leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor([14.0]).double()]
    leaves[2].requires_grad_()
    found = _late.late_normalisers(leaves[0], leaves[1], mask, leaves[2], Gather())
    of_image, of_text = scores(image, text, mask)
    expected = (leaves[2] * of_image).logsumexp(1), (leaves[2] * of_text).logsumexp(0)
    for mine, theirs in zip(
        (*found, *torch.autograd.grad(found, leaves, upstream)),
        (*expected, *torch.autograd.grad(expected, leaves, upstream)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_one_token_a_side_is_clip():
    generator = torch.Generator().manual_seed(0)
    sides = [tokens(generator, 9, 6).requires_grad_() for _ in range(2)]
    expected = dense.value_and_gradients(
        dense.unicl, *sides, torch.full((9,), -1), torch.ones(1) * 14
    )
    for copies in (1, 3):  # equal tokens are as good as one
        leaves = [side.detach().clone().requires_grad_() for side in sides]
        scale = torch.tensor([14.0]).double().requires_grad_()
        repeated = [leaf[:, None].expand(-1, copies, -1) for leaf in leaves]
        loss, _ = filip.filip_loss(*repeated, torch.ones(9, copies) > 0, scale, Gather())
        found = (loss, *torch.autograd.grad(loss, [*leaves, scale]))
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs.reshape(mine.shape), rtol=1e-10, atol=1e-12)


def test_what_changes_nothing():
    image, text, mask, _ = case(5, (6, 4, 5, 6))
    expected = ours(image, text, mask, 14.0)[0]
    order = torch.tensor([3, 1, 0, 2])
    generator = torch.Generator().manual_seed(2)
    padded = torch.cat([text, 5 * tokens(generator, 6, 3, 6)], 1), F.pad(mask, (0, 3))
    for case_of, sides in {
        "more padding": (image, *padded),
        "another order": (image[:, order], text.flip(1), mask.flip(1)),
        "every image token twice": (image.repeat(1, 2, 1), text, mask),
        "every text token twice": (image, text.repeat(1, 2, 1), mask.repeat(1, 2)),
    }.items():
        torch.testing.assert_close(ours(*sides, 14.0)[0], expected, msg=case_of)
    for found in _late.paired_scores(image, text, mask):
        assert (found.abs() <= 1).all()


def test_a_text_without_tokens_is_no_nan_and_gets_no_gradient():
    image, text, mask, _ = case(5, (6, 4, 5, 6))
    mask[2] = False
    leaves = [image.requires_grad_(), text.requires_grad_()]
    scale = torch.tensor([14.0]).double().requires_grad_()
    loss, each = filip.filip_loss(*leaves, mask, scale, Gather())
    grads = torch.autograd.grad(loss, [*leaves, scale])
    assert all(bool(value.isfinite().all()) for value in (loss, each, *grads))
    assert not grads[1][2].any()
    # Its score with every image is 0.
    valid = torch.arange(6) != 2
    of_image, of_text = (torch.zeros(6, 6).double() for _ in range(2))
    for table, found in zip(
        (of_image, of_text), scores(image, text[valid], mask[valid]), strict=True
    ):
        table[:, valid] = found.detach()
    own = torch.arange(6)
    directions = F.cross_entropy(14 * of_image, own), F.cross_entropy(14 * of_text.T, own)
    torch.testing.assert_close(loss, sum(directions) / 2)


def on_rank(rank, share, batch, precision=torch.float32):
    image, text, mask = (part[sum(share[:rank]) : sum(share[: rank + 1])].clone() for part in batch)
    leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor([14.3]).to(image.dtype)]
    leaves[2].requires_grad_()
    walk = Walk(keep_bytes=300, precision=precision)
    loss, _ = filip.filip_loss(*leaves[:2], mask, leaves[2], Gather(), walk)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("share", [[5, 5], [1, 6, 3], [2, 4, 1, 3], [0, 4, 5, 1], [1] * 9])
def test_ranks_equal_one_process(share, monkeypatch):
    monkeypatch.setitem(_late.PRODUCTS, "cpu", 100)
    batch = case(8, (sum(share), 4, 3, 5))[:3]
    loss, *expected = on_rank(0, [sum(share)], batch)
    world = len(share)
    ranks = virtual.run(on_rank, world, share, batch)
    for found in ranks:
        torch.testing.assert_close(found[0], loss, rtol=1e-12, atol=0)
    for side in (1, 2):
        whole = torch.cat([found[side] for found in ranks]) / world
        torch.testing.assert_close(whole, expected[side - 1], rtol=1e-9, atol=1e-13)
    mean = sum(found[3] for found in ranks) / world
    torch.testing.assert_close(mean, expected[2], rtol=1e-9, atol=1e-13)


def test_sixteen_bits_are_those_of_the_tokens(monkeypatch):
    """As on a GPU: tokens rounded, sums in float32, over ranks too."""
    batch = [
        part.float() if part.is_floating_point() else part for part in case(4, (8, 4, 3, 5))[:3]
    ]
    exact = on_rank(0, [8], batch)
    half = torch.bfloat16
    assert torch.equal(on_rank(0, [8], batch, half)[0], exact[0])  # nothing changes on a CPU

    def factors(tokens, precision):
        return half if precision == half else tokens.dtype

    monkeypatch.setattr(_late, "factors", factors)
    before = [part.to(half).float() if part.is_floating_point() else part for part in batch]
    expected = on_rank(0, [8], before)
    found = on_rank(0, [8], batch, half)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0], exact[0], rtol=1e-2, atol=1e-2)
    ranks = virtual.run(on_rank, 4, [2, 2, 2, 2], batch, half)
    for side in (1, 2):
        assert found[side].dtype == torch.float32
        torch.testing.assert_close(found[side], expected[side], rtol=2e-2, atol=2e-3)
        whole = torch.cat([rank[side] for rank in ranks]) / 4
        torch.testing.assert_close(whole, found[side], rtol=2e-2, atol=2e-3)


def test_the_method_takes_tokens_alone_and_is_told_the_precision():
    method, leaves = small.build("filip", DIMS).double(), leaves_of(slice(None))
    out = method(leaves, make_batch()[-1], Gather())
    expected = dense_loss(leaves["image_tokens"], leaves["text_tokens"], leaves["text_mask"], 12.0)
    torch.testing.assert_close(out["contrastive_loss"], sum(expected) / 2)
    out["contrastive_loss"].backward()
    taken = {key for key, leaf in leaves.items() if leaf.grad is not None}
    assert taken == {"image_tokens", "text_tokens", "scale"}
    method.precision = torch.bfloat16
    assert method.walk().precision == torch.bfloat16
    assert losses.find("filip").similarity == "late"


def test_equal_texts_are_encoded_once_and_all_texts_have_one_length():
    """As the loader cuts them, and as they are."""
    module, tokenizer = tiny.build("filip"), tokenizers.build("clip", 12)
    whole = {**tiny.make_batch(0, 3), "text": tokenizer(["a cat", "one dog", "a cat"])[:, None]}
    cut = {**whole, **shaped_texts(whole["text"], tokenizer)}
    assert cut["text"].shape[2] == 4
    assert cut["distinct_text"].shape == (1, 3, 4)
    encoded = []
    hook = module.model.text.register_forward_pre_hook
    hook(lambda _, ids: encoded.append(ids[0]))
    few, many = (module.method.encode(module.model, batch) for batch in (cut, whole))
    assert torch.equal(encoded[0], cut["distinct_text"][0])
    assert few["text_tokens"].shape == many["text_tokens"].shape == (3, 12, 6)
    assert torch.equal(few["text_mask"], many["text_mask"])
    assert few["text_mask"].sum(1).tolist() == [4, 4, 4]  # start, two words, end
    mask = few["text_mask"]
    torch.testing.assert_close(few["text_tokens"][mask], many["text_tokens"][mask])
    assert not few["text_tokens"][:, 4:].any()


class Largest(TorchDispatchMode):
    """The most elements that a result of an operator has."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        results = out if isinstance(out, tuple | list) else (out,)
        sizes = [result.numel() for result in results if isinstance(result, torch.Tensor)]
        self.found = max([self.found, *sizes])
        return out


def test_no_tensor_has_the_products_of_all_pairs(monkeypatch):
    monkeypatch.setitem(_late.PRODUCTS, "cpu", 3000)
    image, text, mask, _ = case(1, (40, 6, 7, 5))
    leaves = [image.requires_grad_(), text.requires_grad_()]
    with Largest() as largest:
        filip.filip_loss(*leaves, mask, torch.ones(1).double(), Gather())[0].backward()
    assert 20 * largest.found < 40 * 40 * 6 * 7
    assert largest.found <= 3000
