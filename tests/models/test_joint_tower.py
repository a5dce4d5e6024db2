"""The tower that reads images, texts and both: its tokens, and what padding and masks hide."""

import math

import pytest
import timm
import torch
from torch.nn import functional as F

import models
from loaders.errors import ConfigError
from models import weights
from models.config import ModelConfig
from models.export import export
from tests.engine import run_folder

IMAGE = {
    "name": "vit_tiny_patch16_224", "size": 32,
    "kwargs": {"depth": 2, "embed_dim": 32, "num_heads": 2},
}  # fmt: skip
TEXT = {"width": 32, "layers": 2, "heads": 2, "context_length": 12, "vocab_size": 49409}
MODEL = {"kind": "one_tower", "image": IMAGE, "text": TEXT, "embed_dim": 8}
START, END = 49406, 49407
LENGTHS = (12, 4, 2, 7)


def build(**settings):
    """A model in float64 whose every weight matters, in training mode."""
    return run_folder.randomize(models.build({**MODEL, **settings})).double().train()


def inputs():
    """Four images and texts of LENGTHS, padded with 0."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(len(LENGTHS), 3, 32, 32, generator=generator).double()
    ids = torch.randint(1, START, (len(LENGTHS), 12), generator=generator)
    for row, length in enumerate(LENGTHS):
        ids[row, length - 1 :] = 0
        ids[row, length - 1] = END
    ids[:, 0] = START
    return images, ids


def close(ours, theirs, tolerance=1e-6):
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance)


def blocks(model, tokens):
    """States by the blocks alone, one after the other, without any mask."""
    return model.transformer.norm(model.transformer.blocks(tokens))


def test_images_go_through_timms_vit_without_its_class_token():
    model = build().eval()
    plain = timm.create_model(
        IMAGE["name"], img_size=32, num_classes=0, class_token=False, global_pool="avg",
        fc_norm=False, **IMAGE["kwargs"],
    ).double().eval()  # fmt: skip
    state = {
        name.removeprefix("transformer.").replace("patches.embed", "patch_embed"): value
        for name, value in model.state_dict().items()
        if name.startswith(("transformer.", "patches.embed"))
    }
    plain.load_state_dict({**state, "pos_embed": model.patches.positions.data})
    encoded = model.encode_image(inputs()[0])
    close(encoded["pooled"], plain(inputs()[0]))
    close(encoded["tokens"], plain.forward_features(inputs()[0]))
    close(encoded["projected"], encoded["pooled"] @ model.projection.weight.T)
    close(encoded["feature"], F.normalize(encoded["projected"], dim=1))
    assert encoded["feature"].dtype == torch.float32


def test_positions_of_the_trunk_are_kept_without_those_of_other_tokens():
    torch.manual_seed(0)
    plain = timm.create_model(IMAGE["name"], img_size=32, num_classes=0, **IMAGE["kwargs"])
    torch.manual_seed(0)
    model = models.build(MODEL)
    assert torch.equal(model.patches.positions, plain.pos_embed[:, 1:])


def test_texts_and_pairs_are_encoded_as_each_would_be_alone_without_padding():
    model = build()
    images, ids = inputs()
    text, pair = model.encode_text(ids), model.encode_pair(images, ids)
    words = model.words.embed.weight[ids] + model.words.positions.weight
    for row, length in enumerate(LENGTHS):
        alone = blocks(model, words[row : row + 1, :length])[0]
        close(text["tokens"][row, :length], alone)
        close(text["pooled"][row], alone.mean(0))
        close(text["feature"][row], F.normalize(model.projection(alone.mean(0)), dim=0))
        assert text["mask"][row].tolist() == [True] * length + [False] * (12 - length)
        patches = model.patches(images[row : row + 1])
        states = blocks(model, torch.cat([patches, words[row : row + 1, :length]], 1))[0]
        close(pair["image_tokens"][row], states[:4])
        close(pair["text_tokens"][row, :length], states[4:])
        for name, part in (("image", states[:4]), ("text", states[4:]), ("both", states)):
            close(pair[name][row], F.normalize(model.projection(part.mean(0)), dim=0))
    assert torch.equal(pair["mask"], text["mask"])


def test_padding_changes_nothing():
    model = build(text={**TEXT, "context_length": 40})
    images, ids = inputs()
    longer = F.pad(ids, (0, 9))
    longer[:, 12:] = END  # Hugging Face's padding
    for name, value in model.encode_pair(images, ids).items():
        if name in ("image", "text", "both", "image_tokens"):
            close(model.encode_pair(images, longer)[name], value, 1e-12)
    feature = model.encode_text(ids)["feature"]
    close(model.encode_text(longer)["feature"], feature, 1e-12)
    cut = model.eval().encode_text(longer)
    close(cut["feature"], feature, 1e-12)
    assert cut["tokens"].shape == (4, 12, 32)


def test_a_mask_id_behind_the_end_is_a_word():
    model = build()
    ids = inputs()[1]
    masked = ids.masked_fill((ids > 0) & (torch.arange(12) == 1), 49408)
    masked[2] = ids[2]  # start and end alone
    assert torch.equal(model.text_mask(masked), model.text_mask(ids))


def test_without_attention_across_modalities_an_image_given_a_text_is_the_image():
    model = build()
    images, ids = inputs()
    kinds = torch.arange(16) < 4
    seen = F.pad(model.text_mask(ids), (4, 0), value=True)
    apart = (kinds[:, None] == kinds) & seen[:, None]
    tokens = torch.cat([model.patches(images), model.words(ids)], 1)
    states = model.transformer(tokens, apart)
    close(states[:, :4], model.encode_image(images)["tokens"], 1e-12)
    mask = model.text_mask(ids)
    close(states[:, 4:][mask], model.encode_text(ids)["tokens"][mask], 1e-12)
    pair = model.encode_pair(images, ids)
    assert (pair["image"] - model.encode_image(images)["feature"]).abs().max() > 0.05
    close(model.transformer(tokens, seen)[:, :4], pair["image_tokens"], 1e-12)


def test_all_tokens_are_the_mean_of_both_by_their_numbers(monkeypatch):
    """Four patches with the state (1, 0) and two words with (0, 1): (2/3, 1/3)."""
    model = build(embed_dim=32)
    torch.nn.init.eye_(model.projection.weight)
    monkeypatch.setattr(
        model.transformer, "forward",
        lambda tokens, mask: torch.eye(2, 32).double()[[0] * 4 + [1] * 12].expand(4, 16, 32),
    )  # fmt: skip
    both = model.encode_pair(*inputs())["both"][2]  # two words
    close(both[:2], F.normalize(torch.tensor([2.0, 1.0]), dim=0))


def test_two_projections_differ_in_the_last_layer_alone():
    torch.manual_seed(3)
    shared = models.build(MODEL).double()
    torch.manual_seed(3)
    apart = models.build({**MODEL, "two_projections": True}).double()
    sizes = [sum(p.numel() for p in model.parameters()) for model in (shared, apart)]
    assert sizes[1] - sizes[0] == shared.projection.weight.numel() == 8 * 32
    ours, theirs = shared.state_dict(), apart.state_dict()
    assert theirs.keys() - ours.keys() == {"image_projection.weight", "text_projection.weight"}
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() & theirs.keys())
    images, ids = inputs()
    pair = apart.encode_pair(images, ids)
    for row, length in enumerate(LENGTHS):
        each = [
            apart.image_projection(pair["image_tokens"][row]),
            apart.text_projection(pair["text_tokens"][row, :length]),
        ]
        for name, part in zip(("image", "text", "both"), (*each, torch.cat(each)), strict=True):
            close(pair[name][row], F.normalize(part.mean(0), dim=0))
    image, text = apart.encode_image(images), apart.encode_text(ids)
    close(image["projected"], apart.image_projection(image["pooled"]))
    close(text["projected"], apart.text_projection(text["pooled"]))


def test_every_parameter_gets_a_gradient_and_its_module_is_called():
    """ZeRO-3 gathers a module's own parameters in hooks on its call."""
    model, called = models.build(MODEL), set()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    images, ids = inputs()
    image, text, scale = model(images.float(), ids)
    (scale * (image @ text.T)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()} - {""}
    assert owners <= called
    assert [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.ndim == 0] == []
    listed = model.no_weight_decay()
    assert listed == {"logit_scale", "patches.positions", "words.positions.weight"}
    assert listed <= dict(model.named_parameters()).keys()


