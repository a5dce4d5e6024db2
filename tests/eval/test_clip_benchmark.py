"""The same model and data through CLIP_benchmark's own reader and metrics: equal to four digits.

Two models on its side: ours wrapped, and our open_clip export as open_clip loads it, with the
transform and the tokenizer that open_clip makes for it.
"""

import io
import json

import numpy as np
import open_clip
import pytest
import yaml
from clip_benchmark.datasets import builder
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from clip_benchmark.models import load_clip
from PIL import Image
from torch.utils.data import DataLoader

from eval import retrieval, zero_shot
from models import weights
from models.export import export
from tests.eval import peers
from tests.eval.conftest import drawing
from tests.eval.test_sources_kinds import write_tar

COMMON = {"source": "auto", "labelled_only": False, "resize_ratio": 1.0, "optional": True}
COUNT = 120
COMMON |= {"obtain": "-", "splits": {"test": {"samples": COUNT}}}


def run(task, module, world, root, row):
    """Rows of `python -m eval.<task>` by metric."""
    registry = {"collections": {}, "datasets": {"toy": COMMON | row}}
    (root / "registry.yaml").write_text(yaml.safe_dump(registry))
    arguments = ["--checkpoint", str(world / "runs/tiny"), "--datasets", "toy", "--workers", "0"]
    arguments += ["--output", str(root / "out"), "--data-root", str(root)]
    module.main(arguments, root / "registry.yaml")
    lines = (root / f"out/tiny_{task}.jsonl").read_text().splitlines()
    return {row["metric"]: row["value"] for row in map(json.loads, lines)}


def picture(label, random):
    """A drawing, enlarged to a picture whose sides differ from each other and from the crop."""
    image = Image.open(io.BytesIO(drawing(label, random)))
    width, height = random.integers(40, 70, size=2).tolist()
    out = io.BytesIO()
    image.resize((width, height)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def exported(world, tmp_path_factory):
    """open_clip's name of the exported run."""
    folder = tmp_path_factory.mktemp("export") / "open_clip"
    export(world / "runs/tiny", "open_clip", folder)
    return f"local-dir:{folder}"


@pytest.fixture(params=["wrapped", "exported"])
def peer(request, world, exported):
    """(model, tokenizer, function from a folder and a collation to a loader)."""
    if request.param == "wrapped":
        model = peers.Peer(weights.load(world / "runs/tiny").model)
        return model, peers.tokenizer(), peers.open_webdataset
    model, transform, tokenizer = load_clip("open_clip", exported, None, None, "cpu")
    assert type(model) is open_clip.CustomTextCLIP

    def open_webdataset(root, collate=None):
        data = builder.build_wds_dataset("toy", transform, data_dir=str(root))
        return DataLoader(data, batch_size=8, collate_fn=collate)

    return model.eval(), tokenizer, open_webdataset


def test_zero_shot_equals_clip_benchmark(peer, world, tmp_path):
    random = np.random.default_rng(1)
    labels = random.integers(6, size=COUNT)
    samples = [{"png": picture(int(c) % 3, random), "cls": int(c)} for c in labels]
    write_tar(tmp_path / "toy/test/0.tar", samples)
    (tmp_path / "toy/test/nshards.txt").write_text("1")
    names = ["circle", "square", "cross", "planet", "grey cat", "Sea, deep"]
    (tmp_path / "toy/classnames.txt").write_text("\n".join(names))
    templates = "a photo of a {c}.\nmany {c}\n{c}"
    (tmp_path / "toy/zeroshot_classification_templates.txt").write_text(templates)
    model, tokenizer, open_webdataset = peer
    loader = open_webdataset(tmp_path / "toy")
    theirs = zeroshot_classification.evaluate(
        model, loader, tokenizer, names, templates.split("\n"), "cpu", amp=False
    )
    row = {"tasks": {"zero_shot": ["top1", "top5", "mean_per_class"]}, "classes": 6}
    # Class names as published: CLIP_benchmark knows no other way.
    row |= {"templates": "source", "protocol": "elevater"}
    ours = run("zero_shot", zero_shot, world, tmp_path, row)
    assert ours["top1"] / 100 == pytest.approx(theirs["acc1"], abs=1e-4)
    assert ours["top5"] / 100 == pytest.approx(theirs["acc5"], abs=1e-4)
    recall = theirs["mean_per_class_recall"]
    assert ours["mean_per_class"] / 100 == pytest.approx(recall, abs=1e-4)
    assert 0 < ours["top1"] < ours["top5"] < 100


def test_retrieval_equals_clip_benchmark(peer, world, tmp_path):
    random = np.random.default_rng(2)
    words = ["circle", "square", "cross", "red", "blue", "big", "small", "paper", "round", "two"]
    samples = [
        {
            "png": picture(i % 3, random),
            "txt": "\n".join(
                f"{' '.join(random.choice(words, 4))} {i} {j}" for j in range(5 + i % 2)
            ),
        }
        for i in range(COUNT)
    ]
    write_tar(tmp_path / "toy/test/0.tar", samples)
    (tmp_path / "toy/test/nshards.txt").write_text("1")
    (tmp_path / "toy/dataset_type.txt").write_text("retrieval")
    model, tokenizer, open_webdataset = peer
    theirs = zeroshot_retrieval.evaluate(
        model,
        open_webdataset(tmp_path / "toy", peers.pairs),
        tokenizer,
        "cpu",
        amp=False,
        recall_k_list=[1, 5, 10],
    )
    names = [f"{d}_r{k}" for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    row = {"tasks": {"retrieval": ["rsum", *names]}, "classes": None, "templates": None}
    ours = run("retrieval", retrieval, world, tmp_path, row | {"captions_per_image": "all"})
    for k in (1, 5, 10):
        for direction, theirs_name in (("image_to_text", "text"), ("text_to_image", "image")):
            expected = theirs[f"{theirs_name}_retrieval_recall@{k}"]
            assert ours[f"{direction}_r{k}"] / 100 == pytest.approx(expected, abs=1e-4)
    assert ours["rsum"] == pytest.approx(sum(ours[name] for name in names))
    assert 0 < ours["image_to_text_r1"] < ours["image_to_text_r10"] < 100
