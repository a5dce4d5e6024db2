"""Texts keep their characters, `~` is the home folder, and relative paths are found."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import train
from engine import build, config
from loaders.errors import ConfigError, DataError
from tests.loaders.conftest import sample, write_tar

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = ROOT / "configs" / "quickstart_unicl.yaml"

AS_TYPED = [
    ("name=007", "007"),
    ("name=1e3", "1e3"),
    ("name=on", "on"),
    ("name=null", "null"),
    ("name=2024-11-27", "2024-11-27"),
    ("name=12:30", "12:30"),
    ("output_dir=20241127_123200", "20241127_123200"),
    ("output_dir=runs/my run #1", "runs/my run #1"),
    ('output_dir=/d/{a}: [b], it\'s "c" lr=1 ', '/d/{a}: [b], it\'s "c" lr=1 '),
    ("output_dir=[a]", "[a]"),
    ("output_dir='/d/a #1'", "/d/a #1"),  # a pair of quotes is taken off, as YAML does
    ("data.image_text=/d/a #1/{00000..00003}.tar", "/d/a #1/{00000..00003}.tar"),
    ("data.image_text=/d/a: b/*.tar::/d/[cd].tar", "/d/a: b/*.tar::/d/[cd].tar"),
    ("data.image_text=null", None),
    ("data.image_text=", None),
    (
        "data.image_text=[/d/a #1/{0,1}.tar, '/d/b, c', 007, it's/*.tar]",
        ["/d/a #1/{0,1}.tar", "/d/b, c", "007", "it's/*.tar"],
    ),
    ("data.caption=json.1e3", "json.1e3"),
    ("evals.tasks.knn=[007, cifar-10]", ["007", "cifar-10"]),
    ("model.text.tokenizer=/d/a #1", "/d/a #1"),
    ("model.text.tokenizer=007", "007"),
    ("model.image.kwargs.checkpoint_path=/d/a #1/x.pth", "/d/a #1/x.pth"),
    ("model.image.kwargs.stem_width=24", 24),
    ("loss={name: align, directions: mean}", {"name": "align", "directions": "mean"}),
    ("seed=7", 7),
]


@pytest.mark.parametrize(("override", "value"), AS_TYPED, ids=[text for text, _ in AS_TYPED])
def test_a_typed_text_keeps_its_characters(override, value, tmp_path):
    cfg = config.load(QUICKSTART, [override])
    key = override.partition("=")[0]
    found = OmegaConf.select(cfg, key)
    assert (OmegaConf.to_object(found) if OmegaConf.is_config(found) else found) == value
    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for part in key.split("."):
        saved = saved[part]
    assert saved == value
    again = OmegaConf.select(config.load(tmp_path / "config.yaml"), key)
    assert again == found


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("output_dir=", "output_dir= is empty"),
        ("name=a\x1b[31m", "control characters"),
        ("loss.name=007", "loss.name='007' is unknown"),
        ("model.text.pooling=1e3", "got '1e3'"),
        ("loss={name: align, directions: 1e3}", "loss.directions is a text, and YAML reads 1e3"),
        ("model.text={tokenizer: 007}", "model.text.tokenizer is a text"),
        ("loss={name: align, directions: '1e3'}", "loss.directions='1e3' is not one of"),
        ("log.report_to=[wandb #1]", "'wandb #1' is not one of"),
    ],
)
def test_what_is_refused_is_shown_as_it_was_typed(override, words):
    with pytest.raises(ConfigError, match=words):
        config.load(QUICKSTART, [override])


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("name: 7", "name", "7"),
        ("name: '007'", "name", "007"),
        ("name: 2024-11-27", "name", "2024-11-27"),
        ("model: {text: {tokenizer: 7}}", "model.text.tokenizer", "7"),
        ("recipe: null", "recipe", None),
    ],
)
def test_a_text_of_a_file(line, key, value, tmp_path):
    (tmp_path / "own.yaml").write_text(f"base: {QUICKSTART}\n{line}\n")
    if value is None:
        with pytest.raises(ConfigError, match="recipe: whose"):
            config.load(tmp_path / "own.yaml")
    else:
        assert OmegaConf.select(config.load(tmp_path / "own.yaml"), key) == value


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("name: 007", "name is a text, and YAML reads 007 as 7; write it in quotes: '007'"),
        ("output_dir: 20241127_123200", "20241127_123200 as 20241127123200"),
        ("name: 12:30", "12:30 as 750"),
        ("name: on", "on as True"),
        ("model: {text: {tokenizer: 1e3}}", "model.text.tokenizer is a text"),
        ("loss: {name: align, directions: 0x10}", "loss.directions is a text"),
        ("data: {image_text: [007]}", "data.image_text is a text"),
    ],
)
def test_a_text_of_a_file_that_yaml_would_change_is_refused(line, words, tmp_path):
    (tmp_path / "own.yaml").write_text(f"base: {QUICKSTART}\n{line}\n")
    with pytest.raises(ConfigError, match=rf"own\.yaml: .*{words}"):
        config.load(tmp_path / "own.yaml")


def test_the_flags_are_read_as_the_keys_are(monkeypatch):
    command = ["train.py", "--config", str(QUICKSTART), "--dry-run"]
    for flags, words in (
        (["--output-dir", ""], "output_dir= is empty"),
        (["--output-dir", "s3://b/my run #1_0"], "output_dir=s3://b/my run #1_0: nothing is"),
        (["--deepspeed_config", "a #1.json"], "deepspeed=a #1.json: "),
    ):
        monkeypatch.setattr(sys, "argv", [*command, *flags])
        with pytest.raises(ConfigError, match=words):
            train.main()


def test_home_folder_at_the_start_of_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d.json").write_text((ROOT / "ds_configs/zero1_fp32.json").read_text())
    (tmp_path / "t.json").write_text('["a {}"]')
    (tmp_path / "base.yaml").write_text(f"base: {QUICKSTART}\noutput_dir: ~/runs/${{name}}\n")
    (tmp_path / "own.yaml").write_text("base: ~/base.yaml\n")
    typed = ["deepspeed=~/d.json", "data.templates=~/t.json", "data.image_label=~/a::/b::~/c"]
    typed += ["data.image_text=[~/d, e/~f]", "model.text.tokenizer=~/t"]
    typed += ["model.image.kwargs.checkpoint_path=~/w.pth"]
    cfg = config.load("~/own.yaml", typed)
    assert cfg.output_dir == f"{tmp_path}/runs/unicl"
    assert (cfg.deepspeed, cfg.data.templates) == (f"{tmp_path}/d.json", f"{tmp_path}/t.json")
    assert cfg.data.image_label == f"{tmp_path}/a::/b::{tmp_path}/c"
    assert cfg.data.image_text == [f"{tmp_path}/d", "e/~f"]
    assert cfg.model.text.tokenizer == f"{tmp_path}/t"
    assert cfg.model.image.kwargs.checkpoint_path == f"{tmp_path}/w.pth"
    assert config.load("~/own.yaml", ["output_dir=~/x"]).output_dir == f"{tmp_path}/x"


@pytest.mark.parametrize(
    "override",
    [
        "data.image_text=s3://bucket/{000..331}.tar",
        "data.image_text=/d/a::https://host/a.tar",
        "data.image_label=[/d/a, 'pipe:aws s3 cp s3://b/a.tar -']",
        "output_dir=gs://bucket/run",
        "deepspeed=hdfs://host/a.json",
        "data.templates=file:///a.json",
    ],
)
def test_addresses_are_refused_by_the_name_of_the_key(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0] + "=.*download first"):
        config.load(QUICKSTART, [override])


def test_started_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = build.plan(config.load(QUICKSTART), world_size=1)
    assert plan.cfg.deepspeed == str(ROOT / "ds_configs/zero1_fp32.json")
    assert [source.name for source in plan.sources] == ["emoji_train", "openclipart_train"]
    assert plan.cfg.output_dir == "runs/quickstart/unicl"
    # A configuration of one's own, with files beside it and those of the repository.
    own = tmp_path / "own"
    own.mkdir()
    (own / "own.yaml").write_text(
        f"base: {QUICKSTART}\ndeepspeed: d.json\ndata: {{templates: t.json, "
        "image_text: ['data/quickstart/openclipart_*/shards/*.tar', linked]}\n"
    )
    (own / "d.json").write_text((ROOT / "ds_configs/zero2_fp32.json").read_text())
    (own / "t.json").write_text('["a {}"]')
    (own / "linked").symlink_to(ROOT / "data/quickstart/emoji_twemoji")
    cfg = config.load(own / "own.yaml")
    assert (cfg.deepspeed, cfg.data.templates) == (str(own / "d.json"), str(own / "t.json"))
    assert cfg.data.image_text == [
        f"{ROOT}/data/quickstart/openclipart_*/shards/*.tar",
        str(own / "linked"),
    ]
    # What lies in the current folder comes first.
    (tmp_path / "d.json").write_text(json.dumps({"gradient_clipping": "auto"}))
    assert config.load(Path("own/own.yaml")).deepspeed == "d.json"


def test_sources_of_one_name_are_told_apart(tmp_path):
    for folder in ("imagenet/train", "cc3m/train"):
        members = [part for n in range(4) for part in sample(f"{n:05d}", n, txt=b"a text")]
        write_tar(tmp_path / folder / "0.tar", members)
    typed = ["data.sampler=ratio", "train.global_batch=4", "data.image_label=null"]
    typed += [f"data.image_text=[{tmp_path}/imagenet/train, {tmp_path}/cc3m/train]"]
    typed += ["data.ratios.imagenet/train=3", "data.ratios={cc3m/train: 1}"]
    plan = build.plan(config.load(QUICKSTART, typed), world_size=1)
    assert "3 imagenet/train, 1 cc3m/train in every global batch" in plan.describe()
    assert set(plan.identity()["data"]) == {"imagenet/train", "cc3m/train"}
    wrong = [*typed, "data.ratios={train: 1}"]
    with pytest.raises(ConfigError, match="each of imagenet/train, cc3m/train"):
        build.plan(config.load(QUICKSTART, wrong), world_size=1)


def test_typed_paths_begin_in_the_current_folder_and_errors_say_what_was_tried(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        config.load(QUICKSTART, ["deepspeed=ds_configs/zero1_fp32.json"])
    assert f"tried: {tmp_path}/ds_configs/zero1_fp32.json" in str(caught.value)
    assert str(ROOT / "ds_configs") not in str(caught.value)
    (tmp_path / "own.yaml").write_text(f"base: {QUICKSTART}\ndata: {{templates: nowhere.json}}\n")
    with pytest.raises(ConfigError) as caught:
        config.load("own.yaml")
    assert "data.templates=nowhere.json: give one of " in str(caught.value)
    assert f"tried: {tmp_path}/nowhere.json, " in str(caught.value)
    assert f"{ROOT}/nowhere.json" in str(caught.value)
    with pytest.raises(DataError) as caught:
        build.plan(config.load(QUICKSTART, ["data.image_text=data/quickstart"]), 1)
    assert str(caught.value).startswith("data.image_text: data/quickstart: ")
    assert f"looked for in {tmp_path}, and" in str(caught.value)