def test_gradient_checkpointing_changes_no_gradient():
    def gradients(enable):
        torch.manual_seed(1)
        kwargs = {**IMAGE["kwargs"], "drop_path_rate": 0.5}
        model = build(image={**IMAGE, "kwargs": kwargs})
        assert model.text_has_dropout
        model.set_grad_checkpointing(enable)
        recomputed = []
        model.transformer.blocks[0].mlp.register_forward_pre_hook(lambda *_: recomputed.append(1))
        torch.manual_seed(7)
        pair = model.encode_pair(*inputs())
        (pair["both"] @ pair["image"].T).square().sum().backward()
        assert len(recomputed) == 1 + enable
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-8)
    assert not build().text_has_dropout


def test_bfloat16_weights():
    images, ids = inputs()
    single = build().float()
    half = build().to(torch.bfloat16)
    for name in ("image", "text", "both"):
        ours, theirs = (model.encode_pair(images, ids)[name] for model in (half, single))
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image": {"name": "resnet18", "size": 32}}, "no VisionTransformer of timm"),
        ({"image": {**IMAGE, "kwargs": {"dynamic_img_size": True}}}, "a fixed image size"),
        ({"image": {**IMAGE, "kwargs": {"global_pool": "avg"}}}, "a norm behind its blocks"),
        ({"image": {**IMAGE, "kwargs": {"patch_drop_rate": 0.5}}}, "all of its patches"),
        ({"image": {**IMAGE, "kwargs": {"pos_embed": "none"}}}, "learnt positions"),
        ({"text": {**TEXT, "layers": 3}}, "give model.text.layers=2, theirs"),
        ({"text": {**TEXT, "heads": 4}}, "give model.text.heads=2, theirs"),
        ({"text": {**TEXT, "width": 64}}, "give model.text.width=32, theirs"),
        ({"text": {**TEXT, "tokenizer": "bert-base-uncased"}}, "model.text.tokenizer=clip"),
        ({"text": {"name": "hf", "hf_name": "x"}}, "does not go with model.text.name=hf"),
        ({"kind": "two_tower", "two_projections": True}, "two towers have a projection each"),
    ],
)
def test_what_cannot_be_built_is_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        models.build({**MODEL, **settings})


