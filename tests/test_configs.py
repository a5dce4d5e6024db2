"""The shipped configurations: names, heads, and which are refused for which reason."""

import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import models
from engine import build, config
from loaders.errors import ConfigError

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.yaml"))
PAPER = [path for path in FILES if not path.stem.startswith("quickstart_")]
MIXED = [path for path in PAPER if path.stem.endswith("_mixup_cutmix")]
# Of UniCL's table 2, with a recipe of ours that one GPU finishes.
ONE_GPU = [path for path in PAPER if path.stem.endswith(("resnet18_cifar10", "resnet50_cifar10"))]
CIFAR10 = {"cross_entropy": "supcon_weak", "supcon": "supcon", "unicl": "supcon_weak"}
OPEN = [path for path in PAPER if "cifar" in path.stem and path not in ONE_GPU]
# Not of UniCL's tables: other data and training values than in the papers of these methods.
TABLES = ("unicl_", "clip_", "cross_entropy_", "multitask_", "supcon_")
FAMILY = [path for path in PAPER if not path.stem.startswith(TABLES)]
READY = [path for path in FILES if path not in OPEN]


def names(path):
    """Test id of a file."""
    return path.stem


def listed(error):
    """The keys that a refusal names (of alternatives the first)."""
    return re.findall(r"^  ([a-z_.]+)", str(error), flags=re.MULTILINE)


# One value for every open key, as a person would decide them.
DECISIONS = [
    "recipe=ours", "model.image.size=32", "model.image.kwargs={}", "model.logit_scale_init=1.0",
    "data.augmentation=paper", "train.global_batch=1024", "train.epochs=200", "optim.lr=1e-3",
    "optim.warmup_lr=0", "optim.min_lr=0", "optim.betas=[0.9,0.98]", "optim.eps=1e-8",
    "optim.weight_decay=0.1", "optim.grad_clip_norm=0", "optim.schedule=cosine",
    "optim.warmup_steps=0",
]  # fmt: skip


def stated_recipe(path):
    """The recipe that a file or the nearest of its parents states."""
    content = yaml.safe_load(path.read_text())
    if "recipe" in content or "base" not in content:
        return content.get("recipe", "ours")
    return stated_recipe(path.parent / content["base"])


@pytest.mark.parametrize("path", READY, ids=names)
def test_configuration_loads(path):
    recipe = config.load(path).recipe
    if path in PAPER and path not in FAMILY:
        assert recipe == ("ours" if path in ONE_GPU else "release_defaults")
    assert recipe == stated_recipe(path)


@pytest.mark.parametrize("path", MIXED, ids=names)
def test_mixup_is_the_only_difference_and_for_methods_that_can(path):
    with pytest.raises(ConfigError, match=r"mixup_cutmix: this method cannot blend its targets"):
        config.load(path, ["loss.name=multitask"])
    cfg = config.load(path, ["data.augmentation=unicl_release"])
    other = config.load(path.with_name(path.name.replace("_mixup_cutmix", "")))
    assert {key for key in cfg if cfg[key] != other[key]} == {"name", "output_dir"}


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_the_methods_on_cifar10_differ_in_loss_and_views_alone(network):
    """SupContrast gives its two views more colour; cross-entropy and UniCL have the same one."""
    paths = [ROOT / f"configs/{name}_{network}_cifar10.yaml" for name in CIFAR10]
    assert sorted(paths) == [path for path in ONE_GPU if network in path.stem]
    found = {path: config.load(path) for path in paths}
    for cfg, (name, views) in zip(found.values(), CIFAR10.items(), strict=True):
        assert (cfg.loss.name, cfg.data.augmentation) == (name, views)
        cfg.loss, cfg.name, cfg.output_dir, cfg.data.augmentation = {}, "", "", ""
    assert len({OmegaConf.to_yaml(cfg) for cfg in found.values()}) == 1


@pytest.mark.parametrize("path", OPEN, ids=names)
def test_open_configuration_lists_all_its_keys_and_loads_once_they_are_decided(path):
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert listed(caught.value) == [
        {"optim.warmup_steps": "optim.warmup_epochs"}.get(key, key)
        for key in (decision.partition("=")[0] for decision in DECISIONS)
    ]
    assert "base: _base/release_defaults.yaml" in str(caught.value)
    assert config.load(path, DECISIONS).train.global_batch == 1024


@pytest.mark.parametrize("left_out", DECISIONS)
def test_each_open_key_is_needed(left_out):
    with pytest.raises(ConfigError) as caught:
        config.load(OPEN[0], [decision for decision in DECISIONS if decision != left_out])
    assert len(listed(caught.value)) == 1


