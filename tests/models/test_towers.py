import math

import pytest
import timm
import torch
from transformers import BertConfig, BertModel

from loaders.errors import ConfigError
from models.config import ImageConfig, TextConfig
from models.image_timm import TimmTower
from models.text_hf import _TAKE_WHOLE_MASKS, HuggingFaceTower
from models.text_transformer import TransformerTower, end_positions
from tests.models.reference import ReferenceText, random_captions


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("swin_tiny", 96, 9),
        ("resnet18", 64, 4),
        ("vit_tiny_patch16_224", 64, 17),
        ("focalnet_tiny_srf", 64, 4),
        ("mobilenetv3_small_050", 64, 4),
    ],
)
def test_pooled_features_are_timms(name, size, tokens):
    torch.manual_seed(0)
    tower = TimmTower(ImageConfig(name=name, size=size)).eval()
    timm_name = {"swin_tiny": "swin_tiny_patch4_window7_224"}.get(name, name)
    takes_size = "swin" in name or "vit" in name
    plain = timm.create_model(
        timm_name, num_classes=0, **({"img_size": size} if takes_size else {})
    )
    plain.load_state_dict(tower.trunk.state_dict(), strict=False)
    images = torch.randn(2, 3, size, size)
    images = images.contiguous(memory_format=torch.channels_last)  # the layout the tower uses
    with torch.no_grad():
        pooled, sequence = tower(images)
        torch.testing.assert_close(pooled, plain.eval()(images), rtol=0, atol=1e-6)
    assert sequence.shape[:2] == (2, tokens)
    if name in ("swin_tiny", "resnet18", "focalnet_tiny_srf"):
        torch.testing.assert_close(sequence.mean(dim=1), pooled, rtol=1e-4, atol=1e-5)


def test_feature_maps_are_flattened_row_by_row():
    tower = TimmTower(ImageConfig(name="resnet18", size=64)).eval()
    images = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        maps, sequence = tower.trunk.forward_features(images), tower(images)[1]
    assert torch.equal(sequence[0, 1], maps[0, :, 0, 1])  # second token: first row, second column


def test_stochastic_depth_of_the_presets():
    for name, rate in (("swin_tiny", 0.2), ("swin_base", 0.5)):
        with torch.device("meta"):
            tower = TimmTower(ImageConfig(name=name))
        assert tower.trunk.layers[-1].blocks[-1].drop_path2.drop_prob == pytest.approx(rate)


SHAPE = {"width": 64, "layers": 3, "heads": 4, "context_length": 24, "vocab_size": 200}


def text_pair():
    """Our tower and the plain reference with the same weights, in float64."""
    torch.manual_seed(0)
    tower, reference = TransformerTower(TextConfig(**SHAPE)), ReferenceText(**SHAPE)
    ours = tower.encoder
    for source, target in (
        (ours.embeddings.token_embedding.weight, reference.token_embedding.weight),
        (ours.embeddings.position_embedding.weight, reference.positional_embedding),
        *zip(ours.final_layer_norm.parameters(), reference.ln_final.parameters(), strict=True),
    ):
        target.data.copy_(source.data)
    for layer, block in zip(ours.encoder.layers, reference.resblocks, strict=True):
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        block.attn.in_proj_weight.data = torch.cat([part.weight.data for part in parts])
        block.attn.in_proj_bias.data = torch.cat([part.bias.data for part in parts])
        for one, other in (
            (attention.out_proj, block.attn.out_proj),
            (layer.mlp.fc1, block.mlp["c_fc"]),
            (layer.mlp.fc2, block.mlp["c_proj"]),
            (layer.layer_norm1, block.ln_1),
            (layer.layer_norm2, block.ln_2),
        ):
            other.load_state_dict(one.state_dict())
    return tower.eval(), reference.eval()


@pytest.mark.parametrize("pad_id", [0, 199])
def test_text_tower_equals_the_uncut_reference(pad_id):
    """Padding with 0 (OpenAI) and with the end token (Hugging Face) give the same state."""
    tower, reference = text_pair()
    ids = random_captions(5, 24, 200, pad_id, torch.Generator().manual_seed(2))
    pooled, states = tower(ids)
    assert states.shape[1] < 24
    torch.testing.assert_close(pooled, reference(ids), rtol=0, atol=2e-6)


def test_cutting_the_batch_changes_neither_values_nor_gradients():
    tower, _ = text_pair()
    ids = random_captions(5, 24, 200, 0, torch.Generator().manual_seed(3))
    weights = torch.randn(5, 64)

    def run(pooled):
        tower.zero_grad()
        (pooled * weights).sum().backward()
        return pooled.detach(), {n: p.grad.clone() for n, p in tower.named_parameters()}

    ends = ids.argmax(dim=1)
    cut, cut_gradients = run(tower(ids)[0])
    states = tower.encoder(input_ids=ids).last_hidden_state  # all 24 positions
    whole, whole_gradients = run(states[torch.arange(5), ends])
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-6)
    largest = max(gradient.abs().max().item() for gradient in whole_gradients.values())
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(cut_gradients[name], gradient, rtol=0, atol=1e-6 * largest)


def test_a_text_ends_at_its_first_end_token():
    mask_id, end = 60, 50
    ids = torch.tensor([
        [49, 7, 8, end, 0, 0],  # padding 0
        [49, 7, end, end, end, end],  # padding with the end token
        [49, 7, end, mask_id, 0, 0],  # something larger behind the end
        [49, mask_id, 8, 9, end, end],  # and before it
        [49, 7, 8, 9, 3, 2],  # no end: the largest id, as the releases have it
    ])  # fmt: skip
    assert end_positions(ids, end).tolist() == [3, 2, 2, 4, 0]
    assert end_positions(ids).tolist() == [3, 2, 3, 1, 0]


