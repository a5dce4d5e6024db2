"""Detection transfer on a tiny COCO: shipped emoji on canvases, whose boxes and masks are known."""

import contextlib
import io
import json
import zipfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import save_file

import models
from data_prep.verify import verify
from eval import detection
from eval.detector import coco_metrics, mask_rcnn, transfer
from eval.detector.instances import Instances
from eval.sources.registry import REPOSITORY
from loaders import manifest
from loaders.errors import ConfigError, DataError
from models import weights
from models.config import ModelConfig
from tests.data_prep.test_coco import run as run_coco_script
from tests.eval import conftest

EMOJI = REPOSITORY / "data/quickstart/emoji_twemoji"
CATEGORIES = [
    {"id": number, "name": name, "supercategory": "emoji"}
    for number, name in ((3, "first"), (7, "second"))
]
TRUNKS = {
    "swin": {"name": "swin_tiny_patch4_window7_224", "size": 32,
             "kwargs": {"embed_dim": 16, "depths": [2, 2, 2, 1], "num_heads": [1, 2, 2, 4],
                        "window_size": 2}},
    "resnet": {"name": "resnet10t", "size": 32, "kwargs": {}},
}  # fmt: skip


def stickers():
    """Two shipped drawings as (pixels, mask) of 36 x 36; the mask is what is not white."""
    shards = manifest.open_shards(EMOJI)
    found = []
    for i in range(len(shards)):
        with Image.open(io.BytesIO(shards.read_image(i))) as image:
            pixels = np.asarray(image.convert("RGBA").resize((36, 36)))
        alpha = pixels[..., 3] > 127
        colour = np.where(alpha[..., None], pixels[..., :3], 255).astype(np.uint8)
        mask = (colour < 250).any(axis=2)
        if mask.mean() > 0.3:
            found.append((colour, mask))
        if len(found) == 2:
            return found


