"""What report.py tells of a set, gathered from statistics, parquet files, tars and manifest."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.checks.report_counts import SIZES, Files, Rows, Sizes, Texts
from data_prep.download.advice import Hosts, leading_advice, resolver_advice
from data_prep.download.reasons import DNS, OTHER, PRIVATE, SUCCESS, reason_group
from data_prep.sets import set_folder
from loaders.errors import DataError
from loaders.manifest import MANIFEST
from loaders.progress import Progress
from loaders.tarreader import ShardReader, open_index

_COLUMNS = ("row", "url", "status", "error_message", "caption", "sha256")
_REASONS = 30  # messages of other tools are no fixed texts; the rest is counted as `other`


@dataclass(frozen=True)
class Source:
    """A prepared set, or a closed one without its `run.yaml`."""

    out: Path
    facts: dict  # name, kind, source, license, date
    planned: int  # rows or images that the preparation set out to try
    kept: int | None  # as the manifest says, None if the set is not closed
    stats: dict[str, dict]  # by name of the shard; empty without run.yaml
    every: list[Path]  # tars of all finished shards
    tars: list[Path]  # those that hold images
    classes: list[dict]
    manifest: dict | None


def open_source(out: Path) -> Source:
    """Find out what is in `out`. `DataError` if it is neither being prepared nor closed."""
    path = out / MANIFEST
    manifest = json.loads(path.read_bytes()) if path.is_file() else None
    if (out / set_folder.RUN).is_file():
        about = set_folder.load(out)
        stats = {set_folder.shard_name(shard): s for shard, s in set_folder.finished(out).items()}
        every = [out / set_folder.SHARDS / f"{name}.tar" for name in stats]
        tars = [tar for tar in every if stats[tar.stem]["successes"]]
        planned, classes = about.attempted, set_folder.load_classes(out)
        facts = {key: getattr(about, key) for key in ("name", "kind", "source", "license", "date")}
    elif manifest:
        stats, every = {}, [out / shard["file"] for shard in manifest["shards"]]
        tars = every
        planned, classes = manifest["yield"]["attempted"], manifest["classes"]
        facts = {key: manifest[key] for key in ("name", "kind", "source", "license", "date")}
    else:
        raise DataError(
            f"{out}: neither {set_folder.RUN} nor {MANIFEST}, so not a data set; tars of others "
            "become one with data_prep/import_shards.py"
        )
    kept = manifest["yield"]["kept"] if manifest else None
    return Source(out, facts, planned, kept, stats, every, tars, classes, manifest)


def captions_of(tar: Path, table: pa.Table | None = None) -> list[str]:
    """Captions of a shard: from its parquet if there is one, else each line of `.txt`.

    `table`: the parquet, when it is read already.
    """
    table = _table(tar, ["caption"]) if table is None else table
    if table is not None and "caption" in table.column_names:
        kept = table.filter(pc.equal(table["status"], SUCCESS))["caption"]
        return [text or "" for text in kept.to_pylist()]
    reader, found, index = ShardReader(), [], open_index(tar)
    for row in index[index["text_offset"] >= 0]:
        data = reader.read(str(tar), int(row["text_offset"]), int(row["text_size"]))
        # What is not UTF-8 is listed by verify.py; here it is only counted.
        found += data.decode("utf-8-sig", errors="replace").splitlines() or [""]
    return found


def iterate_captions(source: Source) -> Iterator[str]:
    """All captions, shard by shard."""
    for tar in source.tars:
        yield from captions_of(tar)


def collect(source: Source) -> dict:
    """All facts but the concepts of captions. Keys are those of report.json."""
    rows, texts, sizes, files, hosts = Rows(), Texts(), Sizes(), Files(), Hosts()
    labels = np.zeros(len(source.classes), dtype=np.int64)
    for tar in Progress(source.every, unit="shard", desc=source.facts["name"]):
        table = _table(tar, [*_COLUMNS, *SIZES])
        rows.add(table)
        hosts.add(table)
        if tar not in source.tars:
            continue
        if table is not None:
            kept = table.filter(pc.equal(table["status"], SUCCESS))
            sizes.add(kept)
            files.add(kept)
        texts.add(captions_of(tar, table))
        if source.classes:
            label = open_index(tar)["label"]
            fitting = label[(label >= 0) & (label < len(labels))]
            labels += np.bincount(fitting, minlength=len(labels))
    manifest = source.manifest or {}
    verified = ("bad_samples", "missing_shards", "empty_shards")
    return {
        **source.facts,
        "folder": str(source.out),
        "closed": source.manifest is not None,
        "bytes": sum(tar.stat().st_size for tar in source.tars),
        "shards": len(source.tars),
        **_yield(source, rows),
        "hosts": {"asked": len(hosts.asked), "unresolved": len(hosts.unresolved)},
        "advice": _advice(source, rows, hosts),
        "list": _list_facts(source.out),
        "verified": {key: manifest[key] for key in verified if key in manifest},
        "sizes": sizes.percentiles(),
        "repeated_files": files.summary(),
        "captions": texts.summary(lambda shard: captions_of(source.tars[shard])),
        "caption_lengths": texts.lengths.tolist(),
        "class_images": labels.tolist(),
    }


def _table(tar: Path, columns: list[str]) -> pa.Table | None:
    """The columns (and status) of the parquet beside a tar, as far as it has them."""
    path = tar.with_suffix(".parquet")
    if not path.exists():
        return None
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        wanted = [name for name in dict.fromkeys(["status", *columns]) if name in names]
        return file.read(columns=wanted) if "status" in names else None
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: damaged ({error}); run data_prep/verify.py") from None


def _yield(source: Source, rows: Rows) -> dict:
    """Planned, attempted, kept, share kept, reasons, retried and recovered rows."""
    by_row = bool(source.stats) and rows.known
    found = rows.summary() if by_row else _from_statistics(source)
    share = found["kept"] / found["attempted"] if found["attempted"] else None
    reasons = found["reasons"]
    return {
        "planned": source.planned,
        **found,
        "yield": share,
        "dns_share": reasons.get(DNS, 0) / found["attempted"] if found["attempted"] else 0.0,
    }


def _advice(source: Source, rows: Rows, hosts: Hosts) -> str | None:
    """What to do about rows that gave no image; None where rows are not known one by one."""
    if not (source.stats and rows.known):
        return None
    found = rows.summary()
    reasons, tried = found["reasons"], found["attempted"]
    return resolver_advice(source.out, tried, reasons.get(DNS, 0), hosts) or (
        leading_advice(source.out, reasons) if next(iter(reasons), None) == PRIVATE else None
    )


def _from_statistics(source: Source) -> dict:
    """The same from `_stats.json`: attempts, not rows; where there are none, from the manifest."""
    nothing = {"retried": None, "recovered": None}
    if not source.stats:
        lost = source.planned - source.kept
        reasons = {"not recorded": lost} if lost else {}
        return {"attempted": source.planned, "kept": source.kept, "reasons": reasons, **nothing}
    messages: Counter = Counter()
    for stats in source.stats.values():
        for message, number in stats.get("status_dict", {}).items():
            group = reason_group(message)
            messages[message if group == OTHER else group] += number
    messages.pop(SUCCESS, None)
    reasons = dict(messages.most_common(_REASONS))
    rest = messages.total() - sum(reasons.values())
    return {
        "attempted": sum(stats["count"] for stats in source.stats.values()),
        "kept": sum(stats["successes"] for stats in source.stats.values()),
        "reasons": reasons | ({OTHER: rest} if rest else {}),
        **nothing,
    }


def _list_facts(out: Path) -> dict:
    """What was left out before downloading, from the index of the list."""
    path = out / set_folder.LIST / "index.json"
    index = json.loads(path.read_bytes()) if path.is_file() else {}
    return {key: index[key] for key in ("rows", "rejected", "duplicates") if key in index}