def test_features_do_not_depend_on_a_mask_token_behind_the_end():
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": 49409}
    tower = TransformerTower(TextConfig(**shape))
    assert (tower.encoder.config.bos_token_id, tower.encoder.config.eos_token_id) == (49406, 49407)
    ids = torch.tensor([[49406, 320, 512, 49407, 0, 0], [49406, 320, 49407, 0, 0, 0]])
    pooled, states = tower.train()(ids)
    assert states.shape == (2, 6, 64)
    assert tower.mask(ids).tolist() == [[True] * 4 + [False] * 2, [True] * 3 + [False] * 3]
    behind = ids.clone()
    behind[:, 4] = 49408
    assert torch.equal(tower(behind)[0], pooled)
    assert torch.equal(tower.mask(behind), tower.mask(ids))
    # transformers finds the end as well, which an export relies on.
    assert torch.equal(tower.encoder(input_ids=ids).pooler_output, pooled)
    short, states = tower.eval()(ids)
    assert states.shape == (2, 4, 64)
    torch.testing.assert_close(short, pooled, rtol=0, atol=1e-6)


def test_text_initialisation_is_the_releases():
    width = 256
    torch.manual_seed(0)
    tower = TransformerTower(TextConfig(width=width, layers=2, heads=4, vocab_size=1000))
    reference = torch.nn.MultiheadAttention(width, 4)  # xavier on the fused (3w, w) matrix
    layer = tower.encoder.encoder.layers[1]
    bound = math.sqrt(6 / (4 * width))
    for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        assert projection.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        assert projection.weight.abs().max() <= bound
        assert projection.weight.std().item() == pytest.approx(
            reference.in_proj_weight.std().item(), rel=0.02
        )
        assert not projection.bias.any()
    embeddings = tower.encoder.embeddings
    for weight in (
        embeddings.token_embedding.weight,
        embeddings.position_embedding.weight,
        layer.self_attn.out_proj.weight,
        layer.mlp.fc1.weight,
        layer.mlp.fc2.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not layer.mlp.fc1.bias.any()
    assert layer.layer_norm1.eps == 1e-12


BERT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
}
BERT_IDS = torch.tensor([[2, 7, 9, 3, 0, 0, 0, 0], [2, 8, 11, 12, 5, 3, 0, 0]])


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    BertModel(BertConfig(**BERT)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_hugging_face_tower_from_a_folder(bert_folder, pooling, capsys):
    tower = HuggingFaceTower(TextConfig(name="hf", hf_name=bert_folder, pooling=pooling)).eval()
    assert "\r" not in capsys.readouterr().err, "not on a terminal"
    plain = BertModel.from_pretrained(bert_folder).eval()
    pooled, states = tower(BERT_IDS)
    assert tower.width == 32
    assert states.shape == (2, 6, 32)
    for row, length in enumerate((4, 6)):  # one caption at a time, without any padding
        alone = plain(input_ids=BERT_IDS[row : row + 1, :length]).last_hidden_state[0]
        wanted = alone[0] if pooling == "first" else alone.mean(dim=0)
        torch.testing.assert_close(pooled[row], wanted, rtol=0, atol=1e-5)
    pooled.sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())


@pytest.mark.parametrize("kind", _TAKE_WHOLE_MASKS)
def test_encoders_given_a_whole_mask_encode_as_with_a_plain_one(kind):
    sizes = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "embedding_size": 32}
    rates = ("attention_dropout", "dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")
    config = {"model_type": kind, **BERT, **sizes, **dict.fromkeys(rates, 0.0), "pad_token_id": 0}
    tower = HuggingFaceTower(TextConfig(name="hf", hf_config=config, pooling="mean")).train()
    pooled, states = tower(BERT_IDS)
    assert states.shape == (2, 8, 32)  # nothing is cut in training
    plain = tower.encoder(input_ids=BERT_IDS, attention_mask=(BERT_IDS != 0).long())
    torch.testing.assert_close(states, plain.last_hidden_state, rtol=0, atol=1e-6)
    alone, _ = tower(BERT_IDS[:1, :4])
    torch.testing.assert_close(pooled[:1], alone, rtol=0, atol=1e-6)


def test_hugging_face_tower_from_scratch(bert_folder):
    config = {"model_type": "bert", **BERT}
    assert HuggingFaceTower(TextConfig(name="hf", hf_config=config)).width == 32
    fresh = HuggingFaceTower(TextConfig(name="hf", hf_name=bert_folder, pretrained=False))
    stored = BertModel.from_pretrained(bert_folder).embeddings.word_embeddings.weight
    assert not torch.equal(fresh.encoder.embeddings.word_embeddings.weight, stored)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hf_config": {"model_type": "no_such_type"}}, "cannot be read"),
        ({"hf_name": "/no/such/folder"}, "cannot be read"),
        ({"hf_config": {"model_type": "t5"}}, "encoder-decoder"),
        ({"hf_config": {"model_type": "gpt2"}}, "no pad_token_id"),
    ],
)
def test_unusable_hugging_face_encoders(settings, message):
    with pytest.raises(ConfigError, match=message):
        HuggingFaceTower(TextConfig(name="hf", **settings))
