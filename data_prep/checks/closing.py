"""What closes a set, from the results of its shards: bad samples, sizes and the manifest."""

import json
from collections.abc import Sequence
from pathlib import Path

from data_prep.checks.verify_shard import LABEL_FAULT
from data_prep.sets import set_folder
from loaders.errors import DataError
from loaders.manifest import ShardInfo, write_manifest
from loaders.tarreader import ARRAYS

BAD_SAMPLES = "bad_samples.tsv"


def remove_empty_tars(out: Path, results: dict[int, dict]) -> None:
    """Remove tars without a sample, as `set_folder.publish` does: readers refuse them."""
    for shard, result in results.items():
        if not result["samples"]:
            (out / set_folder.SHARDS / f"{set_folder.shard_name(shard)}.tar").unlink(
                missing_ok=True
            )


def list_bad_samples(out: Path, results: dict[int, dict]) -> None:
    """Write D/bad_samples.tsv: `shard/key`, tab, reason."""
    lines = [
        f"{set_folder.shard_name(shard)}/{key}\t{' '.join(reason.split())}\n"
        for shard, result in results.items()
        for key, reason in result["bad"]
    ]
    path = out / BAD_SAMPLES
    if not lines:
        path.unlink(missing_ok=True)
        return
    set_folder.replace_file(path, "".join(lines))
    print(
        f"{len(lines)} bad samples, listed in {path}; training counts and skips them. To leave "
        f"them out: python data_prep/reshard.py {out} --keys {path} --drop --out NEW"
    )


def missing_shards(
    out: Path, preparation: set_folder.Preparation, missing: list[int], lost: dict[int, str]
) -> DataError:
    """What to say of planned shards that are not there, and of those that were taken away."""
    moved = "".join(f"\n  {set_folder.shard_name(shard)}: {lost[shard]}" for shard in sorted(lost))
    if moved:
        moved = f"\nMoved to {out / set_folder.QUARANTINE}:{moved}"
    return DataError(
        f"{out}: {len(missing)} of {preparation.shards} shards are missing: {ranges(missing)}. "
        f"Make them with the command that began the set (python {preparation.tool} … --out {out}), "
        "then run verify.py again; or close the set without them: --allow-missing" + moved
    )


def ranges(numbers: Sequence[int]) -> str:
    """Ascending shard numbers in words: `00003, 00007-00012`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    name = set_folder.shard_name
    return ", ".join(name(a) if a == b else f"{name(a)}-{name(b)}" for a, b in spans)


def _require_one_width(out: Path, results: dict) -> None:
    """Raise `DataError` where the arrays of one kind do not all have equally long rows."""
    for name in ARRAYS:
        found = {width for result in results.values() for width in result["widths"].get(name, ())}
        if len(found) > 1:
            raise DataError(
                f"{out}: arrays {name}.npy with rows of {', '.join(map(str, sorted(found)))} "
                "numbers; training takes one width, so write them again alike"
            )


def close(
    out: Path, preparation: set_folder.Preparation, results: dict, missing: list[int]
) -> None:
    """Write sizes.json and then manifest.json, from what is known: no tar is read again."""
    shards, labels = [], []
    for shard, result in results.items():
        name = set_folder.shard_name(shard)
        labels += [f"{name}/{key}: {why}" for key, why in result["bad"] if LABEL_FAULT in why]
        if result["samples"]:
            path = str(out / set_folder.SHARDS / f"{name}.tar")
            shards.append(ShardInfo(path, result["samples"], result["bytes"], result["sha256"]))
    if not shards:
        raise DataError(f"{out}: no image was kept; data_prep/report.py {out} says why")
    if labels and preparation.kind == "image_label":
        raise DataError(
            f"{out}: {len(labels)} samples without a label of {set_folder.CLASSES}: "
            f"{', '.join(labels[:5])}; all are in {out / BAD_SAMPLES}. Training refuses such a "
            f"set: restore {set_folder.CLASSES}, or make it again (python {preparation.tool} …)"
        )
    _require_one_width(out, results)
    extra = {
        "tool": preparation.tool,
        "identity": preparation.identity,
        "bad_samples": sum(len(result["bad"]) for result in results.values()),
        "decoded_samples": sum(result["decoded"] for result in results.values()),
        "empty_shards": [shard for shard, result in results.items() if not result["samples"]],
        "missing_shards": missing,
    }
    sizes = {Path(info.path).name: info.samples for info in shards}
    set_folder.replace_file(
        out / set_folder.SHARDS / set_folder.SIZES, json.dumps(sizes, indent=1) + "\n"
    )
    write_manifest(
        out,
        preparation.name,
        preparation.kind,
        set_folder.load_classes(out),
        preparation.source,
        preparation.license,
        preparation.date,
        preparation.attempted,
        {**preparation.extra, **extra},
        shards,
    )
