"""COCO instances from shards (`data_prep/coco.py --task instances`) for Mask R-CNN and COCOeval."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from eval.detector.categories import read_categories
from loaders import manifest, views
from loaders.errors import DataError
from loaders.progress import Progress

SMALLEST_SIDE = 1.0  # pixels; narrower boxes teach nothing and break the targets


class Instances(Dataset):
    """Images in 0-1 with their targets, as torchvision's detectors want them.

    Attributes:
        class_names: names of the model's classes; its class k is number k - 1 here.
        categories: the category of this set for each of them, None for a name it does not have.
    """

    def __init__(
        self, folder: Path, training: bool, class_names: Sequence[str] | None = None
    ) -> None:
        """Open the set and read all annotations.

        `training` flips half of the images, leaves crowds out, and drops images without a box.
        `class_names`: those of the set that a model is trained on; default: the set's own. Raises
        DataError for a category that is none of them, which that model could never find.
        """
        self.folder, self.training = folder, training
        self._own = read_categories(folder)
        by_name = {entry["name"]: entry for entry in self._own}
        self.class_names = list(by_name if class_names is None else class_names)
        untrained = [name for name in by_name if name not in set(self.class_names)]
        if untrained:
            raise DataError(f"{folder}: the training set has no category {untrained[:5]}")
        self.categories = [by_name.get(name) for name in self.class_names]
        number = {name: k for k, name in enumerate(self.class_names, start=1)}
        self.class_of = {entry["id"]: number[entry["name"]] for entry in self._own}
        self.shards = manifest.open_shards(folder)
        about = Progress(range(len(self.shards)), desc=f"{folder.name} annotations", unit="img")
        self.records = [self._record(i) for i in about]
        self.indices = [
            i for i, record in enumerate(self.records) if not training or self._boxes(record)
        ]
        if not self.indices:
            raise DataError(f"{folder}: no image with a box to train on")

    def _record(self, i: int) -> dict[str, Any]:
        try:
            record = self.shards.read_json(i) or {}
        except ValueError as error:
            record, problem = {}, error
        else:
            problem = "no image_id, width, height and annotations"
        if not {"image_id", "width", "height", "annotations"} <= set(record):
            raise DataError(f"{self._where(i)}: json: {problem}; make the set again")
        foreign = {entry["category_id"] for entry in record["annotations"]} - set(self.class_of)
        if foreign:
            raise DataError(f"{self._where(i)}: categories {sorted(foreign)} are not in manifest")
        return record

    def _where(self, i: int) -> str:
        return f"{self.shards.shard_of(i)}, key {self.shards.key(i)}"

    @staticmethod
    def _boxes(record: dict) -> list[dict]:
        """Annotations to learn from: no crowds, no box without an area."""
        return [
            entry
            for entry in record["annotations"]
            if not entry["iscrowd"] and min(entry["bbox"][2:]) >= SMALLEST_SIDE
        ]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Image (3, H, W) in 0-1 and boxes (m, 4) as corners, labels (m,), masks (m, H, W)."""
        i = self.indices[position]
        record = self.records[i]
        image = self._image(i)
        entries = self._boxes(record)
        height, width = record["height"], record["width"]
        boxes = torch.tensor([e["bbox"] for e in entries], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = np.zeros((len(entries), height, width), dtype=np.uint8)
        for mask, entry in zip(masks, entries, strict=True):
            mask[:] = to_mask(entry["segmentation"], height, width)
        classes = [self.class_of[entry["category_id"]] for entry in entries]
        target = {
            "boxes": boxes,
            "labels": torch.tensor(classes, dtype=torch.int64),
            "masks": torch.from_numpy(masks),
        }
        if self.training and torch.rand(()) < 0.5:
            image, target["masks"] = image.flip(2), target["masks"].flip(2)
            target["boxes"] = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
            target["boxes"][:, [0, 2]] += width
        return image, target

    def _image(self, i: int) -> Tensor:
        # COCO's coordinates belong to the pixels as stored, EXIF aside.
        record = self.records[i]
        try:
            image = views.decode(self.shards.read_image(i), upright=False)
        except (manifest.MissingMember, views.BadImage) as error:
            raise DataError(f"{self._where(i)}: unreadable image ({error})") from error
        if image.size != (record["width"], record["height"]):
            raise DataError(
                f"{self._where(i)}: the image has {image.width} x {image.height} pixels, its "
                f"annotations are for {record['width']} x {record['height']}"
            )
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        return pixels.float().div_(255)

    def ground_truth(self) -> COCO:
        """All annotations, crowds included, as pycocotools wants them."""
        dataset: dict[str, list] = {"images": [], "annotations": [], "categories": self._own}
        for record in self.records:
            about = {key: record[key] for key in ("width", "height", "file_name")}
            dataset["images"].append({"id": record["image_id"], **about})
            own = {"image_id": record["image_id"]}
            dataset["annotations"] += [own | entry for entry in record["annotations"]]
        coco = COCO()
        coco.dataset = dataset
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco


def to_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """(height, width) uint8 of polygons, or of run lengths (compressed or not)."""
    if isinstance(segmentation, list):
        runs = mask_tools.merge(mask_tools.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        runs = mask_tools.frPyObjects(segmentation, height, width)
    else:
        runs = segmentation
    return mask_tools.decode(runs)


def collate(samples: list[tuple]) -> tuple[list, list]:
    """Images and targets as two lists: their sizes differ."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
