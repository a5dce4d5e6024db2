"""Equal texts of a micro-batch are encoded once, and the gradient is that of encoding each."""

from types import SimpleNamespace

import pytest
import torch

import losses
from loaders.text_shapes import closed_length, shaped_texts
from losses._method import text_features
from models.config import TextConfig
from models.text_hf import HuggingFaceTower
from models.text_transformer import TransformerTower
from tests.engine import tiny

BERT = {"model_type": "bert", "vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CLIP = SimpleNamespace(pad_id=0, end_id=49407)


def batch():
    found = tiny.make_batch(0, 12)
    found["text"] = found["text"][[0, 1, 0, 2, 1, 0, *[2] * 6]]
    return found | shaped_texts(found["text"], CLIP)


@pytest.mark.parametrize("name", ["unicl", "clip", "multitask"])
def test_gradients_are_those_of_encoding_every_text(name, monkeypatch):
    gradients = []
    rows = []
    for once in (True, False):
        module = tiny.build(name).double()
        encoder = module.model.text.encoder
        encoder.register_forward_hook(
            lambda _m, _a, kw, _o: rows.append(len(kw["input_ids"])), with_kwargs=True
        )
        if not once:
            monkeypatch.setattr(type(module.model.text), "has_dropout", True)
        out = module({k: v.double() if v.is_floating_point() else v for k, v in batch().items()},
                     losses._gather.Gather())  # fmt: skip
        sum(v for k, v in out.items() if k.endswith("_loss") and v.ndim == 0).backward()
        gradients.append({k: p.grad for k, p in module.named_parameters() if p.grad is not None})
    assert rows == [8, 12]  # three distinct texts and five rows that nobody refers to
    for key, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][key], rtol=1e-4, atol=1e-6, msg=key)


def test_dropout_gives_equal_texts_masks_of_their_own():
    module = tiny.build()
    for config, expected in ((BERT, True), (BERT | WITHOUT_DROPOUT, False)):
        tower = HuggingFaceTower(TextConfig(name="hf", hf_config=config))
        assert tower.has_dropout == expected
        module.model.text = tower
        module.model.text_projection = torch.nn.Linear(16, 8, bias=False)
        ids = torch.tensor([[5, 6, 7]] * 4)
        texts = shaped_texts(ids[:, None], SimpleNamespace(pad_id=0, end_id=7))
        features = text_features(module.model.train(), texts)
        assert torch.equal(features[0], features[1]) != expected
        altered = text_features(module.model, ids)  # by a method: encoded as they are
        assert torch.equal(altered[0], altered[1]) != expected
        assert len(text_features(module.model.eval(), texts).unique(dim=0)) == 1


def towers():
    """A causal tower and a bidirectional one, and ids of both: padding 0, end 98."""
    shape = {"width": 32, "layers": 2, "heads": 4, "context_length": 24, "vocab_size": 99}
    yield TransformerTower(TextConfig(**shape))
    config = BERT | WITHOUT_DROPOUT | {"hidden_size": 32, "num_hidden_layers": 2}
    yield HuggingFaceTower(TextConfig(name="hf", hf_config=config, pooling="mean"))


@pytest.mark.parametrize("number", [0, 1])
def test_rows_and_columns_that_fill_up_change_nothing(number):
    """Rows to the last bit forward, and columns as far as products of other sizes round alike."""
    torch.manual_seed(3)
    tower = list(towers())[number].double().train()
    ids = torch.randint(2, 98, (21, 24))
    for row, length in enumerate(torch.randint(3, 14, (21,))):
        ids[row, length - 1 :] = 0
        ids[row, length - 1] = 98
    ids[0, :13], ids[0, 12], ids[0, 13:] = 5, 98, 0
    longest = 13
    assert longest < closed_length(longest, 24) < 24
    weights = torch.randn(21, 32, dtype=torch.float64)

    def run(rows, length):
        tower.zero_grad()
        features, states = tower(torch.cat([ids, ids[:1].expand(rows, -1)])[:, :length])
        features.retain_grad()
        states.retain_grad()
        (features[:21] * weights).sum().backward()
        for gradient in (features.grad, states.grad):
            assert gradient is None or not gradient[21:].any()  # exactly zero
        gradients = {name: p.grad.clone() for name, p in tower.named_parameters()}
        return features[:21].detach(), gradients

    exact, expected = run(0, longest)
    bound = 1e-14 * max(gradient.abs().max() for gradient in expected.values())
    for rows, length in ((3, longest), (0, 16), (3, 16), (3, 24)):
        features, gradients = run(rows, length)
        if length == longest:
            assert torch.equal(features, exact)
        torch.testing.assert_close(features, exact, rtol=0, atol=1e-14)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=bound, msg=name)
