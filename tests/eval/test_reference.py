"""The command that makes a reference folder, and evaluation and exports of models that need one."""

import hashlib
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

import models
from eval import reference, zero_shot
from eval.sources.registry import REPOSITORY
from loaders import tokenizers, views
from loaders.errors import ConfigError, DataError
from loaders.manifest import open_shards
from models import reference_folder, weights
from models.config import ReferenceConfig
from models.export import export
from models.retrieval import Retrieval
from tests.engine.run_folder import BERT, bert_text, randomize
from tests.eval.conftest import MODEL, write_set
from tests.eval.test_end_to_end import ROW_KEYS
from tests.models import reference_folders

SHARD = REPOSITORY / "data/quickstart/openclipart_train/shards/00004.tar"


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """A reference folder of a shipped shard, by the towers of the tiny run."""
    folder = tmp_path_factory.mktemp("made") / "folder"
    run = str(world / "runs/tiny")
    reference.main(arguments(SHARD, run, run, folder))
    return folder


def arguments(data, encoder, text, output):
    given = {"data": data, "encoder": encoder, "text-encoder": text, "output": output}
    given |= {"batch-size": 16, "workers": 0}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def write(folder, place):
    """A run folder of a model with open gates, which looks into the reference at `place`."""
    section = {"folder": str(place), "neighbours": 3, "heads": 2}
    config = {**MODEL, "kind": "reference", "reference": section}
    model = randomize(models.build(config))
    for part in (model.enrichment.image, model.enrichment.text):
        torch.nn.init.ones_(part.gate)
    config["reference"] = {**section, "checksum": model.cfg.reference.checksum}
    checkpoint = folder / "checkpoints" / "step_0000007"
    checkpoint.mkdir(parents=True)
    state = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, checkpoint / "model.safetensors")
    (folder / "checkpoints" / "LAST_GOOD").write_text(checkpoint.name)
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "tiny", "model": config}))
    return model