def official(folder, name, count, seed):
    """An instances file and a zip of images as COCO ships them; runs of one annotation a crowd."""
    random = np.random.default_rng(seed)
    drawings = stickers()
    images, annotations = [], []
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        for i in range(1, count + 1):
            height, width = (96, 120) if i % 2 else (110, 90)
            canvas = np.full((height, width, 3), 200, dtype=np.uint8)
            kinds = [] if i == count else [0, 1][: 1 + i % 2]
            for kind in kinds:
                colour, shape = drawings[kind]
                left = int(random.integers(0, 8)) + 40 * kind
                top = int(random.integers(0, height - 36))
                canvas[top : top + 36, left : left + 36][shape] = colour[shape]
                mask = np.zeros((height, width), dtype=np.uint8)
                mask[top : top + 36, left : left + 36] = shape
                runs = mask_tools.encode(np.asfortranarray(mask))
                counts = runs["counts"].decode()
                annotations.append(
                    {
                        "id": 100 + len(annotations),
                        "image_id": 10 * i,
                        "category_id": CATEGORIES[kind]["id"],
                        "bbox": mask_tools.toBbox(runs).tolist(),
                        "area": float(mask.sum()),
                        "segmentation": {"size": [height, width], "counts": counts},
                        "iscrowd": 0,
                    }
                )
            file = io.BytesIO()
            Image.fromarray(canvas).save(file, "PNG")
            archive.writestr(f"{name}/{i:012d}.png", file.getvalue())
            images.append(
                {"id": 10 * i, "file_name": f"{i:012d}.png", "height": height, "width": width}
            )
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / f"instances_{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Folders `train` (5 images, the last without objects) and `val` (4), written by
    data_prep/coco.py, and the official files beside them."""
    root = tmp_path_factory.mktemp("coco")
    with pytest.MonkeyPatch.context() as patch:
        for seed, (name, count) in enumerate((("train", 5), ("val", 4))):
            official(root, name, count, seed)
            arguments = ["--task", "instances", "--images", root / f"{name}.zip"]
            arguments += ["--annotations", root / f"instances_{name}.json", "--out", root / name]
            run_coco_script(patch, *arguments, "--expected-images", count)
            verify(root / name)
    return root


def build(kind, seed=0):
    torch.manual_seed(seed)
    text = {"width": 16, "layers": 1, "heads": 2, "context_length": 8}
    config = {"image": TRUNKS[kind], "text": text, "embed_dim": 8}
    return models.build(config).eval(), config


@pytest.mark.parametrize("kind", TRUNKS)
def test_backbone_has_the_towers_weights_and_maps_at_strides_4_to_64(kind):
    tower = build(kind)[0].image
    backbone = mask_rcnn.PyramidBackbone(tower, kind).eval()
    copied, own = backbone.trunk.state_dict(), tower.trunk.state_dict()
    assert copied.keys() == own.keys()
    assert all(torch.equal(copied[name], own[name]) for name in own)
    for height, width in ((96, 160), (64, 224), (32, 32)):
        with torch.no_grad():
            maps = backbone(torch.randn(2, 3, height, width))
        for name, stride in zip(("0", "1", "2", "3", "pool"), (4, 8, 16, 32, 64), strict=True):
            expected = (2, 256, -(-height // stride), -(-width // stride))
            assert tuple(maps[name].shape) == expected, name
    # The tower itself is untouched and the copy shares no memory with it.
    next(backbone.trunk.parameters()).data.add_(1)
    assert not torch.equal(next(backbone.trunk.parameters()), next(tower.trunk.parameters()))


def test_trunk_at_its_training_size_gives_the_towers_features():
    # Swin's third stage is a single window at 32 pixels: shifted in the detector, not in the tower.
    for kind, stages in (("resnet", 4), ("swin", 2)):
        tower = build(kind)[0].image
        trunk = mask_rcnn.detection_trunk(tower, kind)
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            expected = tower.trunk.forward_intermediates(images, intermediates_only=True)
            got = trunk.forward_intermediates(images, intermediates_only=True)
        first = 1 if kind == "resnet" else 0
        for k in range(first, first + stages):
            torch.testing.assert_close(got[k], expected[k])


def test_other_trunks_are_refused():
    config = ModelConfig.from_dict(
        {"image": {"name": "vit_tiny_patch16_224", "size": 32,
                   "kwargs": {"depth": 1, "embed_dim": 16, "num_heads": 2}}, "text": {"width": 16,
         "layers": 1, "heads": 2, "context_length": 8}, "embed_dim": 8}
    )  # fmt: skip
    with pytest.raises(ConfigError, match="needs 4, 8, 16, 32"):
        mask_rcnn.detection_trunk(models.build(config).image, "vit")


def test_a_run_of_one_tower_is_refused(tmp_path):
    run = weights.load(conftest.write_run(tmp_path / "one", 0, **conftest.ONE_TOWER))
    with pytest.raises(ConfigError, match="model of kind one_tower has not"):
        transfer.transfer(None, run, None)


def test_batch_norm_of_a_resnet_and_its_first_stage_stay_as_they_are():
    backbone = mask_rcnn.PyramidBackbone(build("resnet")[0].image, "resnet").train()
    before = {k: v.clone() for k, v in backbone.trunk.state_dict().items() if "running" in k}
    backbone(torch.randn(2, 3, 64, 64))["0"].sum().backward()
    after = backbone.trunk.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    graded = {n.split(".")[0] for n, p in backbone.trunk.named_parameters() if p.grad is not None}
    assert graded == {"layer2", "layer3", "layer4"}


def test_samples_are_the_annotations_and_flip_together(coco):
    data = Instances(coco / "train", training=True)
    assert len(data.shards) == 5
    assert len(data) == 4  # without the image that has no object
    truth = COCO(coco / "instances_train.json")
    seen = set()
    for attempt in range(12):
        torch.manual_seed(attempt)
        image, target = data[1]
        record = data.records[data.indices[1]]
        entries = truth.loadAnns(truth.getAnnIds(record["image_id"]))
        masks = np.stack([truth.annToMask(entry) for entry in entries])
        names = [CATEGORIES[label - 1]["id"] for label in target["labels"]]
        assert names == [entry["category_id"] for entry in entries]
        flipped = not np.array_equal(target["masks"].numpy(), masks)
        seen.add(flipped)
        if flipped:
            np.testing.assert_array_equal(target["masks"].numpy(), masks[:, :, ::-1])
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = np.nonzero(mask.numpy())
            around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(box, around)
        assert image.shape == (3, record["height"], record["width"])
        assert image.min() >= 0
        assert image.max() <= 1
    assert seen == {True, False}


def as_output(entries, kinds, masks, scores):
    """Annotations in the shape of a torchvision detector's output."""
    boxes = torch.tensor([entry["bbox"] for entry in entries]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return {
        "boxes": boxes,
        "labels": torch.tensor(kinds),
        "scores": torch.tensor(scores),
        "masks": torch.from_numpy(np.stack(masks))[:, None].float(),
    }


def score(coco, shift, reverse=False):
    """Metrics of the ground truth moved by `shift` pixels, and the entries scored."""
    data = Instances(coco / "val", training=False)
    truth = data.ground_truth()
    random, found = np.random.default_rng(0), []
    for record in data.records:
        entries = truth.loadAnns(truth.getAnnIds(record["image_id"]))
        if entries:
            moved = [e | {"bbox": [e["bbox"][0] + shift, *e["bbox"][1:]]} for e in entries]
            kinds = [data.class_of[entry["category_id"]] for entry in entries]
            kinds = [3 - kind for kind in kinds] if reverse else kinds
            masks = [np.roll(truth.annToMask(entry), shift, axis=1) for entry in entries]
            scores = random.uniform(0.1, 1, len(entries)).tolist()
            output = as_output(moved, kinds, masks, scores)
            found += coco_metrics.detections(record["image_id"], output, data.categories)
    ids = [record["image_id"] for record in data.records]
    return coco_metrics.mean_precision(truth, found, ids), found


def test_perfect_detections_score_100_and_wrong_classes_nothing(coco):
    perfect, _ = score(coco, 0)
    assert [perfect[name]["value"] for name in ("box_map", "mask_map")] == [100, 100]
    assert perfect["box_map"]["n"] == 4
    wrong, _ = score(coco, 0, reverse=True)
    assert wrong["box_map"]["value"] == 0


def test_metrics_are_those_of_pycocotools_on_the_official_file(coco, tmp_path):
    got, found = score(coco, 4)
    assert 0 < got["mask_map"]["value"] < got["box_map"]["value"] < 100
    for name, kind in (("box_map", "bbox"), ("mask_map", "segm")):
        own = [{k: v for k, v in f.items() if k != "segmentation"} for f in found]
        if kind == "segm":
            own = [{k: v for k, v in f.items() if k != "bbox"} for f in found]
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps(own))
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(coco / "instances_val.json")
            evaluation = COCOeval(truth, truth.loadRes(str(path)), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        assert got[name]["value"] == pytest.approx(100 * evaluation.stats[0], abs=1e-9)


def test_schedule_is_the_1x_one():
    factor = [transfer.rate_factor(step, 1000, 12, 500) for step in range(12_000)]
    assert factor[0] == pytest.approx(0.001)
    assert factor[250] == pytest.approx(0.5005)
    assert factor[500] == factor[7_999] == 1
    assert factor[8_000] == factor[10_999] == pytest.approx(0.1)
    assert factor[11_000] == factor[11_999] == pytest.approx(0.01)


def write_run(folder, kind):
    """A run folder with one checkpoint, as training leaves it."""
    model, config = build(kind)
    checkpoint = folder / "checkpoints" / "step_0000003"
    checkpoint.mkdir(parents=True)
    state = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, checkpoint / "model.safetensors")
    (folder / "checkpoints" / "LAST_GOOD").write_text(checkpoint.name)
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": kind, "model": config}))
    return folder


