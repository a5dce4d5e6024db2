"""The categories of a set that `data_prep/coco.py --task instances` has made. Needs no torch."""

import json
from collections import Counter
from pathlib import Path

from loaders import manifest
from loaders.errors import DataError


def read_categories(folder: Path) -> list[dict]:
    """Categories of the manifest in its order. Raises DataError for a set without, for a category
    without name or id, and for two of one name or one id."""
    path = folder / manifest.MANIFEST
    if not path.is_file():
        raise DataError(f"{path} does not exist; make the set with data_prep/coco.py")
    categories = json.loads(path.read_text(encoding="utf-8")).get("categories")
    if not categories:
        raise DataError(
            f"{path} has no categories; make the set with data_prep/coco.py --task instances"
        )
    for key in ("name", "id"):
        times = Counter(entry.get(key) for entry in categories)
        if None in times:
            raise DataError(f"{path}: a category has no {key}; make the set again")
        twice = [value for value, count in times.items() if count > 1]
        if twice:
            raise DataError(f"{path}: several categories have the {key} {twice[:5]}; mend them")
    return categories