def images(count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_folder_holds_the_features_of_every_pair(world, made):
    run = weights.load_run(world / "runs/tiny")
    shards, found = open_shards(SHARD), load_file(made / "features.safetensors")
    view, cfg = views.build_eval(32, 32), run.model.cfg
    pixels = torch.stack([view(views.decode(shards.read_image(i))) for i in range(len(shards))])
    ids = tokenizers.build(cfg.text.tokenizer, 16)([shards.read_text(i) for i in range(68)])
    outputs = {
        "image": run.model.encode_image(views.normalize(pixels, cfg.image.mean, cfg.image.std)),
        "text": run.model.encode_text(ids),
    }
    for name, output in outputs.items():
        assert found[name].dtype == torch.float16
        expected = F.normalize(output["pooled"], dim=-1)
        torch.testing.assert_close(found[name].float(), expected, rtol=0, atol=2e-3)
        assert found[name].float().std(dim=0).max() > 0.01
    samples = [line.split("\t") for line in (made / "samples.tsv").read_text().splitlines()]
    sums = [hashlib.sha256(shards.read_image(i)).hexdigest() for i in range(68)]
    assert samples[1:] == [[shards.key(i), "00004.tar", sums[i]] for i in range(68)]
    facts = json.loads((made / "reference.json").read_text())
    manifest = json.loads((SHARD.parents[1] / "manifest.json").read_text())
    assert facts["shards"][0]["sha256"] == manifest["shards"][4]["sha256"]
    assert (facts["samples"], facts["left_out"], facts["image"]["name"]) == (68, {}, "tiny")
    # What a model looks up for an image of the reference is first of all this very pair.
    folder = reference_folder.find(ReferenceConfig(str(made), 1))
    lookup = Retrieval(folder, 1, cfg.image.mean, cfg.image.std)
    own, text = lookup(views.normalize(pixels, cfg.image.mean, cfg.image.std))
    assert own[:, 0].equal(found["image"])
    assert text[:, 0].equal(found["text"])


def test_what_cannot_be_used_is_left_out_and_counted(world, tmp_path):
    samples = [{"png": b"no image", "txt": "a"}, {"txt": "b"}]
    good = open_shards(SHARD)
    samples += [{"png": good.read_image(i), "txt": "" if i == 1 else "a cat"} for i in range(3)]
    write_set(tmp_path / "set", "image_text", samples)
    run = str(world / "runs/tiny")
    reference.main(arguments(tmp_path / "set", run, run, tmp_path / "folder"))
    facts = json.loads((tmp_path / "folder/reference.json").read_text())
    assert (facts["samples"], sum(facts["left_out"].values())) == (2, 3)
    shutil.rmtree(tmp_path / "folder")
    write_set(tmp_path / "bad", "image_text", samples[:1] * 3)
    with pytest.raises(DataError, match="no pair can be used"):
        reference.main(arguments(tmp_path / "bad", run, run, tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()


@torch.no_grad()
def test_texts_of_a_folder_of_transformers_are_means_over_their_tokens(world, tmp_path):
    source = tmp_path / "sentences"
    bert_text(source, "mean")
    torch.manual_seed(0)
    randomize(AutoModel.from_config(AutoConfig.for_model(**BERT))).save_pretrained(source)
    reference.main(arguments(SHARD, world / "runs/tiny", source, tmp_path / "folder"))
    bert, tokenizer = AutoModel.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    shards, found = open_shards(SHARD), load_file(tmp_path / "folder/features.safetensors")["text"]
    for i in (0, 5, 67):
        ids = tokenizer(shards.read_text(i), truncation=True, max_length=40, return_tensors="pt")
        mean = bert(**ids).last_hidden_state.mean(dim=1)[0]
        torch.testing.assert_close(found[i].float(), F.normalize(mean, dim=0), rtol=0, atol=2e-3)


def test_encoders_that_are_none(world, tmp_path):
    run = str(world / "runs/tiny")
    for encoder, words in (("resnet1", "neither a run"), ("test_resnet.none", "neither a run")):
        with pytest.raises(ConfigError, match=words):
            reference.main(arguments(SHARD, encoder, run, tmp_path / "folder"))
    with pytest.raises(DataError, match="neither a run folder"):
        reference.main(arguments(SHARD, run, tmp_path, tmp_path / "folder"))
    assert [*tmp_path.iterdir()] == []


@torch.no_grad()
def test_a_saved_model_is_the_live_one_and_refuses_another_reference(made, tmp_path):
    place = tmp_path / "place"
    place.symlink_to(made)
    live = write(tmp_path / "run", place)
    loaded = weights.load(tmp_path / "run")
    expected = live.encode_image(images())
    for name, value in loaded.model.encode_image(images()).items():
        assert value.equal(expected[name]), name
    own = live.image(images())[0]
    assert (expected["pooled"] - own).abs().max() > 0.05  # so the reference is heard
    for form, file in (("pt", "run.pt"), ("safetensors", "model.safetensors")):
        export(tmp_path / "run", form, tmp_path / form)
        again = weights.load(tmp_path / form / file)
        assert again.reference == loaded.reference == live.cfg.reference.checksum
        assert again.model.encode_image(images())["feature"].equal(expected["feature"])
    for form in ("open_clip", "hf", "timm"):
        with pytest.raises(ConfigError, match=rf"{form} cannot express model\.kind=reference"):
            export(tmp_path / "run", form, tmp_path / form)
    place.unlink()
    saved = tmp_path / "run", tmp_path / "pt" / "run.pt", tmp_path / "safetensors"
    for path in saved:
        with pytest.raises(
            DataError, match=f"no reference folder with the checksum .*{place}|{place}"
        ):
            weights.load(path)
    reference_folders.make(place)
    for path in saved:
        with pytest.raises(DataError, match=f"trained with the reference {loaded.reference}"):
            weights.load(path)


def rows(world, output, run):
    arguments = ["--checkpoint", str(run), "--datasets", "toy_classes", "--output", str(output)]
    zero_shot.main([*arguments, "--batch-size", "8", "--workers", "0"], world / "registry.yaml")
    lines = (output / f"{run.name}_zero_shot.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_rows_name_the_reference_and_features_of_another_one_are_not_taken(world, made, tmp_path):
    live = write(tmp_path / "run", made)
    found = rows(world, tmp_path / "results", tmp_path / "run")
    assert {row["reference"] for row in found} == {live.cfg.reference.checksum}
    assert {*found[0]} == {*ROW_KEYS, "reference"}
    kept = {path.name for path in (tmp_path / "results/.features").iterdir()}
    other = reference_folders.make(tmp_path / "other")
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    config["model"]["reference"] |= {"folder": other[0], "checksum": other[1]}
    # The same weights fit a reference of the same widths only.
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(DataError, match="does not fit"):
        weights.load(tmp_path / "run")
    run = world / "runs/tiny"
    reference.main(arguments(world / "drawn_test", run, run, tmp_path / "third"))
    config["model"]["reference"] |= {"folder": str(tmp_path / "third"), "checksum": None}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    again = rows(world, tmp_path / "results", tmp_path / "run")
    assert len({path.name for path in (tmp_path / "results/.features").iterdir()} - kept) == 1
    assert again[0]["reference"] not in (None, found[0]["reference"])


@torch.no_grad()
def test_fine_tuning_starts_from_the_model_with_its_reference(world, made, tmp_path):
    live = write(tmp_path / "run", made)
    encoder = live.image_encoder().eval()
    torch.testing.assert_close(encoder(images()), live.encode_image(images())["projected"])
    names = {name for name, _ in encoder.named_parameters()}
    assert {"enrichment.text.gate", "projection.weight"} < names
    assert not any("retrieval" in name for name in names)
    assert encoder.enrichment.keys.weight is not live.enrichment.keys.weight