def shrink(model):
    """Fewer samples and detections an image: 512 boxes and 128 masks take a CPU ten seconds."""
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 16
    model.roi_heads.detections_per_img = 5
    model.rpn._pre_nms_top_n = model.rpn._post_nms_top_n = {"training": 50, "testing": 20}
    return model


@pytest.mark.parametrize("kind", TRUNKS)
def test_command_trains_continues_and_writes_both_numbers(coco, tmp_path, capfd, monkeypatch, kind):
    whole = mask_rcnn.build
    monkeypatch.setattr(mask_rcnn, "build", lambda *a: shrink(whole(*a)))
    run = write_run(tmp_path / kind, kind)
    arguments = ["--checkpoint", str(run), "--output", str(tmp_path / "results")]
    arguments += ["--train", str(coco / "train"), "--val", str(coco / "val")]
    arguments += ["--epochs", "1", "--batch-size", "2", "--image-size", "64", "--workers", "0"]
    detection.main(arguments)
    (state,) = (tmp_path / "results" / ".detection").glob("*.pt")
    trained = torch.load(state, weights_only=True)
    assert trained["epochs"] == 1
    own = models.build(yaml.safe_load((run / "config.yaml").read_text())["model"]).image
    before = {f"backbone.trunk.{n}" for n, _ in own.trunk.named_parameters()}
    assert before <= set(trained["model"])
    path = tmp_path / "results" / f"{kind}_detection.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["metric"] for row in rows] == ["box_map", "mask_map"]
    for row in rows:
        assert (row["dataset"], row["task"], row["n"]) == ("coco_detection", "detection", 4)
        assert 0 <= row["value"] <= 100
    capfd.readouterr()
    detection.main(arguments)  # nothing left to train, the same numbers
    assert "continuing after 1 epochs" in capfd.readouterr().out
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["value"] for row in again] == [row["value"] for row in rows]


