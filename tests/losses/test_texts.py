"""Equal texts of a micro-batch are encoded once, and the gradient is that of encoding each."""

import pytest
import torch

import losses
from losses._method import text_features
from models.config import TextConfig
from models.text_hf import HuggingFaceTower
from tests.engine import tiny

BERT = {"model_type": "bert", "vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip


def batch():
    found = tiny.make_batch(0, 6)
    found["text"] = found["text"][[0, 1, 0, 2, 1, 0]]
    return found


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
    assert rows == [3, 6]
    for key, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][key], rtol=1e-4, atol=1e-6, msg=key)


def test_dropout_gives_equal_texts_masks_of_their_own():
    module = tiny.build()
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for config, expected in ((BERT, True), ({**BERT, **without}, False)):
        tower = HuggingFaceTower(TextConfig(name="hf", hf_config=config))
        assert tower.has_dropout == expected
        module.model.text = tower
        module.model.text_projection = torch.nn.Linear(16, 8, bias=False)
        ids = torch.tensor([[5, 6, 7]] * 4)
        features = text_features(module.model.train(), ids)
        assert torch.equal(features[0], features[1]) != expected
        assert len(text_features(module.model.eval(), ids).unique(dim=0)) == 1
