"""Detections to COCO's mean average precision (pycocotools)."""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

MASK_THRESHOLD = 0.5
KINDS = {"box_map": "bbox", "mask_map": "segm"}


def detections(
    image_id: int, output: dict[str, Tensor], categories: Sequence[dict | None]
) -> list[dict]:
    """COCO result entries of one image; `categories` are those of the model's classes, None for a
    class that the set does not have: it has no precision that such a detection could lower.

    `output` is a torchvision detector's: boxes (m, 4) as corners in pixels of the original image,
    labels (m,) from 1, scores (m,), masks (m, 1, H, W) as probabilities.
    """
    found = []
    boxes, labels, scores = (output[key].cpu().tolist() for key in ("boxes", "labels", "scores"))
    masks = (output["masks"][:, 0] > MASK_THRESHOLD).cpu().numpy().astype(np.uint8)
    for (left, top, right, bottom), label, score, mask in zip(
        boxes, labels, scores, masks, strict=True
    ):
        category = categories[label - 1]
        if category is None:
            continue
        runs = mask_tools.encode(np.asfortranarray(mask))
        found.append(
            {
                "image_id": image_id,
                "category_id": category["id"],
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
                "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
            }
        )
    return found


def mean_precision(truth: COCO, found: list[dict], images: Sequence[int]) -> dict[str, dict]:
    """box_map and mask_map: AP averaged over IoU 0.50:0.95, all areas, 100 detections, in percent.

    There is no interval: averaged precisions have no simple one. No detection at all scores 0.
    """
    values = {}
    for name, kind in KINDS.items():
        precision = 0.0
        if found:
            with contextlib.redirect_stdout(io.StringIO()):
                evaluation = COCOeval(truth, truth.loadRes([dict(f) for f in found]), kind)
                evaluation.params.imgIds = sorted(images)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            precision = float(evaluation.stats[0])
        values[name] = {"value": 100 * precision, "ci95": None, "n": len(images)}
    return values
