"""What differs between two plans of a set, in words: a hash tells a reader nothing."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_HASH = re.compile(r"[0-9a-f]{64}")
_WORDS = {  # keys of `Preparation.identity` that hold a hash
    "annotations_sha256": "another annotation file",
    "fingerprint": "other shards (their names, bytes or numbers of samples)",
    "ids_sha256": "other photo ids",
    "images_sha256": "other images, or other names of them",
    "input_sha256": "other images or labels in the source",
    "karpathy_sha256": "another file of captions and splits",
    "keys_sha256": "another list of keys",
    "labels_sha256": "other labels",
    "list_sha256": "other rows in the list",
    "objects_sha256": "other arrays of objects (their names, sizes or times)",
    "table_sha256": "another table",
    "tars_sha256": "other tars, or in another order",
}


def describe(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    old_classes: Sequence[Mapping],
    new_classes: Sequence[Mapping],
) -> list[str]:
    """A phrase for each thing that two plans, and their class tables, do not have in common.

    `old`, `new`: name, kind and identity of a set. Both values are shown, for hashes words.
    """
    table = describe_classes(old_classes, new_classes)
    told = {"classes_sha256"} if table else set()
    plans = ({key: plan[key] for key in plan if key not in told} for plan in (old, new))
    return [*_phrases(*plans, ""), *([table] if table else [])]


def _phrases(old: Mapping, new: Mapping, prefix: str) -> Iterator[str]:
    for key in {**old, **new}:
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from _phrases(before, now, f"{prefix}{key}.")
        elif any(isinstance(value, str) and _HASH.fullmatch(value) for value in (before, now)):
            yield f"{prefix}{key}: {_WORDS.get(key, 'another content')}"
        else:
            yield f"{prefix}{key}: {before!r} there, {now!r} now"


def describe_classes(old: Sequence[Mapping], new: Sequence[Mapping]) -> str | None:
    """How two class tables (id, synset, names of each class) differ; None if they do not."""
    if list(old) == list(new):
        return None
    if len(old) != len(new):
        return f"class table: {len(old)} classes there, {len(new)} now"
    differing = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    before, now = (
        [table[differing[0]].get("synset"), *table[differing[0]]["names"]] for table in (old, new)
    )
    names = [", ".join(map(repr, filter(None, words))) for words in (before, now)]
    return (
        f"class table: {len(differing)} of {len(old)} classes have other names, first "
        f"{differing[0]}: {names[0]} there, {names[1]} now"
    )
