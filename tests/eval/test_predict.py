"""`eval.predict`: classes and embeddings of pictures, against formulas on what a model gives."""

import csv
import inspect
import io
import itertools
import json
import re
import shlex

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pyarrow import parquet
from torch.nn import functional as F

import losses
import models
from eval import predict
from eval.sources.base import PROMPTS
from eval.tasks import evaluation
from eval.tasks import predict as task
from eval.tasks.features import Extractor
from eval.tasks.pictures import Pictures, find
from loaders.errors import ConfigError, DataError
from loaders.texts import load_templates
from models import weights
from tests.eval.conftest import ONE_TOWER, drawing, write_run, write_set
from tests.eval.test_late import pair_score
from tests.models import reference_folders

NAMES = ["circle", "grey square", "cross+plus"]
KINDS = {
    "two_tower": {},
    "words": ONE_TOWER,
    "pictures": ONE_TOWER | {"text": {"name": "pixels", "tokenizer": "rendered"}},
    "reference": {"kind": "reference"},
    "late": {"similarity": "late", "token_dim": 12},
}


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """A folder of six drawings, with what no image can be made of and what is no image."""
    album = tmp_path_factory.mktemp("album") / "album"
    (album / "b" / ".thumbnails").mkdir(parents=True)
    random = np.random.default_rng(3)
    for number in range(6):
        picture = Image.open(io.BytesIO(drawing(number % 3, random)))
        size = (48 + 3 * number, 40)
        picture.resize(size).save(album / ("b" if number % 2 else "") / f"{number}.png")
    (album / "b" / "broken.jpg").write_bytes((album / "0.png").read_bytes()[:200])
    (album / "b" / "notes.txt").write_text("no image")
    (album / "b" / ".thumbnails" / "0.png").write_bytes((album / "0.png").read_bytes())
    return album


ORDER = ["0.png", "2.png", "4.png", "b/1.png", "b/3.png", "b/5.png"]


def command(run, *images, **options):
    """`python -m eval.predict`, three images at a time."""
    given = {"batch-size": 3, "workers": 0, **options}
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    predict.main(["--checkpoint", str(run), *map(str, images), *flags])


def write(folder, kind):
    changes = dict(KINDS[kind])
    if kind == "reference":
        place, _ = reference_folders.make(folder / "made")
        changes["reference"] = {"folder": place, "neighbours": 3, "heads": 2}
    return write_run(folder / "run", seed=4, **changes)


@torch.no_grad()
def by_hand(run, paths, templates, names):
    """Probabilities (n, K) in float64, each class and each picture by itself."""
    model, transform, tokenizer = models.load(run)
    late = model.cfg.similarity == "late"
    rows = []
    for path in paths:
        image = model.encode_image(transform(Image.open(path))[None])
        scores = []
        for name in names:
            texts = model.encode_text(tokenizer([t.replace("{}", name) for t in templates]))
            if late:
                pairs = zip(texts["token_features"], texts["token_mask"], strict=True)
                tokens = image["token_features"][0].double().numpy()
                each = [pair_score(tokens, text[mask].double().numpy()) for text, mask in pairs]
                scores.append(torch.tensor(each, dtype=torch.float64).mean())
            else:
                mean = F.normalize(texts["feature"].double().mean(0), dim=0)
                scores.append(image["feature"][0].double() @ mean)
        rows.append((model.scale().double() * torch.stack(scores)).softmax(0))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_classes_of_a_folder_by_every_kind_of_model(kind, album, tmp_path, capsys):
    run, table = write(tmp_path, kind), tmp_path / "out" / "table.csv"
    (tmp_path / "templates.json").write_text('["a {}.", "{}", "the drawing of {}"]')
    options = {"templates": tmp_path / "templates.json", "top": 2, "output": table}
    command(run, album, classes=", ".join(NAMES), **options)
    paths = [str(album / name) for name in ORDER]
    texts = ["circle", "grey square", "cross plus"]  # as training writes them
    expected = by_hand(run, paths, ["a {}.", "{}", "the drawing of {}"], texts)
    with table.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", "class_1", "probability_1", "class_2", "probability_2"]
    assert [row[0] for row in rows] == paths
    best = (-expected).argsort(1)
    for row, values, order in zip(rows, expected, best, strict=True):
        assert row[1::2] == [NAMES[i] for i in order[:2]]
        np.testing.assert_allclose([float(p) for p in row[2::2]], values[order[:2]], atol=2e-5)
    assert len({row[2] for row in rows}) == len(rows)
    printed = capsys.readouterr()
    (line,) = (line for line in printed.out.splitlines() if line.startswith(paths[0]))
    assert f"{100 * expected[0].max():.1f} %" in line
    assert f"left out: {album / 'b/broken.jpg'}: truncated" in printed.err
    assert "6 images by run at step 7; 1 left out: truncated 1" in printed.out
    assert not list(table.parent.glob("*.partial"))


