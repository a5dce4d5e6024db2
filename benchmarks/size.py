"""Memory, start, seek and cost per step of the data order and index at 28 million samples.

    python -m benchmarks.size [--quick]

4,000 tars of 7,000 samples, half labelled, half captioned: the tars are sparse files without
content, their manifests and indexes are whole. Two rank processes with two workers each open them
and run the trainer's loader, whose samples are read from the index only.
"""

import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness
from loaders import tarreader
from loaders.batch import TripletDataset, make_loader
from loaders.labels import LabelSpace
from loaders.manifest import open_shards
from loaders.order import Order, Source, plan_streams
from loaders.texts import TextOptions

RANKS, WORKERS, BATCH = 2, 2, 4096
PER_SHARD, MEMBER, CLASSES = 7000, 32_768, 1000  # samples, bytes of a sample, classes
KINDS = ("image_label", "image_text")
SOURCES = [f"{kind}_set" for kind in KINDS]


class IndexOnly(TripletDataset):
    """Samples without pixels: what the index knows of them."""

    def _make(self, source: int, index: int, seed: int) -> dict:
        shards = self.sources[source]
        row = torch.tensor([int(shards._row(index)[1]["image_offset"])])
        return {"image": row, "text": [shards.key(index)], "label": shards.label(index)}


def tokenize(texts: list[str]) -> torch.Tensor:
    """Stands for a tokenizer."""
    return torch.tensor([[len(text)] for text in texts])


