"""Which samples of a set to keep: by key list, expression, or fraction."""

import argparse
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sets.expression import CannotEvaluate, Expression
from loaders.errors import DataError
from loaders.manifest import ShardSet, open_shards
from loaders.plain_text import text_lines
from loaders.progress import Progress
from loaders.tarreader import NO_LABEL, open_index


def select(shards: ShardSet, arguments: argparse.Namespace) -> tuple[np.ndarray, dict[str, Any]]:
    """Mask (n,) bool of the samples to keep, and the selection as `run.yaml` states it."""
    if arguments.keys is not None:
        try:
            data = arguments.keys.read_bytes()
        except OSError as error:
            raise DataError(f"{arguments.keys}: {error.strerror}; name a list of keys") from None
        text = data.decode("utf-8-sig", "surrogateescape")
        mask = by_keys(shards, [line.partition("\t")[0] for line in text_lines(text)])
        digest = hashlib.sha256(data).hexdigest()
        return mask ^ arguments.drop, {"keys_sha256": digest, "drop": arguments.drop}
    if arguments.where is not None:
        mask = by_expression(shards, arguments.where)
        return mask ^ arguments.drop, {"where": arguments.where.text, "drop": arguments.drop}
    mask = by_fraction(shards, arguments.fraction, arguments.seed)
    stated = {"fraction": str(arguments.fraction), "complement": arguments.complement}
    return mask ^ arguments.complement, stated


def by_keys(shards: ShardSet, lines: Sequence[str]) -> np.ndarray:
    """Mask (n,) bool of the samples whose key, or shard/key, is one of the lines.

    Raises `DataError` for a line that fits no sample, or several.
    """
    hits: dict[str, list[int]] = {line: [] for line in lines if line}
    for i, path, key in iterate_keys(shards):
        for name in (key, f"{path.stem}/{key}"):
            if name in hits:
                hits[name].append(i)
    unknown = [line for line, found in hits.items() if not found]
    if unknown:
        raise DataError(
            f"--keys: {len(unknown)} of {len(hits)} keys are not in {shards.name}, first "
            f"{', '.join(unknown[:5])}; remove them, or name the set that they are of"
        )
    several = [line for line, found in hits.items() if len(found) > 1]
    if several:
        places = ", ".join(shards.shard_of(i) for i in hits[several[0]][:3])
        raise DataError(
            f"--keys: {len(several)} keys fit several samples, first {several[0]} (in {places}); "
            "write shard/key, or take one set at a time"
        )
    mask = np.zeros(len(shards), dtype=bool)
    mask[[found[0] for found in hits.values()]] = True
    return mask


def by_fraction(shards: ShardSet, fraction: Fraction, seed: int) -> np.ndarray:
    """Mask (n,) bool of the floor(n * fraction) samples with the smallest hash.

    The hash is blake2b of (seed, set name, shard, key), so the choice does not depend on the
    order of the shards, nor on what else is prepared.
    """
    names = set_names(shards)
    digests = np.empty(len(shards), dtype=np.uint64)
    for i, path, key in iterate_keys(shards):
        identity = json.dumps([seed, names[path.parent], path.stem, key]).encode()
        digests[i] = int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "big")
    mask = np.zeros(len(shards), dtype=bool)
    mask[np.argsort(digests, kind="stable")[: math.floor(len(shards) * fraction)]] = True
    return mask


def by_expression(shards: ShardSet, expression: Expression) -> np.ndarray:
    """Mask (n,) bool of the samples for which the expression is true.

    Raises `DataError` naming the sample for which it cannot be evaluated.
    """
    with_caption = bool(expression.names & {"caption", "fields"})
    mask = np.zeros(len(shards), dtype=bool)
    for i, path, key in iterate_keys(shards):
        try:
            fields = dict(shards.read_json(i) or {})
            text = shards.read_text(i) if with_caption else None
            fields["caption"] = fields.get("caption") if text is None else text
            label = shards.label(i)
            fields.update(label=None if label == NO_LABEL else label, key=key, shard=path.stem)
            mask[i] = expression({**fields, "fields": fields})
        except (ValueError, CannotEvaluate) as error:
            raise DataError(
                f"{path}: sample {key!r}: --where cannot be evaluated: {error}. Change the "
                "expression, or leave such samples out by --keys FILE --drop first"
            ) from None
    return mask


def iterate_keys(shards: ShardSet) -> Iterator[tuple[int, Path, str]]:
    """(sample index, tar, key) of all samples, with progress."""
    i = 0
    with Progress(total=len(shards), unit="sample", desc="choosing") as bar:
        for shard in shards.shards:
            path = Path(shard.path)
            for key in open_index(path)["key"].tolist():
                yield i, path, os.fsdecode(key)
                i += 1
            bar.update(shard.samples)


def set_names(shards: ShardSet) -> dict[Path, str]:
    """Name of the set for each folder of tars, as it has on its own."""
    firsts: dict[Path, str] = {}
    for shard in shards.shards:
        firsts.setdefault(Path(shard.path).parent, shard.path)
    return {place: open_shards(path, kind="image_text").name for place, path in firsts.items()}
