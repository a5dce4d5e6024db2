"""Objects through the last blocks of a ViT: what reaches the feature, and what does not."""

import pytest
import torch

import models
from loaders.errors import ConfigError
from models.config import ModelConfig
from models.regions import RegionPath
from tests.engine import run_folder

VIT = {"name": "vit_tiny_patch16_224", "size": 32,
       "kwargs": {"patch_size": 8, "depth": 4, "embed_dim": 32, "num_heads": 2}}  # fmt: skip
TEXT = {"width": 32, "layers": 1, "heads": 2}
SHAPE = {"width": 6, "count": 5, "blocks": 2}


def build(image=VIT, regions=SHAPE, dtype=torch.float32):
    torch.manual_seed(0)
    settings = {"image": image, "text": TEXT, "embed_dim": 24, "regions": regions}
    return run_folder.randomize(models.build(settings)).to(dtype)


def objects(seed=1, dtype=torch.float32):
    torch.manual_seed(seed)
    mask = torch.arange(5) < torch.tensor([[0], [1], [3], [5]])
    return torch.randn(4, 5, 6, dtype=dtype), mask


def by_hand(model, regions, depth):
    """Feature of one image from its regions (r, W) alone, without a mask, in plain operations."""
    trunk, path = model.image.trunk, model.regions
    tokens = torch.cat([trunk.cls_token[0], regions @ path.projection.weight.T])[None]
    tokens = torch.nn.functional.layer_norm(tokens, (32,), path.norm.weight, path.norm.bias)
    for block in list(trunk.blocks)[len(trunk.blocks) - depth :]:
        tokens = block(tokens)
    pooled = trunk.norm(tokens)[:, 0] @ model.image_projection.weight.T
    return pooled[0] / pooled[0].norm()


@pytest.mark.parametrize("image", [VIT, {**VIT, "name": "vit_base_patch32_clip_224"}],
                         ids=["plain", "norm before the blocks"])  # fmt: skip
@torch.no_grad()
def test_a_feature_is_that_of_the_image_s_own_regions(image):
    """Of none to all: as if each image had been encoded alone and without any filling."""
    model = build(image, dtype=torch.float64)
    values, mask = objects(dtype=torch.float64)
    found = model.encode_regions(values, mask)["feature"]
    for row, number in enumerate((0, 1, 3, 5)):
        expected = by_hand(model, values[row, :number], SHAPE["blocks"])
        torch.testing.assert_close(found[row].double(), expected, rtol=0, atol=1e-6)
    assert (found.norm(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_what_is_masked_does_not_matter(fused):
    model = build()
    for block in model.image.trunk.blocks:
        block.attn.fused_attn = fused
    values, mask = objects()
    other = torch.where(mask[..., None], values, 1e3 * torch.randn(4, 5, 6))
    one, two = (model.encode_regions(each, mask)["feature"] for each in (values, other))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    all_seen = model.encode_regions(values, torch.ones_like(mask))["feature"]
    changed = (one - all_seen).abs().amax(1)
    assert changed[:3].min() > 1e-3
    assert changed[3] < 1e-6


@torch.no_grad()
def test_the_order_of_regions_does_not_matter():
    """They have no positions."""
    model, (values, mask) = build(), objects()
    turned = values.clone()
    turned[2, :3], turned[3] = values[2, [1, 2, 0]], values[3].flip(0)
    found = [model.encode_regions(each, mask)["feature"] for each in (values, turned)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_only_the_last_blocks_and_the_path_itself_get_gradients():
    model, (values, mask) = build().train(), objects()
    values.requires_grad_()
    model.encode_regions(values, mask)["feature"][:, 0].sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    blocks = {name.split(".")[3] for name in moved if name.startswith("image.trunk.blocks")}
    assert blocks == {"2", "3"}
    others = {name for name in moved if ".blocks." not in name}
    assert others == {
        "image.trunk.cls_token", "image.trunk.norm.weight", "image.trunk.norm.bias",
        "image_projection.weight", "regions.projection.weight", "regions.norm.weight",
        "regions.norm.bias",
    }  # fmt: skip
    assert not values.grad[~mask].any()
    assert values.grad[mask].abs().amax(-1).min() > 0


@torch.no_grad()
def test_images_are_encoded_as_without_the_path():
    images = torch.randn(2, 3, 32, 32)
    plain, other = build(regions=None), build()
    weights = {name: value for name, value in other.state_dict().items() if "regions" not in name}
    plain.load_state_dict(weights)
    expected, found = (model.encode_image(images) for model in (plain, other))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("image", "regions", "words"),
    [
        (run_folder.IMAGES["swin"], {},
         r"'swin_tiny' is not; there are vit_base_patch16,.*model\.regions=null"),
        ({"name": "test_resnet", "size": 48}, {}, "ViT with a class token"),
        ({**VIT, "kwargs": {**VIT["kwargs"], "global_pool": "avg"}}, {}, "ViT with a class token"),
        ({"name": "test_vit3", "size": 32}, {}, "ViT with a class token"),
        (VIT, {"blocks": 5}, r"blocks=5: image tower 'vit_tiny_patch16_224' has 4 blocks"),
        (VIT, {"blocks": 0}, r"model\.regions\.blocks must be a positive integer"),
        (VIT, {"widht": 4}, r"unknown key 'model\.regions\.widht': did you mean 'width'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(image, regions, words):
    with pytest.raises(ConfigError, match=words):
        models.build({"image": image, "text": TEXT, "embed_dim": 24, "regions": regions})


def test_defaults_are_published():
    regions = ModelConfig.from_dict({"regions": {}}).regions
    assert (regions.width, regions.count, regions.blocks) == (2052, 10, 3)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch32_clip_224"])
def test_the_gradient_of_the_class_token_is_no_larger_than_that_of_the_rest(name):
    """timm starts it at 1e-6, from where two LayerNorms would multiply its gradient by 1e5."""
    torch.manual_seed(0)
    settings = {"image": {**VIT, "name": name}, "text": TEXT, "embed_dim": 24, "regions": SHAPE}
    model, (values, mask) = models.build(settings), objects()
    model.encode_regions(values, mask)["feature"][:, 0].sum().backward()
    sizes = {n: p.grad.norm() for n, p in model.named_parameters() if p.grad is not None}
    token = sizes.pop("image.trunk.cls_token")
    assert token < 10 * max(sizes.values())


def test_a_class_token_that_was_trained_is_kept():
    trunk = build().image.trunk
    before = trunk.cls_token.detach().clone()
    RegionPath(ModelConfig.from_dict({"image": VIT, "regions": SHAPE}), trunk)
    assert torch.equal(trunk.cls_token, before)
