"""What import_shards.py finds out about tars of others: classes, kind, name, source, licence.

Tars that lie in a set of this repository have a manifest, which says all of it. Of others the
classes are the lines of `classnames.txt`, and the kind follows from the samples.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loaders.errors import ConfigError, DataError
from loaders.manifest import MANIFEST, ClassEntry, load_classes, load_manifest, parse_classes
from loaders.plain_text import text_lines


@dataclass(frozen=True)
class Stated:
    """What the folders of the tars, and the command line, say of them. None: nobody says."""

    classes: list[dict]
    classes_from: str
    kind: str | None
    name: str
    source: str
    license: str


@dataclass(frozen=True)
class Contents:
    """Samples of all readable tars, and how many of them have a class number, a caption file."""

    samples: int
    labelled: int
    captioned: int


def read_classes(path: Path) -> list[dict]:
    """Class table from a text file (one name a line, in id order) or a JSON with `classes`.

    Raises `DataError` if it is neither, the ids are not 0 to n-1 in order, or a name is empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix != ".json":
            table = [{"id": i, "names": [n]} for i, n in enumerate(text_lines(text))]
        else:
            table = [
                {"id": entry["id"], "synset": entry.get("synset"), "names": list(entry["names"])}
                for entry in json.loads(text)["classes"]
            ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a class table ({type(error).__name__}: {error}); give one name a line, "
            'or JSON {"classes": [{"id": 0, "synset": null, "names": ["cat"]}, …]}'
        ) from None
    if [entry["id"] for entry in table] != list(range(len(table))):
        raise DataError(f"{path}: class ids must be 0 to {len(table) - 1} in order")
    return _as_dicts(parse_classes(path, table))


def find_stated(arguments: argparse.Namespace, tars: Sequence[Path]) -> Stated:
    """What is said of the tars without opening them; the command line wins.

    Raises `DataError` for a damaged manifest or class table and for folders whose class tables
    differ, `ConfigError` if nobody says the licence.
    """
    homes = list(dict.fromkeys(_home(tar) for tar in tars))
    manifests = [load_manifest(home) for home in homes]
    if arguments.classes:
        classes, classes_from = read_classes(arguments.classes), str(arguments.classes)
    else:
        tables = [load_classes(home, m) for home, m in zip(homes, manifests, strict=True)]
        other = [home for home, table in zip(homes, tables, strict=True) if table != tables[0]]
        if other and arguments.kind != "image_text":
            raise DataError(
                f"{homes[0]} and {other[0]} have different class tables, so equal numbers would "
                "mean different classes; import them as two sets, or state --classes"
            )
        file = MANIFEST if manifests[0] else "classnames.txt"
        classes, classes_from = _as_dicts(tables[0]), f"{file} of {homes[0]}"
    said = {
        key: "; ".join(dict.fromkeys(m[key] for m in manifests if m and m.get(key)))
        for key in ("name", "kind", "source", "license")
    }
    if arguments.kind is None and ("; " in said["kind"] or (said["kind"] and not all(manifests))):
        raise DataError(
            f"{homes[0]} and others are of different kinds; import them as two sets, or state "
            "--kind"
        )
    if not arguments.license and not (all(manifests) and said["license"]):
        raise ConfigError(
            f"--license: {homes[0]} does not say the licence of images and texts; state it "
            "(--license 'not stated' where nobody knows)"
        )
    return Stated(
        classes=classes,
        classes_from=classes_from,
        kind=arguments.kind or said["kind"] or None,
        name=arguments.name or arguments.out.resolve().name,
        source=arguments.source or said["source"] or f"tars of {', '.join(map(str, homes))}",
        license=arguments.license or said["license"],
    )


def find_kind(stated: Stated, contents: Contents) -> tuple[str, str]:
    """Kind of the set, and why: as the loader takes it, where samples have captions besides.

    Raises `ConfigError` if all samples have a class number, no caption, and no class a name.
    """
    if stated.kind is not None:
        return stated.kind, "stated"
    count = f"{contents.labelled} of {contents.samples} samples have a class number"
    if contents.labelled < contents.samples:
        return "image_text", count
    if stated.classes:
        return "image_label", f"{count}, and {stated.classes_from} names the classes"
    if contents.captioned:
        return "image_text", f"{count}, but nothing names the classes; there are captions"
    raise ConfigError(
        f"{count}, no caption is there, and nothing names the classes: state them by --classes "
        "FILE (a classnames.txt beside the tars is found), or say --kind image_text"
    )


def _home(tar: Path) -> Path:
    """Folder of the data set that a tar belongs to, as the loader finds it."""
    above = tar.parent.parent
    return above if tar.parent.name == "shards" and (above / MANIFEST).is_file() else tar.parent


def _as_dicts(entries: Sequence[ClassEntry]) -> list[dict]:
    return [{**asdict(entry), "names": list(entry.names)} for entry in entries]
