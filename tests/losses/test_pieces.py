"""Masked, replaced and deleted word pieces: how often, in which order, and for each text alone."""

import types

import pytest
import torch

from losses import _pieces
from losses._pieces import VOCABULARIES, altered
from losses._random import uniform

CLIP, BERT = VOCABULARIES["clip"], VOCABULARIES["bert-base-uncased"]


def texts(known, count=300, length=25, first=101, last=102):
    """Texts of 3 to `length` tokens, whose words are numbered from 2000, padded; and the mask."""
    ends = 2 + torch.arange(count) % (length - 2)
    place = torch.arange(length)
    ids = (2000 + place).expand(count, -1).clone()
    ids[:, 0] = first
    ids[place == ends[:, None]] = last
    ids[place > ends[:, None]] = known.pad
    return ids, place <= ends[:, None]


@pytest.mark.parametrize(
    ("known", "first", "last"), [(BERT, 101, 102), (CLIP, 49406, 49407)], ids=["bert", "clip"]
)
def test_what_happens_to_pieces_and_how_often(known, first, last):
    ids, text = texts(known, 6000, first=first, last=last)
    kept = ids.clone()
    found = altered(ids, text, torch.arange(6000), 0.2, known)
    assert torch.equal(ids, kept)
    assert found.shape == ids.shape
    masked = replaced = words = gone = 0
    for before, after in zip(ids.tolist(), found.tolist(), strict=True):
        end = after.index(last)
        assert after[0] == first
        assert after.count(first) == after.count(last) == 1
        assert after[end + 1 :] == [known.pad] * (len(after) - end - 1)
        inside = after[1:end]
        gone += before.index(last) - end
        words += before.index(last) - 1
        masked += inside.count(known.mask)
        # A word that stays is at most as far to the left as pieces before it are gone.
        stays = [word for word in inside if 2000 <= word < 2025]
        replaced += len(inside) - len(stays) - inside.count(known.mask)
        assert all(known.words[0] <= word < known.words[1] for word in inside if word != known.mask)
    for count, share in ((masked, 0.5), (replaced, 0.1), (gone, 0.4)):
        # Five standard deviations; one in a thousand replacements is a word of the text.
        sigma = (words * 0.2 * share) ** 0.5
        assert abs(count - words * 0.2 * share) < 5 * sigma, share


def one_by_one(ids, seed, share, known):
    """The altered text of a list of ids, by a loop over its pieces."""
    end = len(ids) - 1
    while ids[end] == known.pad:
        end -= 1
    drawn = uniform(torch.tensor([seed]), len(ids), 3)[0].tolist()
    first, last = known.words
    found = []
    for place, (piece, (choice, how, word)) in enumerate(zip(ids[: end + 1], drawn, strict=False)):
        if place in (0, end) or choice >= share:
            found.append(piece)
        elif how < 0.5:
            found.append(known.mask)
        elif how < 0.6:
            found.append(first + int(word * (last - first)))
    return (found + [known.pad] * len(ids))[: len(ids)]


@pytest.mark.parametrize("known", [BERT, CLIP], ids=["bert", "clip"])
def test_equals_a_loop_over_pieces(known):
    ids, text = texts(known)
    seeds = torch.randint(2**62, (300,), generator=torch.Generator().manual_seed(2))
    expected = [
        one_by_one(row, seed, 0.3, known)
        for row, seed in zip(ids.tolist(), seeds.tolist(), strict=True)
    ]
    assert altered(ids, text, seeds, 0.3, known).tolist() == expected


def test_neither_padding_nor_neighbours_nor_the_cut_change_a_text():
    ids, text = texts(BERT)
    seeds = torch.randint(2**62, (300,), generator=torch.Generator().manual_seed(0))
    whole = altered(ids, text, seeds, 0.2, BERT)
    some = slice(0, 300, 23)  # of three tokens
    short = altered(ids[some, :4], text[some, :4], seeds[some], 0.2, BERT)
    assert torch.equal(short, whole[some, :4])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    assert torch.equal(altered(ids[order], text[order], seeds[order], 0.2, BERT), whole[order])
    parts = zip(ids.split(100), text.split(100), seeds.split(100), strict=True)
    assert torch.equal(torch.cat([altered(*part, 0.2, BERT) for part in parts]), whole)
    assert not torch.equal(altered(ids, text, seeds + 1, 0.2, BERT), whole)


def test_with_probability_0_a_text_stays_as_it_is():
    ids, text = texts(BERT)
    assert torch.equal(altered(ids, text, torch.arange(300), 0.0, BERT), ids)


def test_unknown_tokenizers_and_towers_without_a_mask_are_refused():
    def tower(tokenizer, name="transformer", vocab_size=49408, hf_config=None):
        return types.SimpleNamespace(
            tokenizer=tokenizer, name=name, vocab_size=vocab_size, hf_config=hf_config
        )

    with pytest.raises(ValueError, match=r"tokenizer=FacebookAI/roberta-base: .* not known; give"):
        _pieces.vocabulary(tower("FacebookAI/roberta-base", "hf"))
    with pytest.raises(ValueError, match=r"vocab_size=49408: .* clip with a mask needs 49409"):
        _pieces.vocabulary(tower("clip"))
    with pytest.raises(ValueError, match=r"hf_config\.vocab_size=30000: .* needs 30522"):
        _pieces.vocabulary(tower("/m/bert-base-uncased", "hf", hf_config={"vocab_size": 30000}))
    assert _pieces.vocabulary(tower("clip", vocab_size=49409)) == CLIP
    assert _pieces.vocabulary(tower("google-bert/bert-base-uncased", "hf")) == BERT
