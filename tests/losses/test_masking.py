"""Masked tokens: the law of what is hidden, where texts end, the cross-entropy of the guesses."""

import math

import pytest
import torch
from scipy.stats import binom
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from loaders.tokenizers import build as tokenizer
from losses import _masking
from losses._gather import Gather
from losses._masking import WordHead, guessed, mask_tokens, room
from losses._random import uniform
from models.text_transformer import end_positions
from tests.engine import family, tiny
from tests.losses.test_no_waiting import NoOperatorWaits, NoTensorIsRead

START, END, MASK = 49406, 49407, 49408


def texts(rows, length, seed=0):
    """Ids (rows, length) of 2 to `length` tokens each, padding 0, and what is text, bool."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(1, length, (rows, 1), generator=generator)
    place = torch.arange(length)
    ids = torch.randint(1, START, (rows, length), generator=generator)
    ids = torch.where(place < ends, ids, torch.where(place == ends, END, 0))
    ids[:, 0] = START
    return ids, place <= ends


def seeds(rows, seed=1):
    return torch.randint(0, 2**62, (rows,), generator=torch.Generator().manual_seed(seed))


def test_every_token_is_masked_as_its_own_numbers_say():
    ids, text = texts(40, 20)
    seed = seeds(40)
    hidden, chosen = mask_tokens(ids, text, seed)
    numbers = uniform(seed, 20, 3).double().tolist()
    for row, end in enumerate((text.sum(1) - 1).tolist()):
        for place in range(20):
            choice, how, word = numbers[row][place]
            masked = 0 < place < end and choice < 0.15
            old = int(ids[row, place])
            new = MASK if how < 0.8 else math.floor(word * 49406) if how < 0.9 else old
            assert bool(chosen[row, place]) == masked
            assert int(hidden[row, place]) == (new if masked else old)


def test_law():
    rows, length = 4000, 40
    ids, text = texts(rows, length)
    hidden, chosen = mask_tokens(ids, text, seeds(rows))
    inside = text.sum() - 2 * rows
    assert not chosen[~text].any()
    assert not chosen[(ids == START) | (ids == END)].any()

    def near(found, trials, probability):
        deviation = (trials * probability * (1 - probability)) ** 0.5
        return abs(found - trials * probability) < 5 * deviation

    count = chosen.sum().item()
    assert near(count, inside.item(), 0.15)
    masks, stay = (hidden == MASK).sum().item(), (chosen & (hidden == ids)).sum().item()
    assert near(masks, count, 0.8)
    assert near(stay, count, 0.1)
    others = hidden[chosen & (hidden != ids) & (hidden != MASK)]
    assert near(len(others), count, 0.1)
    assert others.max() < START
    assert near((others < START // 4).sum().item(), len(others), 0.25)
    # Each token by itself: the number in a text is binomial, and neighbours are independent.
    long = text.sum(1) >= length - 2
    of_long, tokens = chosen[long].sum(1).double(), (text[long].sum(1) - 2).double()
    assert abs((of_long - 0.15 * tokens).mean().item()) < 5 * (0.1275 * 38 / len(tokens)) ** 0.5
    assert of_long.var().item() == pytest.approx(0.1275 * 37, rel=0.3)
    both = (chosen[:, 1:] & chosen[:, :-1]).sum().item()
    assert near(both, (text.sum(1) - 3).clamp(min=0).sum().item(), 0.15**2)


def test_padding_and_other_samples_change_nothing():
    ids, text = texts(30, 16)
    seed = seeds(30)
    before = ids.clone()
    hidden, chosen = mask_tokens(ids, text, seed)
    assert torch.equal(ids, before)
    longer = [F.pad(value, (0, 9)) for value in (ids, text)]
    again, more = mask_tokens(*longer, seed)
    assert torch.equal(again[:, :16], hidden)
    assert torch.equal(more[:, :16], chosen)
    part, _ = mask_tokens(ids[7:11], text[7:11], seed[7:11])
    assert torch.equal(part, hidden[7:11])
    other, _ = mask_tokens(ids, text, seed + 1)
    assert not torch.equal(other, hidden)


def test_constants_are_those_of_the_tokenizer():
    made = tokenizer("clip", 8)
    assert made.vocab_size == _masking.CLIP_IDS == MASK
    assert (made.start_id, made.end_id) == (START, END) == (_masking.WORDS, _masking.WORDS + 1)


def dense_guesses(head, states, ids, chosen):
    """Sum and number by loops over the chosen tokens."""
    sums, counts = [], []
    for row in range(len(ids)):
        values = [
            torch.logsumexp(logits, 0) - logits[ids[row, place]]
            for place in range(states.shape[1])
            if chosen[row, place]
            for logits in [head.weight @ states[row, place] + head.bias]
        ]
        sums.append(sum(values, states[row].sum() * 0))
        counts.append(len(values))
    return torch.stack(sums), torch.tensor(counts, dtype=states.dtype)


def as_on_a_gpu(monkeypatch):
    """Let a CPU not count the chosen tokens."""
    monkeypatch.setattr(_masking, "computed", lambda chosen, tokens: room(tokens))


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("piece", [2**24, 1, 11 * 7])  # all rows at once, one by one, by seven
@pytest.mark.parametrize(("rows", "length", "share"), [(3, 7, 0.3), (50, 30, 0.15), (4, 9, 0)])
def test_guesses_equal_loops_in_float64(rows, length, share, piece, counted, monkeypatch):
    monkeypatch.setattr(_masking, "PIECE", piece)
    if not counted:
        as_on_a_gpu(monkeypatch)
    torch.manual_seed(rows)
    head, states = WordHead(5, 11).double(), torch.randn(rows, length, 5).double()
    ids = torch.randint(0, 11, (rows, length + 2))
    chosen = F.pad(torch.rand(rows, length - 2) < share, (1, 3))
    if rows == 50:  # more tokens than a GPU has rows for
        assert chosen.sum() < room(rows * (length - 2)) < rows * (length - 2)
    copies = [states.clone().requires_grad_() for _ in range(2)]
    weights, found = torch.rand(rows).double(), []
    for function, copy in zip((guessed, dense_guesses), copies, strict=True):
        sums, counts = function(head, copy, ids, chosen)
        total, leaves = (weights * sums).sum(), [copy, *head.parameters()]
        found.append([sums, counts, *torch.autograd.grad(total, leaves, allow_unused=True)])
    for ours, theirs in zip(*found, strict=True):
        expected = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "size", "near"), [
    (torch.float32, 100, 1e-5),  # exponentials of such logits overflow
    (torch.bfloat16, 1, 2e-2),
])  # fmt: skip
def test_pieces_in_every_type_beside_layers_of_torch_in_float64(kind, size, near, monkeypatch):
    monkeypatch.setattr(_masking, "PIECE", 13 * 3)
    torch.manual_seed(1)
    head, ids = WordHead(6, 13).to(kind), torch.randint(0, 13, (40,))
    states, found = (size * torch.randn(40, 6)).to(kind), []
    for wide in (False, True):
        given = states.double() if wide else states.clone()
        weight, bias = (p.detach().to(given.dtype).requires_grad_() for p in head.parameters())
        given.requires_grad_()
        if wide:
            each = F.cross_entropy(F.linear(given, weight, bias), ids, reduction="none")
        else:
            each = functional_call(head, {"weight": weight, "bias": bias}, (given, ids))
            assert each.dtype == torch.float32
        gradients = torch.autograd.grad(each.sum(), [given, weight, bias])
        found.append([value.detach().double() for value in (each, *gradients)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() < near * theirs.abs().max()


def test_a_graph_holds_the_logits_of_one_piece_at_most(monkeypatch):
    ids, states = torch.arange(9), torch.randn(9, 4, requires_grad=True)
    for piece, kept in ((2**24, [(9, 50)]), (50 * 8, [])):
        monkeypatch.setattr(_masking, "PIECE", piece)
        shapes, head = [], WordHead(4, 50)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved, shapes=shapes: shapes.append(tuple(saved.shape)) or saved, lambda x: x
        ):
            head(states, ids)
        assert [shape for shape in shapes if shape[1:] == (50,)] == kept
    monkeypatch.undo()
    total = head(states, ids).sum()
    total.backward(retain_graph=True)
    # They became the gradient: a second pass must not take them for exponentials.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_equal_logits_give_the_logarithm_of_the_vocabulary():
    head = WordHead(4, 49409)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    ids, text = texts(6, 12)
    _, chosen = mask_tokens(ids, text, seeds(6))
    sums, counts = guessed(head, torch.randn(6, 12, 4), ids, chosen)
    assert counts.sum() > 0
    assert (sums.sum() / counts.sum()).item() == pytest.approx(10.807887872817, abs=1e-5)


def test_there_is_room_for_all_but_hopeless_odds():
    for tokens in (0, 1, 7, 50, 400, 3000, 20_000, 1_000_000):
        assert binom.sf(room(tokens), tokens, 0.15) < 2.0**-64
    assert room(128 * 30) < 0.22 * 128 * 30  # and little of it is unused


def test_what_has_no_room_is_left_out_of_sum_and_number(monkeypatch):
    monkeypatch.setattr(_masking, "computed", lambda chosen, tokens: 3)
    chosen = torch.tensor([[False, True, True, False], [False, True, True, False]])
    sums, counts = guessed(WordHead(2, 9), torch.zeros(2, 4, 2), torch.ones(2, 4).long(), chosen)
    assert counts.tolist() == [2, 1]
    torch.testing.assert_close(sums[0], 2 * sums[1])


def test_a_cpu_computes_no_more_than_what_is_chosen():
    rows, head = [], WordHead(2, 9)
    head.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    ids, text = texts(30, 20)
    _, chosen = mask_tokens(ids, text, seeds(30))
    guessed(head, torch.zeros(30, 20, 2), ids % 9, chosen)
    assert rows == [chosen.sum().item()]


def test_nothing_waits_for_the_device(monkeypatch):
    as_on_a_gpu(monkeypatch)
    ids, text = texts(60, 20)
    head, states = WordHead(4, 9), torch.randn(60, 20, 4, requires_grad=True)
    with NoOperatorWaits(), NoTensorIsRead():
        hidden, chosen = mask_tokens(ids, text, seeds(60))
        sums, _ = guessed(head, states, hidden % 9, chosen)
        sums.sum().backward()


def test_declip_encodes_the_masked_text_and_pools_it_at_the_end_of_the_unmasked_one():
    module = family.build("declip")
    batch = tiny.make_batch(0, 12, 2, 2)
    batch["text"][:, :, 8], batch["text"][:, :, 9:] = END, 0
    ids = batch["text"][:, 0]
    hidden, chosen = mask_tokens(ids, module.model.text.mask(ids), batch["seed"])
    assert chosen[:, 1:8].any()
    assert (hidden == MASK).any()
    assert end_positions(hidden, END).tolist() == [8] * 12
    encoded = module.method.encode(module.model, batch)
    tokens = module.model.encode_text(hidden)["tokens"]
    pooled = F.normalize(module.model.text_projection(tokens[:, 8]), dim=1)
    torch.testing.assert_close(encoded["caption"], pooled)
    plain = module.model.encode_text(ids)["feature"]
    changed = (hidden != ids).any(1)
    assert ((encoded["caption"] - plain).abs().amax(1) > 1e-4).equal(changed)
    torch.testing.assert_close(
        encoded["eda"], module.model.encode_text(batch["text"][:, 1])["feature"]
    )
    sums, counts = dense_guesses(module.method.head, tokens, ids, chosen)
    torch.testing.assert_close(encoded["masked_sum"], sums)
    assert encoded["masked_count"].tolist() == counts.tolist()
    # Neither a micro-batch of its own nor other padding changes a sample.
    part = {key: value[5:7] for key, value in batch.items()}
    part["text"] = part["text"][:, :, :9]
    alone = module.method.encode(module.model, part)
    for name, value in encoded.items():
        torch.testing.assert_close(alone[name], value[5:7], rtol=1e-5, atol=1e-5, msg=name)


def test_a_batch_without_a_word_gives_no_masked_loss_and_every_parameter_a_gradient():
    module = family.build("declip")
    batch = tiny.make_batch(0, 12, 2, 2)
    batch["text"][:, :, 1], batch["text"][:, :, 2:] = END, 0
    out = module(batch, Gather())
    assert out["masked_loss"].item() == 0
    out["masked_loss"].backward()
    assert module.method.head.weight.grad.abs().max() == 0