@pytest.mark.parametrize("two", [False, True])
@torch.no_grad()
def test_saved_exported_and_loaded(two, tmp_path):
    changes = {"kind": "one_tower", "two_projections": two}
    model = run_folder.write(tmp_path / "run", "vit", TEXT, **changes)
    images, ids = inputs()
    expected = model.encode_pair(images, ids)["both"]
    export(tmp_path / "run", "pt", tmp_path / "pt")
    export(tmp_path / "run", "safetensors", tmp_path / "st")
    # What `zero_to_fp32.py` makes of a checkpoint, with the run's configuration beside it.
    joined = tmp_path / "joined"
    joined.mkdir()
    state = {f"module.model.{name}": value for name, value in model.state_dict().items()}
    torch.save({**state, "module.method.head.weight": torch.ones(2)}, joined / "model.pth")
    (joined / "config.yaml").write_bytes((tmp_path / "run" / "config.yaml").read_bytes())
    for path in ("run", "pt/run.pt", "st", "joined/model.pth"):
        loaded = weights.load(tmp_path / path).model
        assert torch.equal(loaded.encode_pair(images, ids)["both"], expected), path
        assert loaded.cfg.two_projections == two
    for name in ("open_clip", "hf", "timm"):
        with pytest.raises(ConfigError, match=r"cannot express model\.kind=one_tower"):
            export(tmp_path / "run", name, tmp_path / name)
        assert not (tmp_path / name).exists()


def test_what_a_paper_sized_tower_counts():
    """ViT-B/16 without class token (768) and its position (768), words, positions, projection."""
    text = {"width": 768, "layers": 12, "heads": 12, "vocab_size": 49409}
    image = {"name": "vit_base_patch16"}
    with torch.device("meta"):
        cfg = ModelConfig.from_dict({**MODEL, "image": image, "text": text, "embed_dim": 512})
        model = models.build(cfg)
    sizes = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.towers().items()
    }
    vit = 85_798_656  # of timm, without its classifier
    assert sizes["patches"] + sizes["their tower"] == vit - 2 * 768
    assert sizes["words"] == (49_409 + 77) * 768
    assert sum(p.numel() for p in model.parameters()) == sum(sizes.values()) + 768 * 512 + 1
    assert math.prod(model.patches.positions.shape) == 196 * 768
