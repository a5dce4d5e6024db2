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
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.sets import arguments as set_arguments
from data_prep.sets import set_folder
from data_prep.sets.expression import Expression
from data_prep.sets.sample_copier import Copier
from data_prep.sets.selection import select, set_names
from data_prep.sets.shard_writer import permutation, plan, write_shards
from loaders.errors import ConfigError, DataError, run_cli
from loaders.manifest import CAPTION_LINES, MANIFEST, ShardSet, open_shards
from loaders.specs import as_path, local


def check_closed(inputs: Sequence[str]) -> None:
    """Raise `DataError` for a set that is still being prepared: a part of it would be taken."""
    for part in "::".join(inputs).split("::"):
        for place in (Path(part), *Path(part).parents[:2]):  # D, D/shards or D/shards/*.tar
            if (place / set_folder.RUN).is_file() and not (place / MANIFEST).is_file():
                raise DataError(f"{place}: not closed yet; run python data_prep/verify.py {place}")


def describe_inputs(shards: ShardSet) -> list[dict[str, str]]:
    """Name, source and license of each folder of tars, from its manifest where it has one."""
    found = []
    for place, name in set_names(shards).items():
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


def parse_arguments() -> argparse.Namespace:
    """The checked command line; raises `ConfigError` or `DataError`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", type=local, metavar="IN")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--keys", type=as_path, help="file of the keys to keep")
    choice.add_argument("--where", type=Expression, help="what is true for the samples to keep")
    choice.add_argument("--fraction", type=_fraction, help="share to keep, such as 0.5 or 1/3")
    parser.add_argument("--drop", action="store_true", help="--keys, --where: keep the others")
    parser.add_argument("--complement", action="store_true", help="--fraction: keep the others")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of --fraction")
    set_arguments.add_arguments(parser, samples_per_shard=10_000)
    arguments = parser.parse_args()
    fraction = arguments.fraction
    for wrong, what in (
        (fraction is not None and not 0 < fraction < 1, "--fraction lies between 0 and 1"),
        (fraction is not None and arguments.drop, "--drop: with --fraction it is --complement"),
        (fraction is None and arguments.complement, "--complement goes with --fraction only"),
        (not 0 <= arguments.seed < 1 << 24, "--seed lies between 0 and 16777215"),
    ):
        if wrong:
            raise ConfigError(what)
    set_arguments.check(arguments)
    return arguments


def _fraction(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 0.5 or 1/3") from None


def main() -> None:
    arguments = parse_arguments()
    check_closed(arguments.inputs)
    shards = open_shards(arguments.inputs)
    mask, selection = select(shards, arguments)
    chosen, out = np.flatnonzero(mask), arguments.out
    if not len(chosen):
        raise DataError(f"none of the {len(shards)} samples is chosen; there is nothing to write")
    print(f"{len(chosen)} of {len(shards)} samples are chosen")
    inputs, lines = describe_inputs(shards), caption_lines(shards)
    preparation = plan(
        len(chosen),
        arguments.samples_per_shard,
        {
            "inputs": [about["name"] for about in inputs],
            "fingerprint": shards.fingerprint,
            "selection": selection,
            "seed": arguments.seed,
        },
        tool="data_prep/reshard.py",
        name=out.resolve().name,
        kind=shards.kind,
        source="; ".join(dict.fromkeys(about["source"] for about in inputs)),
        license="; ".join(dict.fromkeys(about["license"] for about in inputs)),
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
