"""Write chosen samples of finished sets into new shards: by key list, expression, or fraction.

    python data_prep/reshard.py data/gcc3m --out data/gcc3m_half --fraction 0.5
    python data_prep/reshard.py data/gcc3m --out data/gcc3m_rest --fraction 0.5 --complement
    python data_prep/reshard.py data/gcc3m --out data/dogs --where "'dog' in caption.lower()"
    python data_prep/reshard.py data/gcc3m --out data/common --keys keys.txt

IN is a set, a folder of tars, a tar, a brace range or a glob. Members are copied byte by byte;
only `json` gets an entry `origin`, the shard/key that the sample had. Samples are written in a
seeded order under new keys. Several sets with equal class tables are joined; to take half of
each, run once per set.

--keys: one key a line, or shard/key where several shards have the key; what follows a tab is
  ignored, so that bad_samples.tsv of verify.py can be given.
--where: over the fields of a sample's json, and caption, label, key, shard; `fields` holds all of
  them, for one that some samples lack: fields.get('width', 0) >= 64
--fraction: of n samples the floor(n * fraction) with the smallest hash of (seed, set, shard, key).
"""

import argparse
import hashlib
import json
import math
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.sets import set_folder
from data_prep.sets.expression import CannotEvaluate, Expression
from data_prep.sets.shard_writer import Unusable, permutation, write_shards
from loaders.errors import ConfigError, DataError, run_cli
from loaders.manifest import CAPTION_LINES, MANIFEST, ShardSet, open_shards
from loaders.plain_text import text_lines
from loaders.specs import as_path, local
from loaders.tarreader import NO_LABEL, Member, ShardReader, iterate_members, open_index, sample_key


def by_keys(shards: ShardSet, lines: Sequence[str]) -> np.ndarray:
    """Mask (n,) bool of the samples whose key, or shard/key, is one of the lines.

    Raises `DataError` for a line that fits no sample, or several.
    """
    hits: dict[str, list[int]] = {line: [] for line in lines if line}
    for i, path, key in _iterate_keys(shards):
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
    names = _set_names(shards)
    digests = np.empty(len(shards), dtype=np.uint64)
    for i, path, key in _iterate_keys(shards):
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
    for i, path, key in _iterate_keys(shards):
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


def _iterate_keys(shards: ShardSet) -> Iterator[tuple[int, Path, str]]:
    """(sample index, tar, key) of all samples, with progress."""
    i = 0
    with tqdm(total=len(shards), unit="sample", desc="choosing", mininterval=1) as bar:
        for shard in shards.shards:
            path = Path(shard.path)
            for key in open_index(path)["key"].tolist():
                yield i, path, os.fsdecode(key)
                i += 1
            bar.update(shard.samples)


def _set_names(shards: ShardSet) -> dict[Path, str]:
    """Name of the set for each folder of tars, as it has on its own."""
    firsts: dict[Path, str] = {}
    for shard in shards.shards:
        firsts.setdefault(Path(shard.path).parent, shard.path)
    return {place: open_shards(path, kind="image_text").name for place, path in firsts.items()}


class Copier:
    """Reads the members of chosen samples, for `write_shards`."""

    def __init__(self, shards: ShardSet, chosen: np.ndarray) -> None:
        """`chosen`: sample indices (m,) int64, ascending. Walks the tars that hold them."""
        self._shards, self._chosen = shards, chosen
        self._reader = ShardReader()
        self._extensions: list[str] = []
        self._first, self._codes = array("q", [0]), array("H")
        self._offsets, self._sizes = array("q"), array("q")
        mask = np.zeros(len(shards), dtype=bool)
        mask[chosen] = True
        end = 0
        for shard in tqdm(shards.shards, unit="tar", desc="reading headers", mininterval=1):
            wanted, end = mask[end : end + shard.samples], end + shard.samples
            if wanted.any():
                self._add_shard(shard.path, wanted)

    def _add_shard(self, path: str, wanted: np.ndarray) -> None:
        samples = list(_group(path))
        if [os.fsencode(key) for key, _ in samples] != open_index(path)["key"].tolist():
            raise DataError(f"{path}: its members are not those of its index; was it replaced?")
        for row in np.flatnonzero(wanted):
            for extension, member in samples[row][1].items():
                if extension not in self._extensions:
                    self._extensions.append(extension)
                self._codes.append(self._extensions.index(extension))
                self._offsets.append(member.offset)
                self._sizes.append(member.size)
            self._first.append(len(self._codes))

    def __call__(self, i: int) -> dict[str, bytes]:
        """Members of sample i with `origin` in `json`; raises `Unusable` if that is damaged."""
        row = int(np.searchsorted(self._chosen, i))
        path = self._shards.shard_of(i)
        members = {
            self._extensions[self._codes[m]]: self._reader.read(
                path, self._offsets[m], self._sizes[m]
            )
            for m in range(self._first[row], self._first[row + 1])
        }
        origin = f"{Path(path).stem}/{self._shards.key(i)}"
        members["json"] = _with_origin(members.get("json", b"{}"), origin)
        return members


def _group(path: str) -> Iterator[tuple[str, dict[str, Member]]]:
    """Samples of a tar in the order of its index, with all their members by extension."""
    current, parts = None, {}
    for member in iterate_members(path):
        key = sample_key(member.name)
        top = member.name.split("/", 1)[0]
        if key == member.name or (len(top) >= 4 and top.startswith("__") and top.endswith("__")):
            continue  # no extension, or webdataset's own meta data: not in the index either
        if key != current:
            if parts:
                yield current, parts
            current, parts = key, {}
        parts[member.name[len(key) + 1 :].lower()] = member
    if parts:
        yield current, parts