def test_files_globs_and_tars_give_what_a_folder_gives(world, album, tmp_path):
    """In the order of the arguments, and by two data workers as by none."""
    samples = [{"png": (album / name).read_bytes(), "txt": "a"} for name in ORDER[:3]]
    write_set(tmp_path / "set", "image_text", samples)
    shards = sorted((tmp_path / "set/shards").glob("*.tar"))
    run, rows = world / "runs/tiny", {}
    for name, images in (
        ("folder", [album]),
        ("parts", [album / ORDER[0], album / "[1-9].png", album / "b/?.png"]),
        ("set", [tmp_path / "set"]),
        ("tars", [tmp_path / "set/shards/*.tar"]),
    ):
        output = tmp_path / f"{name}.jsonl"
        workers = 2 if name == "folder" else 0
        command(run, *images, classes="a, b, c, d", output=output, workers=workers)
        rows[name] = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["image"] for row in rows["folder"]] == [str(album / name) for name in ORDER]
    assert rows["parts"] == rows["folder"]
    assert rows["set"] == rows["tars"]
    keys = [row.pop("image") for row in rows["set"]]
    assert keys[0] == f"{shards[0]}:000000000"
    assert [{**row, "image": None} for row in rows["set"]] == [
        {**row, "image": None} for row in rows["folder"][:3]
    ]


@torch.no_grad()
def test_embeddings_with_their_keys_in_both_forms(world, album, tmp_path):
    run = world / "runs/tiny"
    model, transform, _ = models.load(run)
    paths = [str(album / name) for name in ORDER]
    images = torch.stack([transform(Image.open(path)) for path in paths])
    expected = model.encode_image(images)["feature"].numpy()
    command(run, album, embed=tmp_path / "e.npy")
    found = np.load(tmp_path / "e.npy")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (tmp_path / "e.keys.txt").read_text().splitlines() == paths
    table = tmp_path / "t.parquet"
    command(run, album, embed=tmp_path / "e.parquet", classes="a, b", output=table)
    read = parquet.read_table(tmp_path / "e.parquet")
    assert read["key"].to_pylist() == paths
    np.testing.assert_array_equal(np.stack(read["embedding"].to_numpy()), found)
    assert parquet.read_table(table)["image"].to_pylist() == paths
    for suffix in (".npy", ".keys.txt", ".parquet"):
        assert not (tmp_path / f"e{suffix}.partial").exists()


def test_nothing_is_gathered_before_the_first_batch(world, album):
    """Pictures without end: the first batches come all the same."""

    class Endless(Pictures):
        def __iter__(self):
            return itertools.cycle([str(album / "0.png"), str(album / "b" / "broken.jpg")])

        def count(self):
            return 10**9

    run = weights.load(world / "runs/tiny")
    extractor = Extractor(evaluation.make_accelerator(), run, None, 4, 0)
    bad = task.Counter()
    first = list(itertools.islice(task._batches(extractor, Endless(()), bad), 2))
    assert [len(batch.keys) for batch in first] == [2, 2]
    assert bad == {"truncated": 4}


def test_methods_without_texts_embed_what_they_train_and_name_nothing(world, album, tmp_path):
    run = write_run(tmp_path / "run", seed=0)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"loss": {"name": "simclr"}}))
    with pytest.raises(ConfigError, match=r"loss\.name=simclr, which sees no texts"):
        command(run, album, classes="a, b")
    command(run, album / "0.png", embed=tmp_path / "e.npy")
    model, transform, _ = models.load(run)
    with torch.no_grad():
        pooled = model.encode_image(transform(Image.open(album / "0.png"))[None])["pooled"]
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), pooled.numpy(), rtol=1e-5)


