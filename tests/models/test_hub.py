"""`models.export --push-to-hub`: the card, and the upload to a hub on loopback."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants

import models
from loaders import tokenizers
from loaders.errors import ConfigError, DataError
from models import export, weights
from tests.engine import run_folder
from tests.models import hub_server

SET = Path(__file__).parents[2] / "data/quickstart/emoji_train"


@pytest.fixture
def hub(monkeypatch):
    """A hub that this process takes for the one, and a token that it knows."""
    with hub_server.serve({"secret"}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a store that is not HTTP's
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield server


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a shipped data set, with a row of its own evaluations."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    run_folder.write(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"loss": {"name": "unicl"}, "optim": {"lr": 1.5e-3}, "output_dir": str(run)}
    config["data"] = {"image_label": str(SET), "image_text": "/elsewhere/private/gcc3m"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "evals.jsonl").write_text(json.dumps(row(run, "birds", 71.25)) + "\n")
    return run


def row(run, dataset, value, **changes):
    made = {
        "dataset": dataset, "task": "zero_shot", "metric": "top1", "value": value, "n": 318,
        "split": "test", "ci95": [value - 1, value + 1], "protocol": "a protocol of its own",
        "prompt_digest": "d", "checkpoint_hash": weights.load(run).checkpoint_hash,
    }  # fmt: skip
    return made | changes


def command(run, form, output, *extra):
    given = ["--checkpoint", str(run), "--format", form, "--output", str(output)]
    export.main([*given, "--push-to-hub", "me/drawings", *extra])


@torch.no_grad()
def test_a_run_with_its_card_is_uploaded_and_loads_from_what_the_hub_got(
    run, hub, tmp_path, capsys
):
    results = tmp_path / "results"
    results.mkdir()
    rows = [row(run, "cats", 33.5), row(run, "dogs", 44.5, checkpoint_hash="of another one")]
    (results / "mine_zero_shot.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command(run, "pt", tmp_path / "out", "--license", "cc-by-4.0", "--results", str(results))
    assert f"-> {hub.address}/me/drawings" in capsys.readouterr().out
    files = hub.repositories["me/drawings"]
    assert files.keys() == {"README.md", "mine.pt"}
    assert files["mine.pt"] == (tmp_path / "out" / "mine.pt").read_bytes()
    there = tmp_path / "there"  # as a download of the repository is
    there.mkdir()
    for name, content in files.items():
        (there / name).write_bytes(content)
    model, _, tokenizer = models.load(there)
    expected = models.load(run)[0].encode_text(tokenizers.build()(["a cat"]))["feature"]
    assert torch.equal(model.encode_text(tokenizer(["a cat"]))["feature"], expected)

    card = files["README.md"].decode()
    _, head, text = card.split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["license"] == "cc-by-4.0"
    found = {
        r["dataset"]["name"]: r["metrics"][0]["value"] for r in facts["model-index"][0]["results"]
    }
    assert found == {"birds": 71.25, "cats": 33.5}
    assert "| birds | zero_shot | top1 | 71.25 | [70.25, 72.25] | 318 |" in text
    assert "- a protocol of its own" in text
    assert "dogs" not in card
    manifest = json.loads((SET / "manifest.json").read_text())
    samples = sum(shard["samples"] for shard in manifest["shards"])
    assert f"| {manifest['name']} | image_label | {samples} | {manifest['license']} |" in text
    assert "| gcc3m | image_text | not stated | not stated | not stated |" in text
    assert "lr: 0.0015" in text
    assert 'snapshot_download("me/drawings")' in text
    assert str(SET.parent) not in card
    assert "private" not in card
    assert str(run.parent) not in card

    command(run, "timm", tmp_path / "again", "--license", "mit")  # the repository is there by now
    assert files.keys() == {"README.md", "mine.pt", "config.json", "model.safetensors"}
    assert 'timm.create_model("hf-hub:me/drawings"' in files["README.md"].decode()


def test_what_the_hub_will_not_take_is_said_before_an_export_and_what_is_left_to_do_after_it(
    run, hub, tmp_path, monkeypatch
):
    output, licence = tmp_path / "out", ("--license", "mit")
    with pytest.raises(ConfigError, match="needs --license"):
        command(run, "pt", output)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ConfigError, match="the hub refuses the token"):
        command(run, "pt", output, *licence)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no token for the hub; set HF_TOKEN"):
        command(run, "pt", output, *licence)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="the hub does not answer"):
        command(run, "pt", output, *licence)
    assert not output.exists()
    assert hub.repositories == {}
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(hub, "full", True)
    with pytest.raises(DataError, match=r"the hub failed.*`hf upload me/drawings .*/out \.`"):
        command(run, "pt", output, *licence)
    assert (output / "mine.pt").exists()


def test_what_is_bound_to_this_machine_is_not_uploaded(hub, tmp_path):
    swin = tmp_path / "swin"
    run_folder.write(swin, "swin")  # open_clip finds its image tower by an absolute path
    with pytest.raises(ConfigError, match=r"refers to a folder of this machine.*use --format hf"):
        command(swin, "open_clip", tmp_path / "out", "--license", "mit")
    letters = tmp_path / "letters"
    run_folder.write(letters, "vit", run_folder.bert_text(tmp_path / "tokenizer", "first"))
    with pytest.raises(ConfigError, match=r"refers to a folder of this machine.*use --format hf"):
        command(letters, "safetensors", tmp_path / "out", "--license", "mit")
    assert not (tmp_path / "out").exists()
    assert hub.repositories == {}