def test_release_defaults_decide_what_the_paper_leaves_open(tmp_path):
    base = ROOT / "configs/_base/paper_unknown.yaml"
    with pytest.raises(ConfigError, match=r"train\.global_batch"):
        config.load(base)
    cfg = config.load(base.with_name("release_defaults.yaml"))
    assert cfg.recipe == "release_defaults"
    # microsoft/UniCL at 9983bf8, config.py: 5e-4 per 512 images.
    assert config.learning_rates(cfg)["lr"] == pytest.approx(4e-3)
    assert cfg.train.epochs == 32
    copy = (ROOT / "configs/unicl_resnet101_cifar10.yaml").read_text()
    advice = f"base: {ROOT}/configs/_base/release_defaults.yaml"
    (tmp_path / "copy.yaml").write_text(copy.replace("base: _base/paper_unknown.yaml", advice))
    with pytest.raises(ConfigError, match=r"model\.image\.size") as caught:
        config.load(tmp_path / "copy.yaml")
    assert "optim" not in str(caught.value)


def kinds():
    """One ready configuration for each method and each number of sources per side."""
    chosen = {}
    for path in PAPER:
        if path in READY:
            content = yaml.safe_load(path.read_text())
            sides = tuple(str(content["data"].get(side)) for side in ("image_label", "image_text"))
            counts = tuple(side.count("data/") for side in sides)
            chosen.setdefault((content["loss"]["name"], *counts), path)
    return list(chosen.values())


@pytest.mark.parametrize("path", kinds(), ids=names)
def test_data_model_and_method_fit_together(path, monkeypatch):
    """The dry run of train.py with a small model, on the shipped data."""
    monkeypatch.chdir(ROOT)
    shipped = {
        "image_label": ["emoji_train"],
        "image_text": ["openclipart_train", "openclipart_test"],
    }
    cfg = config.load(path)
    trunk = (
        "name: swin_tiny, size: 32, kwargs: {embed_dim: 16, depths: [1, 1], num_heads: [1, 2], "
        "window_size: 4, pretrained: false}"
    )
    if cfg.model.get("kind") == "one_tower":  # whose words go through the blocks of a ViT
        trunk = (
            "name: vit_tiny_patch16_224, size: 32, kwargs: {embed_dim: 16, depth: 1, num_heads: 2}"
        )
    changes = [
        "model.image.kwargs=null",
        f"model.image={{{trunk}}}",
        "model.text={name: transformer, hf_name: null, hf_config: null, tokenizer: clip, "
        "vocab_size: 49409, width: 16, layers: 1, heads: 2}",
        "model.embed_dim=8",
        "data.workers=0",
        "train={global_batch: 8, accumulation: 1, epochs: null, steps: 2}",
        "optim={warmup_epochs: null, warmup_steps: 1}",
    ]
    for side, sets in shipped.items():
        count = len(config.specs(cfg.data[side], side))
        names = ", ".join(f"data/quickstart/{name}" for name in sets[:count])
        changes += [f"data.{side}=[{names}]"] if count else []
    if cfg.model.get("regions"):  # nor have they objects, and the small model is no ViT
        changes += ["model.regions=null", "loss.objects=false"]
    if OmegaConf.is_dict(cfg.data.caption):  # the shipped data have captions and no annotations
        changes += [f"data.caption.{view}.from=txt" for view in cfg.data.caption]
    plan = build.plan(config.load(path, changes), world_size=2)
    assert plan.steps == 2
    first = next(iter(models.build(build.model_config(plan.cfg)).towers()))
    assert f"parameters: {first}" in build.describe_parts(plan)


@pytest.mark.parametrize("path", PAPER, ids=names)
def test_head_comment_and_name(path):
    text = path.read_text()
    head = "".join(re.findall(r"^# .*\n", text, flags=re.MULTILINE))
    assert text.startswith(head)
    assert re.search(rf"^# Command: .* configs/{path.name}$", head, flags=re.MULTILINE)
    assert re.search(r"^# Cost: ", head, flags=re.MULTILINE)
    assert re.search(r"^# Published: ", head, flags=re.MULTILINE)
    content = yaml.safe_load(text)
    assert content["name"] == path.stem
    # One rewrite a step is CLIP's loss; the method `laclip` takes all of them. CLIPPO and
    # RA-CLIP are models.
    names = {"clip": ("clip_", "clippo_", "laclip_", "raclip_")}.get(
        content["loss"]["name"], content["loss"]["name"] + "_"
    )
    assert path.stem.startswith(names)
    assert text.count("\n") < 25
