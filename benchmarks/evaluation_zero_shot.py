"""Zero-shot end to end against CLIP_benchmark: same exported model, same tars, same processes.

Each side is a command: its imports, loading, class prompts, images and scores all count, and torch
takes as many threads as it does by default, unless said otherwise. The loads:

- `quickstart`: the quickstart's towers (untrained) and its labelled drawings, all classes;
- `quickstart, one thread`: the same with OMP_NUM_THREADS=1;
- `imagenet mix`: UniCL's towers (Swin-T at 224 pixels, 12 x 512 text layers) with 80 prompts a
  class and 5 images to 8 prompts, as ImageNet has (50,000 to 80,000), on three classes.
"""

import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import models
from benchmarks import harness
from loaders import manifest, texts
from models.export import export

SIDES = ("ours", "clip_benchmark")
SETS = ("emoji_train", "emoji_twemoji", "openclipart_train", "openclipart_test")
SHARDS, WORKERS = 4, 2
QUICKSTART = {
    "image": {
        "name": "resnet10t",
        "size": 48,
        "kwargs": {"channels": [32, 64, 128, 256], "stem_width": 16},
    },
    "text": {"width": 128, "layers": 1, "heads": 4, "context_length": 32},
    "embed_dim": 128,
}
UNICL = {"image": {"name": "swin_tiny", "size": 224}, "text": {}, "embed_dim": 512}
# Towers, images, classes, preset of templates, (width, height) of the JPEGs (None: as shipped),
# batch size, threads of torch (None: its default).
LOADS = {
    "quickstart": (QUICKSTART, 8000, 29, "clipart", None, 256, None),
    "quickstart, one thread": (QUICKSTART, 8000, 29, "clipart", None, 256, 1),
    "imagenet mix": (UNICL, 150, 3, "clip_80", (500, 375), 64, None),
}


def drawings(classes: int) -> tuple[list[tuple[bytes, int]], list[str]]:
    """Labelled images of the quickstart sets (JPEG, class id) and the class names.

    The first image of every class comes first, then the second of every class that has one, ….
    """
    found, names, seen = [], [], Counter()
    for name in SETS:
        shards = manifest.open_shards(f"data/quickstart/{name}")
        names = [entry.names[0] for entry in shards.classes][:classes]
        chosen = np.flatnonzero((shards.labels >= 0) & (shards.labels < classes))
        found += [(shards.read_image(int(i)), int(shards.labels[i])) for i in chosen]
    turns = []
    for _, label in found:
        turns.append(seen[label])
        seen[label] += 1
    return [found[i] for i in np.argsort(turns, kind="stable")], names


def enlarged(data: bytes, size: tuple[int, int]) -> bytes:
    """The image as a JPEG of another size."""
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def write_model(folder: Path, settings: dict) -> None:
    """FOLDER/export: an open_clip folder of untrained towers whose features differ by image."""
    torch.manual_seed(0)
    model = models.build(settings)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # outputs as large as inputs
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    checkpoint = folder / "run/checkpoints/step_0000001"
    checkpoint.mkdir(parents=True)
    state = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, checkpoint / "model.safetensors")
    (folder / "run/checkpoints/LAST_GOOD").write_text(checkpoint.name)
    (folder / "run/config.yaml").write_text(yaml.safe_dump({"name": "run", "model": settings}))
    export(folder / "run", "open_clip", folder / "export")


def make(folder: Path, load: str, quick: bool) -> dict:
    """FOLDER/{export, data/toy, registry.yaml}; returns the facts of the load."""
    settings, count, classes, templates, size, batch, _ = LOADS[load]
    if quick:
        count, templates = min(count, 40), "clipart"
    write_model(folder, settings)
    images, names = drawings(classes)
    images = [images[i % len(images)] for i in range(count)]
    root = folder / "data/toy"
    (root / "test").mkdir(parents=True)
    for shard in range(SHARDS):
        with tarfile.open(root / f"test/{shard}.tar", "w") as tar:
            for i in range(shard, count, SHARDS):
                data, label = images[i]
                data = enlarged(data, size) if size else data
                for suffix, content in (("jpg", data), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (root / "test/nshards.txt").write_text(str(SHARDS))
    (root / "classnames.txt").write_text("\n".join(names))
    lines = [line.replace("{}", "{c}") for line in texts.load_templates(templates)]
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(lines))
    row = {"source": "auto", "splits": {"test": {"samples": count}}, "classes": len(names)}
    row |= {"tasks": {"zero_shot": ["top1"]}, "templates": "source", "protocol": "elevater"}
    row |= {"labelled_only": False, "resize_ratio": 1.0, "optional": True, "obtain": "-"}
    content = {"collections": {}, "datasets": {"toy": row}}
    (folder / "registry.yaml").write_text(yaml.safe_dump(content))
    return {"load": load, "images": count, "prompts": len(names) * len(lines), "batch": batch}


def command(side: str, folder: Path, batch: int, threads: int | None) -> dict:
    """Run one side to its end: its own figures, `wall` and `cpu` seconds of all its processes."""
    arguments = [sys.executable, "-m", "benchmarks.evaluation_sides", side, str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("OMP_NUM_THREADS", None)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [*arguments, str(batch), str(WORKERS)],
        env=environment,
        capture_output=True,
        text=True,
    )
    wall = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**json.loads(done.stdout.splitlines()[-1]), "wall": wall, "cpu": cpu}


def compare(load: str, quick: bool) -> Iterator[dict]:
    """Rows of one load; sides in turns, median over the rounds of CLIP_benchmark's time / ours."""
    rounds, threads = 1 if quick else 3, LOADS[load][-1]
    with tempfile.TemporaryDirectory() as place:
        facts = make(Path(place), load, quick)
        found = {side: [] for side in SIDES}
        busy = os.getloadavg()[0]
        for number in range(rounds):
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                found[side].append(command(side, Path(place), facts["batch"], threads))

    def ratio(key: str) -> float:
        seconds = {side: [run[key] for run in runs] for side, runs in found.items()}
        return harness.ratio(seconds, "clip_benchmark", "ours")

    facts |= {
        "workers": WORKERS,
        "threads": threads or os.cpu_count(),
        "rounds": rounds,
        "load_before": round(busy, 1),
    }
    accuracy = {side: runs[0]["top1"] for side, runs in found.items()}
    for side, runs in found.items():
        seconds = [run["wall"] for run in runs]
        facts[f"{side}_seconds"] = [round(value, 1) for value in seconds]
        facts[f"{side}_images_per_second"] = round(facts["images"] / statistics.median(seconds), 1)
    facts["peer"] = "CLIP_benchmark's dataset and zeroshot_classification.evaluate without amp"
    yield harness.row(
        "zero-shot, wall time of the command, CLIP_benchmark / ours",
        ratio("wall"), 1.5, at_most=False, **facts,
        after_imports=round(ratio("seconds"), 2), cpu=round(ratio("cpu"), 2),
    )  # fmt: skip
    yield harness.row(
        "zero-shot, difference of top-1",
        abs(accuracy["ours"] - accuracy["clip_benchmark"]), 0.00005, load=load, **accuracy,
    )  # fmt: skip


def rows(quick: bool) -> Iterator[dict]:
    """Rows of both loads."""
    for load in LOADS:
        yield from compare(load, quick)


if __name__ == "__main__":
    harness.main("evaluation_zero_shot", rows)