def _with_origin(data: bytes, origin: str) -> bytes:
    """The json of a sample with its place in the input; one from an earlier run is kept."""
    try:
        content = json.loads(data)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise Unusable("json is not a JSON object")
    if "origin" in content:
        before = [content["origin"], *content.get("earlier_origins", [])]
        content["earlier_origins"] = before
    return json.dumps({**content, "origin": origin}).encode()


def check_closed(inputs: Sequence[str]) -> None:
    """Raise `DataError` for a set that is still being prepared: a part of it would be taken."""
    for part in "::".join(inputs).split("::"):
        for place in (Path(part), *Path(part).parents[:2]):  # D, D/shards or D/shards/*.tar
            if (place / set_folder.RUN).is_file() and not (place / MANIFEST).is_file():
                raise DataError(f"{place}: not closed yet; run python data_prep/verify.py {place}")


def describe_inputs(shards: ShardSet) -> list[dict[str, str]]:
    """Name, source and license of each folder of tars, from its manifest where it has one."""
    found = []
    for place, name in _set_names(shards).items():
        homes = [place.parent, place] if place.name == set_folder.SHARDS else [place]
        manifests = [home / MANIFEST for home in homes if (home / MANIFEST).is_file()]
        stated = json.loads(manifests[0].read_bytes()) if manifests else {}
        about = {key: stated.get(key, "not stated") for key in ("source", "license")}
        found.append({"name": name, **about})
    return found


def caption_lines(shards: ShardSet) -> dict[str, bool]:
    """The key of the new manifest for inputs in which each line of a text is a caption.

    Raises `DataError` where this is so in some of the tars only: one manifest cannot say both.
    """
    without = [shard.path for shard in shards.shards if shard.path not in shards.caption_lines]
    if shards.caption_lines and without:
        raise DataError(
            f"{min(shards.caption_lines)} has a caption on each line of a text, {without[0]} has "
            "not; write the two kinds into sets of their own"
        )
    return {CAPTION_LINES: True} if shards.caption_lines else {}


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


def parse_arguments() -> argparse.Namespace:
    """The checked command line; raises `ConfigError`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", type=local, metavar="IN")
    parser.add_argument("--out", type=as_path, required=True, help="folder of the new set")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--keys", type=as_path, help="file of the keys to keep")
    choice.add_argument("--where", type=Expression, help="what is true for the samples to keep")
    choice.add_argument("--fraction", type=_fraction, help="share to keep, such as 0.5 or 1/3")
    parser.add_argument("--drop", action="store_true", help="--keys, --where: keep the others")
    parser.add_argument("--complement", action="store_true", help="--fraction: keep the others")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of --fraction")
    parser.add_argument("--samples-per-shard", type=int, default=10_000, help="default: 10000")
    set_folder.add_part_arguments(parser)
    arguments = parser.parse_args()
    fraction = arguments.fraction
    for wrong, what in (
        (fraction is not None and not 0 < fraction < 1, "--fraction lies between 0 and 1"),
        (fraction is not None and arguments.drop, "--drop: with --fraction it is --complement"),
        (fraction is None and arguments.complement, "--complement goes with --fraction only"),
        (arguments.samples_per_shard < 1, "--samples-per-shard is at least 1"),
        (not 0 <= arguments.seed < 1 << 24, "--seed lies between 0 and 16777215"),
    ):
        if wrong:
            raise ConfigError(what)
    set_folder.check_part(arguments.part, arguments.parts)
    return arguments


def _fraction(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 0.5 or 1/3") from None


def main() -> None:
    arguments = parse_arguments()
    set_folder.check_folder(arguments.out)
    check_closed(arguments.inputs)
    shards = open_shards(arguments.inputs)
    mask, selection = select(shards, arguments)
    chosen, out, size = np.flatnonzero(mask), arguments.out, arguments.samples_per_shard
    if not len(chosen):
        raise DataError(f"none of the {len(shards)} samples is chosen; there is nothing to write")
    print(f"{len(chosen)} of {len(shards)} samples are chosen")
    inputs, lines = describe_inputs(shards), caption_lines(shards)
    preparation = set_folder.Preparation(
        tool="data_prep/reshard.py",
        name=out.resolve().name,
        kind=shards.kind,
        source="; ".join(dict.fromkeys(about["source"] for about in inputs)),
        license="; ".join(dict.fromkeys(about["license"] for about in inputs)),
        date=date.today().isoformat(),
        shards=-(-len(chosen) // size),
        samples_per_shard=size,
        attempted=len(chosen),
        identity={
            "inputs": [about["name"] for about in inputs],
            "fingerprint": shards.fingerprint,
            "selection": selection,
            "seed": arguments.seed,
            "samples_per_shard": size,
        },
        extra={"inputs": inputs, "selection": {**selection, "of_samples": len(shards)}} | lines,
    )
    classes = [{**asdict(entry), "names": list(entry.names)} for entry in shards.classes]
    # Before the set is begun: it refuses tars that were replaced since they were indexed.
    copier = None if (out / set_folder.RUN).is_file() else Copier(shards, chosen)
    set_folder.begin(out, preparation, classes)
    if set_folder.missing(out, arguments.part, arguments.parts):
        order = chosen[permutation(len(chosen), arguments.seed)]
        copier = copier or Copier(shards, chosen)
        write_shards(out, order, copier, arguments.part, arguments.parts)
    print(f"next: python data_prep/verify.py {out}")


if __name__ == "__main__":
    run_cli(main)