def sees_texts(method):
    """Whether `encode`, with the ones of its bases that it calls, speaks of texts."""
    for kind in method.__mro__:
        if "encode" in vars(kind):
            source = inspect.getsource(kind.encode)
            if "text" in source or "super().encode" not in source:
                return "text" in source
    raise AssertionError(method)


def test_which_methods_see_no_texts():
    methods = {name: losses.find(name) for name in losses.names()}
    assert {name for name, m in methods.items() if not sees_texts(m)} == task.IMAGES_ALONE


def test_late_interaction_has_no_embedding(album, tmp_path):
    run = write(tmp_path, "late")
    with pytest.raises(ConfigError, match=r"similarity=late compares tokens.*leave --embed out"):
        command(run, album, embed=tmp_path / "e.npy")
    assert not (tmp_path / "e.npy").exists()


def test_what_is_refused(world, album, tmp_path):
    run = world / "runs/tiny"
    for error, words, images, options in (
        (ConfigError, "give --classes", [album], {}),
        (ConfigError, "give --classes too", [album], {"output": "a.csv", "embed": "e.npy"}),
        (ConfigError, r"must be one of \.csv", [album], {"classes": "a,b", "output": "a.txt"}),
        (ConfigError, "named twice", [album], {"classes": "a, b,a"}),
        (ConfigError, "two names or more", [album], {"classes": "a"}),
        (DataError, "no such file", [album], {"classes": tmp_path / "none.txt"}),
        (DataError, "no file matches", [tmp_path / "*.png"], {"classes": "a, b"}),
        (DataError, "neither an image", [tmp_path], {"classes": "a, b"}),
        (DataError, "none of 1 images can be used: truncated 1", [album / "b/broken.jpg"],
         {"classes": "a, b", "output": tmp_path / "none.csv"}),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            command(run, *images, **options)
    assert not list(tmp_path.glob("none*"))


def test_classes_and_templates_in_files(tmp_path):
    (tmp_path / "names.txt").write_text("\ufeffgrey cat\r\nSea, deep\r\n\r\n")
    assert predict.class_names(str(tmp_path / "names.txt")) == ["grey cat", "Sea, deep"]
    (tmp_path / "list.json").write_text('["a", "b"]')
    assert predict.class_names(str(tmp_path / "list.json")) == ["a", "b"]
    imagenet = predict.class_names(str(PROMPTS / "imagenet1k.json"))
    assert (len(imagenet), imagenet[0], imagenet.count("missile")) == (998, "tench", 1)
    assert len(load_templates(predict.TEMPLATES)) == 80


def test_names_of_files_cannot_disturb_a_terminal(album, tmp_path):
    name = tmp_path / "a\x1b[2J.png"
    name.write_bytes((album / "0.png").read_bytes())
    (item,) = find([str(tmp_path)])
    assert find([str(tmp_path)]).key(item) == str(tmp_path / "a\\x1b[2J.png")


def test_what_the_readme_says_runs_as_typed(world, album, tmp_path, capsys, monkeypatch):
    text = (PROMPTS.parent / "README.md").read_text(encoding="utf-8")
    given = {"runs/quickstart/unicl": str(world / "runs/tiny"), "PICTURE": str(album / "0.png")}
    for name, place in (given | {"FOLDER": str(album)}).items():
        text = text.replace(name, place)
    section = text.partition("## Use a model\n")[2].partition("\n## ")[0]
    python, shell = re.findall(r"```\w*\n(.*?)```", section, re.DOTALL)
    exec(python, {})
    printed = capsys.readouterr().out
    assert len(re.findall(r"0\.\d+", printed)) == 2, printed
    monkeypatch.chdir(tmp_path)
    for line in shell.splitlines():
        words = shlex.split(line, comments=True)
        assert words[:3] == ["python", "-m", "eval.predict"]
        predict.main([*words[3:], "--workers", "0"])
    printed = capsys.readouterr().out
    assert "among 2 classes" in printed
    assert parquet.read_table("features.parquet")["key"].to_pylist()[0] == str(album / "0.png")
