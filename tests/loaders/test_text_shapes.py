"""Text batches have few shapes, and hold what they held before."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from loaders import tokenizers
from loaders.batch import StepBatches, TripletDataset
from loaders.text_shapes import closed_length, closed_rows, shaped_texts
from loaders.texts import TextOptions, load_templates
from tests.commands import ROOT

STEPS = 300


def made_texts(pad, end, lengths, context):
    """One row for each length: random ids, the end id, padding."""
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.full((len(lengths), context), pad)
    for row, length in zip(ids, lengths, strict=True):
        row[: length - 1] = torch.randint(10, 90, (length - 1,), generator=generator)
        row[length - 1] = end
    return ids


@pytest.mark.parametrize(("pad", "end"), [(0, 99), (99, 99), (1, 2)])
@pytest.mark.parametrize(("longest", "cut"), [(3, 4), (8, 8), (9, 12), (18, 20), (21, 21)])
def test_nothing_but_padding_is_cut_and_every_sample_finds_its_text(pad, end, longest, cut):
    lengths = [longest, 2, longest - 1, 3, longest] * 2
    one = made_texts(pad, end, lengths, 21)[[0, 1, 2, 0, 3, 1, 4, 5, 0]]
    two = made_texts(pad, end, lengths, 21)[[7] * 9]
    whole = torch.stack([one, two], dim=1)
    found = shaped_texts(whole, SimpleNamespace(pad_id=pad, end_id=end))
    assert found["text"].shape == (9, 2, cut)
    assert torch.equal(found["text"], whole[:, :, :cut])
    assert (whole[:, :, cut:] == pad).all()
    assert found["distinct_text"].shape == (2, 8, cut)  # six distinct ones in one view, one in two
    for view in range(2):
        rows = found["distinct_text"][view]
        assert torch.equal(rows[found["text_index"][:, view]], found["text"][:, view])
        distinct = found["text_index"][:, view].max() + 1
        assert len(rows[:distinct].unique(dim=0)) == distinct == (6, 1)[view]
        assert (rows[distinct:] == rows[0]).all()


def test_texts_of_unknown_padding_are_left_alone():
    pixels = torch.zeros(4, 1, 1, 32, 32, dtype=torch.uint8)
    assert shaped_texts(pixels, lambda texts: pixels) == {"text": pixels}
    assert shaped_texts(pixels, None) == {"text": pixels}


def test_sizes_are_few_and_waste_less_than_an_eighth():
    for size in (64, 200, 1000, 4096):
        rows = {number: closed_rows(number, size) for number in range(1, size + 1)}
        assert all(number <= found <= size for number, found in rows.items())
        assert all(found < 1.125 * number for number, found in rows.items() if number > 64)
        assert len({*rows.values()}) <= 8 * (size.bit_length() - 6) + 8
    assert [closed_length(n, 77) for n in (1, 8, 9, 72, 73, 77)] == [4, 8, 12, 72, 76, 77]


def test_a_dozen_shapes_in_300_steps_of_the_quickstart(monkeypatch):
    """The real order and texts; no picture is read, and a whole batch is also cut in four."""
    from engine import build, config

    monkeypatch.chdir(ROOT)
    cfg = config.load("configs/quickstart_unicl.yaml", [])
    plan = build.plan(cfg, 1)
    tokenizer = tokenizers.build("clip", cfg.model.text.context_length)
    known = {}

    def remembered(texts):  # a text comes up some fifteen times
        new = list({*texts} - known.keys())
        known.update(zip(new, tokenizer(new), strict=True))
        return torch.stack([known[text] for text in texts])

    dataset = TripletDataset(
        plan.sources,
        plan.labels,
        views=[lambda picture: torch.zeros(3, 1, 1, dtype=torch.uint8)],
        texts=TextOptions(load_templates(cfg.data.templates)),
        tokenizer=remembered,
        seed=cfg.seed,
        decode=lambda data: None,
    )
    shapes = {1: Counter(), 4: Counter()}
    before = {1: set(), 4: set()}
    for addresses in StepBatches(plan.order, 0, 1, plan.micro_batch, 0, STEPS):
        whole = torch.stack([sample["text"] for sample in dataset.__getitems__(addresses)])
        for pieces in shapes:
            for text in whole.chunk(pieces):
                found = shaped_texts(text, tokenizer)
                shapes[pieces][tuple(found["distinct_text"].shape)] += 1
                ends = text.argmax(dim=-1).max()
                before[pieces].add((int(ends), len(text.unique(dim=0))))
    for pieces, seen in shapes.items():
        assert sum(seen.values()) == pieces * STEPS
        assert len(seen) <= 12 < 100 < len(before[pieces]), seen
