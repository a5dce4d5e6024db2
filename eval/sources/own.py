"""A person's own folder as an evaluation set: its row is made from what lies there.

Needs no torch: what is wrong with the folder is said before anything is loaded.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from eval.sources.class_texts import (
    CLASS_NAMES,
    TEMPLATES,
    GivenNames,
    Templates,
    digest,
    read_names,
    read_templates,
)
from eval.sources.own_parts import KINDS, Part, read_part, split_folders
from eval.sources.presence import TEST_ONLY
from eval.sources.registry import EvalDataset, Origin
from loaders.errors import DataError
from loaders.specs import local

METRICS = {
    "zero_shot": ["top1", "mean_per_class", "top5"],
    "linear_probe": ["top1", "mean_per_class"],
    "knn": ["top1", "mean_per_class"],
    "retrieval": ["mean_recall"]
    + [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)],
}
DEFAULT_TEMPLATES = "clip_80"
NAMED_BY = {
    "shards": "manifest.json", "webdataset": "classnames.txt", "huggingface": "its features",
    "folder": "the class folders",
}  # fmt: skip
# Short side = crop, then centre crop: the transform of CLIP, open_clip and ELEVATER.
RESIZE_RATIO = 1.0


def describe(
    folder: str, task: str, names: Path | None = None, templates: str | None = None
) -> EvalDataset:
    """Row of the set in `folder` for `task`, a key of `METRICS`.

    It is called NAME@DIGEST: the folder's name, and the beginning of a SHA-256 over the names and
    sizes of its images, their labels and class names. So a folder that is moved keeps its name, and
    one that is changed gets another.

    Args:
        names: file of class names, `class_texts.read_names`; default: `classnames.txt` of `folder`,
            else the names that the set has.
        templates: preset or file, `class_texts.read_templates`; default: one of TEMPLATES of
            `folder`, else the preset `clip_80`.

    Raises:
        DataError: no such folder, one that holds no set, too few splits, classes or captions for
            the task, or names that do not fit. ConfigError: `names` or `templates` is no such file.
    """
    place = Path(os.path.abspath(local(folder)))
    folders = split_folders(place)
    if task not in TEST_ONLY and "train" not in folders:
        raise DataError(
            f"{place}: no training split, and this evaluation fits on one; put `train` and `test` "
            "into one folder (links will do) and give that"
        )
    given = _given_names(place, names, folders)
    parts = {split: read_part(path, given) for split, path in folders.items()}
    if task == "retrieval":
        _check_captions(place, parts["test"])
    else:
        _check_classes(place, parts, given)
    texts = _templates(place, None if templates is None else local(templates))
    name = f"{_title(place)}@{_content(parts)[:8]}"
    return EvalDataset(
        name=name,
        source="auto",
        splits={
            split: {"path": str(path), "samples": None, "folder": _split_name(path, place, split)}
            for split, path in folders.items()
        },
        tasks={task: _metrics(task, parts["test"])},
        classes=None,
        templates=None if task == "retrieval" else texts.lines,
        labelled_only=task != "retrieval",
        resize_ratio=RESIZE_RATIO,
        optional=False,
        obtain=f"see {place}",
        captions_per_image="all" if parts["test"].several_captions else None,
        all_classes=True,
        class_names=given,
        templates_from=Path(texts.what).name,
        origin=_origin(place, task, parts, given, texts, (names, templates)),
    )


def summary(row: EvalDataset) -> str:
    """What `describe` has found, in a line."""
    facts = row.origin.facts
    counts = [f"{images} images in {split}" for split, images in facts["images"].items() if images]
    known = "classes" in facts
    named = [f"{facts['classes']} classes, named by {facts['class_names']}"] if known else []
    parts = [facts["folder"], KINDS[facts["source"]], *counts, *named, *facts["notes"]]
    return f"{row.name}: {'; '.join(parts)}"


def _given_names(place: Path, names: Path | None, folders: Mapping) -> GivenNames | None:
    """Class names of the flag, or of the file beside the set; tars read theirs themselves."""
    if names is not None:
        return read_names(names)
    beside = place / CLASS_NAMES
    tars = not (folders["test"] / "manifest.json").exists() and any(folders["test"].glob("*.tar"))
    return read_names(beside) if beside.is_file() and not tars else None


def _templates(place: Path, given: str | None) -> Templates:
    """Those of the flag, of the file beside the set, or the preset."""
    beside = [place / name for name in TEMPLATES if (place / name).is_file()]
    if given is None and len(beside) > 1:
        raise DataError(f"{place}: templates in {' and '.join(TEMPLATES)}; keep one of them")
    return read_templates(given or (beside[0] if beside else DEFAULT_TEMPLATES))


def _title(place: Path) -> str:
    """The folder's name, with the one above where it says which split it is only."""
    inner = place.name in ("train", "val", "valid", "validation", "test", "shards")
    return f"{place.parent.name}/{place.name}" if inner else place.name or "root"


