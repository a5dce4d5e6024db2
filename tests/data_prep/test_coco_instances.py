"""COCO instances from made-up official files, against pycocotools."""

import json
import zipfile

import numpy as np
import pytest
import yaml
from pycocotools.coco import COCO

from data_prep.verify import verify
from loaders.errors import ConfigError, DataError
from loaders.manifest import open_shards
from tests.data_prep.test_coco import run
from tests.data_prep.test_image_source import write_zip
from tests.loaders.conftest import encoded


@pytest.fixture
def instances(tmp_path):
    """Five images, one without annotations; polygons and a crowd's run lengths; a zip."""
    images = [
        {"id": 10 * i, "file_name": f"{i:012d}.jpg", "height": 32, "width": 40, "license": 1}
        for i in range(1, 6)
    ]
    polygon = [[1.5, 2.25, 30.1, 2.25, 30.1, 20.0, 1.5, 20.0]]
    crowd = {"counts": [100, 7, 1173], "size": [32, 40]}
    annotations = [
        {
            "id": 500 + k,
            "image_id": 10 * (k % 4 + 1),
            "category_id": (1, 90)[k % 2],
            "bbox": [1.5, 2.25, 28.6, 17.75],
            "area": 507.65,
            "segmentation": crowd if k == 3 else polygon,
            "iscrowd": int(k == 3),
        }
        for k in range(9)
    ]
    categories = [
        {"id": 1, "name": "person", "supercategory": "person"},
        {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
    ]
    path = tmp_path / "instances_val2017.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps({"info": {}, "licenses": [], **content}))
    files = {f"val2017/{image['file_name']}": encoded(image["id"]) for image in images}
    return path, content, write_zip(tmp_path / "val2017.zip", files)


def prepare_instances(monkeypatch, instances, out, expected=5):
    path, _, images = instances
    arguments = ["--task", "instances", "--annotations", path, "--images", images, "--out", out]
    if expected is not None:
        arguments += ["--expected-images", expected]
    run(monkeypatch, *arguments, "--samples-per-shard", 2)


def test_instances_are_what_pycocotools_reads(monkeypatch, instances, tmp_path):
    path = instances[0]
    out = tmp_path / "out"
    prepare_instances(monkeypatch, instances, out)
    verify(out)
    official = COCO(path)
    shards = open_shards(out)
    extra = yaml.safe_load((out / "run.yaml").read_text())["extra"]
    rebuilt = COCO()
    rebuilt.dataset = {"images": [], "annotations": [], "categories": extra["categories"]}
    for i in range(len(shards)):
        about = shards.read_json(i)
        boxes = about.pop("annotations")
        number = about.pop("image_id")
        rebuilt.dataset["images"].append({"id": number, **about})
        rebuilt.dataset["annotations"] += [{"image_id": number, **box} for box in boxes]
        with zipfile.ZipFile(instances[2]) as file:
            assert shards.read_image(i) == file.read(f"val2017/{about['file_name']}")
    rebuilt.createIndex()
    assert sorted(rebuilt.imgs) == sorted(official.imgs) == [10, 20, 30, 40, 50]
    assert rebuilt.cats == official.cats
    for number, image in official.imgs.items():
        assert rebuilt.imgs[number].items() <= image.items()
        wanted = official.loadAnns(official.getAnnIds(number))
        got = rebuilt.loadAnns(rebuilt.getAnnIds(number))
        assert got == wanted  # in the order of the file
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(rebuilt.annToMask(one), official.annToMask(other))
    assert len(rebuilt.anns) == len(official.anns) == 9
    assert rebuilt.getAnnIds(50) == []  # kept without annotations
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert manifest["annotations"]["file"] == "instances_val2017.json"
    assert (manifest["name"], manifest["annotated_objects"]) == ("coco_instances_val2017", 9)


def test_instance_counts(monkeypatch, instances, tmp_path):
    with pytest.raises(DataError, match="5 found, 5000 expected"):
        prepare_instances(monkeypatch, instances, tmp_path / "out", expected=None)
    other = instances[0].rename(tmp_path / "instances_mine.json")
    with pytest.raises(ConfigError, match="give --expected-images"):
        prepare_instances(monkeypatch, (other, *instances[1:]), tmp_path / "out", expected=None)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("annotations", {"category_id": 2}, "annotations, entry 1: .*category 2 is not"),
        ("annotations", {"image_id": 11}, "annotations, entry 1: .*image 11 is not"),
        ("images", {"id": 10}, "images, entry 1: .*id 10 occurs twice"),
        ("categories", None, "no list 'categories'"),
    ],
)
def test_wrong_instances_are_named(monkeypatch, instances, tmp_path, part, change, message):
    path, content, _ = instances
    if change is None:
        del content[part]
    else:
        content[part][1] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        prepare_instances(monkeypatch, instances, tmp_path / "out")