def test_steps_lower_the_loss(coco):
    data = Instances(coco / "train", training=False)
    tower = build("swin")[0].image
    model = shrink(mask_rcnn.build(tower, "swin", 2, (0.5,) * 3, (0.25,) * 3, 64)).train()
    optimizer, _, _ = mask_rcnn.optimizer(model)
    images, targets = zip(data[0], data[2], strict=True)
    losses = []
    for _ in range(6):
        torch.manual_seed(0)
        loss = sum(model(list(images), list(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_bad_sets_are_named(coco, tmp_path):
    manifest_file = json.loads((coco / "val" / "manifest.json").read_text())
    other = tmp_path / "val"
    other.mkdir()
    (other / "shards").symlink_to(coco / "val" / "shards")
    del manifest_file["categories"]
    (other / "manifest.json").write_text(json.dumps(manifest_file))
    with pytest.raises(DataError, match="no categories"):
        Instances(other, training=False)
    manifest_file["categories"] = CATEGORIES[:1]
    (other / "manifest.json").write_text(json.dumps(manifest_file))
    with pytest.raises(DataError, match=r"categories \[7\] are not in manifest"):
        Instances(other, training=False)


def renamed(coco, folder, categories):
    """The set `val` with other categories in its manifest."""
    folder.mkdir()
    (folder / "shards").symlink_to(coco / "val" / "shards")
    content = json.loads((coco / "val" / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(content | {"categories": categories}))
    return folder


def test_categories_of_two_sets_meet_by_name(coco, tmp_path):
    trained = ["zebra", "first", "second"]
    other = [{"id": 3, "name": "second"}, {"id": 7, "name": "first"}]
    data = Instances(renamed(coco, tmp_path / "val", other), False, trained)
    assert data.class_of == {3: 3, 7: 2}
    assert {int(k) for k in data[0][1]["labels"]} <= {2, 3}
    mask = np.ones((1, 4, 4), dtype=np.uint8)
    boxes, scores = [{"bbox": [0.0, 0, 4, 4]}] * 3, [0.9, 0.8, 0.7]
    output = as_output(boxes, [1, 2, 3], list(mask.repeat(3, axis=0)), scores)
    found = coco_metrics.detections(10, output, data.categories)
    assert [(entry["category_id"], entry["score"] > 0.75) for entry in found] == [
        (7, True),
        (3, False),
    ]
    assert sorted(data.ground_truth().getCatIds()) == [3, 7]
    with pytest.raises(DataError, match=r"val: the training set has no category \['second'\]"):
        Instances(coco / "val", False, ["first"])
    with pytest.raises(DataError, match="a category has no name"):
        Instances(renamed(coco, tmp_path / "nameless", [{"id": 3}]), True)
    twice = [{"id": 3, "name": "first"}, {"id": 7, "name": "first"}]
    with pytest.raises(DataError, match=r"several categories have the name \['first'\]"):
        Instances(renamed(coco, tmp_path / "twice", twice), True)


def test_a_detector_of_other_classes_is_not_continued(coco, tmp_path, monkeypatch):
    states, counts = [], []
    monkeypatch.setattr(mask_rcnn, "build", lambda *a: counts.append(a[2]))
    monkeypatch.setattr(transfer, "train", lambda *a: states.append(a[-1]))
    monkeypatch.setattr(transfer, "detect", lambda *a: None)
    run = weights.load(write_run(tmp_path / "swin", "swin"))
    more = [*CATEGORIES[::-1], {"id": 9, "name": "third"}]
    for training in (coco / "val", renamed(coco, tmp_path / "val", more)):
        words = ["--checkpoint", "-", "--train", training, "--val", coco / "val", "--output", "-"]
        args = detection.options_parser().parse_args(list(map(str, words)))
        assert transfer.transfer(None, run, args) is None
    assert counts == [2, 3]
    assert states[0] != states[1]