def _split_name(path: Path, place: Path, split: str) -> str:
    """What results call a split: by its folder, `val` where that is tested."""
    return split if path == place else path.name


def _content(parts: Mapping[str, Part]) -> str:
    facts = {split: [part.facts, part.names] for split, part in parts.items()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _metrics(task: str, test: Part) -> list[str]:
    """Those of the task; among five classes or fewer every answer is in the top five."""
    few = test.names is not None and len(test.names) <= 5
    return [name for name in METRICS[task] if not (few and name == "top5")]


def _check_captions(place: Path, test: Part) -> None:
    if test.kind == "folder":
        raise DataError(
            f"{place}: class folders have no captions, and retrieval needs them; give a set of "
            "tars with a .txt beside each image (docs/data.md)"
        )


def _check_classes(place: Path, parts: Mapping[str, Part], given: GivenNames | None) -> None:
    """Classes of a set whose labels are known before its images are opened."""
    for split, part in parts.items():
        if part.counts is None:
            continue
        where = f"{place}, split {split}"
        names = part.renamed(given, complete=split == "test")
        if not sum(part.counts):
            raise DataError(f"{where}: no image has a label (.cls, or `label` in .json)")
        if names is None or len(part.counts) > len(names):
            raise DataError(
                f"{where}: labels go up to {len(part.counts) - 1}, and {len(names or [])} classes "
                f"have names; write them into {place / CLASS_NAMES}, one a line in the order of "
                "the ids, or name the file by --classnames"
            )
        chosen = len(names) if split == "test" else sum(count > 0 for count in part.counts)
        if chosen < 2:
            raise DataError(
                f"{where}: one class only ({', '.join(names[:1])}), and there is nothing to choose "
                "from; give the set its other classes"
            )


def _origin(
    place: Path,
    task: str,
    parts: Mapping[str, Part],
    given: GivenNames | None,
    texts: Templates,
    flags: tuple[Path | None, str | None],
) -> Origin:
    """The whole protocol: where the set is from, what was read, and how it is named."""
    test = parts["test"]
    names = None if task == "retrieval" else test.renamed(given)
    labels, named_by = digest(names or []), given.what if given else NAMED_BY[test.kind]
    facts = {
        "folder": str(place),
        "source": test.kind,
        "splits": {split: part.folder.name for split, part in parts.items()},
        "images": {split: part.images for split, part in parts.items()},
        "content": _content(parts),
        "resize_ratio": RESIZE_RATIO,
        "transform": "short side to resize_ratio x crop, bicubic, centre crop",
        "notes": _notes(task, parts, names),
        "arguments": _arguments(place, *flags),
    }
    split = "" if test.folder == place else f" of split {test.folder.name}"
    words = f"; own set ({KINDS[test.kind]}{split}), resize ratio {RESIZE_RATIO:g}"
    if task == "retrieval":
        return Origin(facts, words, words)
    if names is not None:
        facts |= {"classes": len(names), "class_names": named_by, "class_names_digest": labels}
        words += f", class names of {Path(named_by).name} (sha256 {labels[:8]})"
    own = digest(texts.lines)
    facts |= {"templates": texts.what, "templates_digest": own}
    label = texts.label + (f"_names_{digest(given.names)[:8]}" if given else "")
    prompts = f"; protocol {label}: templates {Path(texts.what).name} (sha256 {own[:8]})"
    return Origin(facts, words, f"{prompts}{words}")


def _arguments(place: Path, names: Path | None, templates: str | None) -> list[str]:
    """What names the set again on a command line, from any folder."""
    found = ["--datasets", str(place)]
    if names is not None:
        found += ["--classnames", os.path.abspath(names)]
    if templates is not None:
        isfile = Path(templates).is_file()
        found += ["--templates", os.path.abspath(templates) if isfile else templates]
    return found


def _notes(task: str, parts: Mapping[str, Part], names: list[str] | None) -> list[str]:
    """What a reader of the numbers should know: nothing is left out in silence."""
    notes = []
    for split, part in parts.items():
        if part.others:
            what = f"files passed over in {split}: {len(part.others)} that are no images or lie in"
            notes.append(f"{what} no class folder, the first is {part.others[0]}")
        if task != "retrieval" and part.unlabelled:
            notes.append(f"{part.unlabelled} images without a label left out of {split}")
    counts = parts["test"].counts
    if names is not None and counts is not None:
        padded = [*counts, *[0] * (len(names) - len(counts))]
        empty = [name for name, count in zip(names, padded, strict=True) if not count]
        if empty:
            some = ", ".join(empty[:5])
            notes.append(f"candidates without an image in test: {some} ({len(empty)})")
    return notes
