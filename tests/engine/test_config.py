"""Configuration files, DeepSpeed files and the schedule: what is accepted, what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch

from engine import config, deepspeed_engine
from engine.schedule import learning_rate
from loaders.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart_unicl.yaml")


def test_base_override_and_interpolation():
    cfg = config.load(QUICKSTART, ["optim.lr=2e-3", "data.image_text='/d/{00000..00331}.tar'"])
    assert cfg.optim.lr == 2e-3
    assert cfg.data.image_text == "/d/{00000..00331}.tar"
    assert cfg.output_dir == "runs/quickstart/unicl"
    assert cfg.train.global_batch == 256


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "optim.weight_decai=1",
            "unknown key .optim.weight_decai.; the nearest is .optim.weight_decay.",
        ),
        ("optin.lr=1", "nearest is 'optim'"),
        ("train.global_batch=many", "train.global_batch"),
        ("model.image.sizes=3", "model.image.sizes.*size"),
        ("loss.keep=3", "keep_mib"),
        ("loss.name=unicle", "there are: .*unicl"),
        ("loss.name=declip", r"model\.text\.vocab_size=49409 .* not 49408, transformer, clip"),
        ("loss.name=pyramidclip", r"objects of images, for which the model needs model\.regions="),
        (
            "model.regions={width: 4}",
            r"model\.regions is of no use: loss\.name=unicl does not read",
        ),
        ("loss.name=zerovl", r"model\.text\.vocab_size=49408: word pieces are masked"),
        (
            "loss.name=filip",
            r"similarity=cosine: loss\.name=filip trains .* with model\.similarity=late, by which",
        ),
        (
            "model={similarity: late, token_dim: 8}",
            r"similarity=late: loss\.name=unicl trains .* with model\.similarity=cosine, by which",
        ),
        ("train.steps=5", "exactly one of epochs, samples, steps"),
        ("train.accumulation=0", "at least 1"),
        ("data.caption_labels=same", "one of unique, by_text"),
        ("data.label_merge=same", "one of disjoint, synset"),
        (
            "data.sampler=fair",
            "data.sampler='fair'; one of balanced, proportional, ratio, one_source",
        ),
        ("data.augmentation=papr", "one of unicl_release, paper, clip, clipart, none"),
        ("data.augmentation={image: papr}", r"data\.augmentation\.image='papr'; one of unicl_rel"),
        (
            "data.augmentation={weak: clip, strong: simclr}",
            r"data\.augmentation: there is no view weak, strong and image has no recipe; this "
            r"method's views are image: give each one its recipe as data\.augmentation\.NAME",
        ),
        (
            "data.caption.summary.from=[txt]",
            r"data\.caption: there is no view summary and text has",
        ),
        ("data.caption.text.from=[text]", r"data\.caption\.text\.from='text': give 'txt'"),
        (
            "data.caption.text.min_words=2",
            r"data\.caption\.text=\{'min_words': 2\}: a text view is",
        ),
        ("data.caption=null", "data.caption=None: give 'txt'"),
        ("data.augmentation=[clip]", "one of unicl_release, paper"),
        ("data.templates=clip80", "give one of clip_80, .*unicl_81, .*or a file that exists"),
        ("data.caption=json", "data.caption='json': give 'txt' or 'json.KEY'"),
        ("optim.schedule=linear", "one of cosine, constant"),
        ("seed=-1", "seed=-1 must be at least 0"),
        ("train.epoch_samples=0", "train.epoch_samples=0 must be at least 1"),
        ("data.max_bad_fraction=2", r"in \[0, 1\]"),
        ("lr", "key.sub=value"),
        ("recipe=mine", "one of paper, release_defaults, ours"),
        (
            "optim.lr=null",
            "quickstart_unicl.yaml: unicl: these keys are not decided:\n  optim.lr: peak",
        ),
        ("optim.warmup_steps=null", "optim.warmup_epochs or optim.warmup_steps"),
        ("optim.warmup_epochs=1", "exactly one of warmup_epochs, warmup_steps"),
        ("optim.warmup_steps=-1", "at least 0"),
        ("train.samples=0", "train.samples=0 must be positive"),
        ("model.image.size=null", "model.image.size: side"),
    ],
)
def test_wrong_values_are_refused_in_words(override, words):
    with pytest.raises(ConfigError, match=words):
        config.load(QUICKSTART, [override])


def test_all_open_keys_are_listed_at_once():
    """A model key that is absent has a default; a null is an open question."""
    nulls = ["recipe", "data.augmentation", "optim.betas", "train.samples"]
    with pytest.raises(ConfigError) as caught:
        config.load(QUICKSTART, [f"{key}=null" for key in nulls])
    listed = [line.split()[0].rstrip(":") for line in str(caught.value).splitlines()[1:-1]]
    assert listed == ["recipe", "data.augmentation", "train.epochs", "optim.betas"]
    assert config.load(QUICKSTART).recipe == "ours"


def test_circular_base_and_object_tags_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        config.load(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        config.load(tmp_path / "c.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_every_shipped_deepspeed_file_resolves(path):
    cfg = config.load(QUICKSTART)
    full = deepspeed_engine.resolve(
        deepspeed_engine.read_json(path), cfg, world_size=2, path=str(path)
    )
    assert full["train_batch_size"] == 256
    assert full["train_micro_batch_size_per_gpu"] == 128
    assert full["gradient_accumulation_steps"] == 1
    assert full["gradient_clipping"] == 5.0
    assert deepspeed_engine.precision(full) == (
        torch.float32 if "fp32" in path.stem else torch.bfloat16
    )
    assert "auto" not in json.dumps(full)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gradient_clipping": None}, "silently clip at 1.0"),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled"),
        ({"gradient_clipping": 1.0}, "contradicts"),
        ({"train_batch_size": 128}, "contradicts"),
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
    ],
)
def test_deepspeed_traps_are_refused(change, words):
    base = json.loads((ROOT / "ds_configs" / "zero1_fp32.json").read_text())
    merged = {k: v for k, v in {**base, **change}.items() if v is not None}
    with pytest.raises(ConfigError, match=words):
        deepspeed_engine.resolve(merged, config.load(QUICKSTART), world_size=2)


def test_batch_that_does_not_divide_is_refused():
    cfg = config.load(QUICKSTART, ["train.accumulation=5"])
    with pytest.raises(ConfigError, match="multiple of 15"):
        deepspeed_engine.resolve(
            deepspeed_engine.read_json(ROOT / "ds_configs/zero1_fp32.json"), cfg, world_size=3
        )


def test_stage_3_keeps_no_more_graphs_than_one():
    cfg = config.load(QUICKSTART, ["train.accumulation=2", "train.graph_memory_gb=1"])
    deepspeed_engine.resolve(
        deepspeed_engine.read_json(ROOT / "ds_configs/zero2_bf16.json"), cfg, world_size=2
    )
    with pytest.raises(ConfigError, match=r"zero3.*graph_memory_gb=1.*stage 0 to 2"):
        deepspeed_engine.resolve(
            deepspeed_engine.read_json(ROOT / "ds_configs/zero3_bf16.json"),
            cfg,
            2,
            "zero3_bf16.json",
        )


def test_zero_dimensional_parameter_is_refused():
    module = torch.nn.Module()
    module.logit_scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ConfigError, match="logit_scale"):
        deepspeed_engine.initialise(module, None, {}, torch.device("cpu"))


def test_linear_scaling_rule_of_the_release():
    """5e-4 per 512 images is 4e-3 at 4096."""
    cfg = config.load(
        QUICKSTART, ["optim.lr_batch=512", "optim.lr=5e-4", "train.global_batch=4096"]
    )
    assert math.isclose(config.learning_rates(cfg)["lr"], 4e-3)


def test_schedule():
    def rate(step, kind="cosine"):
        return learning_rate(step, 110, 10, lr=1.0, warmup_lr=0.0, min_lr=0.1, schedule=kind)

    assert [rate(s) for s in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert math.isclose(rate(60), 0.1 + 0.9 * 0.5)
    assert math.isclose(rate(110), 0.1)
    assert rate(60, "constant") == 1.0


def test_steps_from_epochs_samples_and_steps():
    base = ["train.samples=null", "train.global_batch=100", "optim.warmup_steps=null"]
    cfg = config.load(QUICKSTART, [*base, "train.epochs=2", "optim.warmup_epochs=0.5"])
    assert config.count_steps(cfg, epoch_samples=1050) == (21, 6)
    none = [*base[:2], "optim.warmup_steps=0"]
    cfg = config.load(QUICKSTART, [*none, "train.epochs=2", "train.epoch_samples=1000"])
    assert config.count_steps(cfg, epoch_samples=1050) == (20, 0)
    cfg = config.load(QUICKSTART, [*none, "train.steps=7"])
    assert config.count_steps(cfg, epoch_samples=1050) == (7, 0)