def make(folder: Path, shards: int) -> None:
    """FOLDER/{image_label_set, image_text_set} with `shards` tars together."""
    row = tarreader._row_type(9, tarreader.PARTS)
    index = np.zeros(PER_SHARD, row)
    index["image_offset"] = np.arange(PER_SHARD) * MEMBER + 512
    index["image_size"] = MEMBER - 4096
    index["text_offset"] = index["image_offset"] + MEMBER - 2048
    index["text_size"], index["json_offset"], index["label"] = 60, tarreader.ABSENT, -1
    for kind, name in zip(KINDS, SOURCES, strict=True):
        if kind == "image_label":
            index["label"] = np.arange(PER_SHARD) % CLASSES
        else:
            index["label"] = -1
        places = folder / name / "shards"
        (places / tarreader.INDEX_FOLDER).mkdir(parents=True)
        entries = []
        for number in range(shards // 2):
            index["key"] = [f"{i:09d}" for i in range(number * 10_000, number * 10_000 + PER_SHARD)]
            tar = places / f"{number:05d}.tar"
            with open(tar, "wb") as file:
                file.truncate(PER_SHARD * MEMBER + 10_240)
            facts = tar.stat()
            stored = (
                f"{tar.name}.{facts.st_size}.{facts.st_mtime_ns}.v{tarreader.INDEX_VERSION}.npy"
            )
            np.save(places / tarreader.INDEX_FOLDER / stored, index)
            entry = {"file": f"shards/{tar.name}", "samples": PER_SHARD, "bytes": facts.st_size}
            entries.append({**entry, "sha256": "0" * 64})
        table = [{"id": i, "synset": None, "names": [f"class {i}"]} for i in range(CLASSES)]
        manifest = {"name": name, "kind": kind, "shards": entries}
        manifest["classes"] = table if kind == "image_label" else []
        (folder / name / "manifest.json").write_text(json.dumps(manifest))


def proportional_memory(pids: list[int]) -> float:
    """MiB of the processes together; a page that several map counts once (PSS)."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def rank_process(folder: str, rank: int, batches: int, sender, measured) -> None:
    """One rank: opens everything, reads micro-batches, waits while memory is measured."""
    torch.set_num_threads(1)
    # As in training: the workers are forks, here of a process that must not be one.
    multiprocessing.set_start_method("fork", force=True)
    start, cpu = time.perf_counter(), time.process_time()
    sources = [open_shards(Path(folder) / name) for name in SOURCES]
    facts = [Source(s.name, s.kind, s.shard_sizes) for s in sources]
    order = Order(facts, plan_streams(facts, "balanced"), BATCH, seed=0)
    space = LabelSpace(sources)
    dataset = IndexOnly(sources, space, [], TextOptions(["{}"]), tokenize, seed=0)
    micro = BATCH // RANKS // 4
    loader = iter(make_loader(dataset, order, rank, RANKS, micro, 0, 10**6, WORKERS))
    next(loader)
    found = {"start": time.perf_counter() - start, "start_cpu": time.process_time() - cpu}
    for _ in itertools.islice(loader, batches):
        pass
    found["pids"] = [os.getpid(), *(p.pid for p in multiprocessing.active_children())]
    sender.send(found)
    measured.wait()


def node(folder: Path, batches: int) -> dict:
    """Start and memory of RANKS ranks with WORKERS workers each, at the same time."""
    context = multiprocessing.get_context("spawn")
    measured, pipes, ranks = context.Event(), [], []
    for rank in range(RANKS):
        receiver, sender = context.Pipe(duplex=False)
        arguments = (str(folder), rank, batches, sender, measured)
        ranks.append(context.Process(target=rank_process, args=arguments))
        ranks[-1].start()
        sender.close()  # so that the end of the rank is seen
        pipes.append(receiver)
    try:
        found = [pipe.recv() for pipe in pipes]
        memory = proportional_memory([pid for each in found for pid in each["pids"]])
    finally:
        measured.set()
        for process in ranks:
            process.join()
    starts = [round(each["start"], 2) for each in found]
    cpu = [round(each["start_cpu"], 2) for each in found]
    processes = sum(len(each["pids"]) for each in found)
    return {"memory": memory, "starts": starts, "start_cpu": cpu, "processes": processes}


def order_of(samples: int) -> Order:
    """Order over `samples` samples in shards of PER_SHARD, half of each kind."""
    sizes = np.full(samples // PER_SHARD // 2, PER_SHARD)
    facts = [Source(name, kind, sizes) for name, kind in zip(SOURCES, KINDS, strict=True)]
    return Order(facts, plan_streams(facts, "balanced"), BATCH, seed=0)


def seek_seconds(samples: int) -> list[float]:
    """Wall seconds of the first batch of a new order at steps all over ten passes."""
    steps, seconds = np.linspace(0, 10 * samples // BATCH, 21).astype(int), []
    for step in steps.tolist():
        start = time.perf_counter()
        order_of(samples).global_batch(step)
        seconds.append(time.perf_counter() - start)
    return seconds


def rows(quick: bool) -> Iterator[dict]:
    """All rows."""
    shards = 80 if quick else 4000
    samples, small = shards * PER_SHARD, (140_000 if quick else 1_008_000)
    with tempfile.TemporaryDirectory() as place:
        large, tiny = Path(place) / "large", Path(place) / "tiny"
        start = time.perf_counter()
        make(large, shards)
        made = time.perf_counter() - start
        make(tiny, 4)
        index = sum(f.stat().st_size for f in large.glob("*/shards/.index/*.npy"))
        bare, found = node(tiny, 1), node(large, 200)
    facts = {
        "samples": samples, "shards": shards, "index_bytes_per_sample": round(index / samples, 1),
        "made_in_s": round(made), "ranks": RANKS, "workers": WORKERS,
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    yield harness.row(
        "resident memory of a node for its data, MiB (PSS above that with 4 shards)",
        found["memory"] - bare["memory"], 1024, processes=found["processes"],
        with_interpreters_and_libraries=round(found["memory"]), with_4_shards=round(bare["memory"]),
        **facts,
    )  # fmt: skip
    yield harness.row(
        "start to the first batch, s, slowest rank", max(found["starts"]), 10,
        cpu_s=found["start_cpu"], **facts,
    )  # fmt: skip
    seeks = seek_seconds(samples)
    yield harness.row("seek to a step, s, slowest of 21", max(seeks), 1, samples=samples)
    steps = 30 if quick else 250  # several blocks of shards
    orders = {"many": order_of(samples), "few": order_of(small)}
    position = dict.fromkeys(orders, 0)

    def walk(name: str) -> None:
        for step in range(position[name], position[name] + steps):
            orders[name].global_batch(step)
        position[name] += steps

    contenders = {name: (lambda name=name: walk(name)) for name in orders}
    seconds = harness.paired(contenders, 3 if quick else 7)
    yield harness.row(
        "CPU time per step of the order, many / few samples",
        harness.ratio(seconds, "many", "few"), 1.2, many=samples, few=small, B=BATCH,
        ms_per_step=round(1000 * statistics.median(seconds["many"]) / steps, 2),
    )  # fmt: skip


if __name__ == "__main__":
    harness.main("size", rows)
