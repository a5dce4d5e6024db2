"""One zero-shot evaluation in a process of its own: `python -m benchmarks.evaluation_sides
{ours,clip_benchmark} FOLDER BATCH WORKERS`, FOLDER as `evaluation_zero_shot.make` writes it.

The last line of the output is JSON: seconds after the imports, top-1 accuracy as a fraction.
"""

import importlib
import json
import shutil
import sys
import time
from pathlib import Path


def ours(folder: Path, batch: int, workers: int) -> dict:
    """The command `python -m eval.zero_shot`, without features or indexes of an earlier run."""
    from eval import zero_shot

    for part in ("evaluation", "zero_shot"):  # the command imports them late
        importlib.import_module(f"eval.tasks.{part}")
    start = time.perf_counter()
    output = folder / "results"
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(folder / "data/toy/test/.index", ignore_errors=True)
    arguments = ["--checkpoint", str(folder / "export"), "--datasets", "toy"]
    arguments += ["--output", str(output), "--data-root", str(folder / "data")]
    arguments += ["--batch-size", str(batch), "--workers", str(workers)]
    zero_shot.main(arguments, folder / "registry.yaml")
    seconds = time.perf_counter() - start
    lines = (output / "export_zero_shot.jsonl").read_text().splitlines()
    found = {row["metric"]: row["value"] for row in map(json.loads, lines)}
    return {"seconds": seconds, "top1": found["top1"] / 100}


def clip_benchmark(folder: Path, batch: int, workers: int) -> dict:
    """What `clip_benchmark eval --no_amp` does (1.6.2, cli.py, run)."""
    from clip_benchmark.datasets.builder import build_dataset
    from clip_benchmark.metrics import zeroshot_classification
    from clip_benchmark.models import load_clip
    from torch.utils.data import DataLoader

    start = time.perf_counter()
    name = f"local-dir:{folder / 'export'}"
    model, transform, tokenizer = load_clip(
        model_type="open_clip", model_name=name, pretrained=None, cache_dir=None, device="cpu"
    )
    model.eval()
    root, task = str(folder / "data/toy"), "zeroshot_classification"
    data = build_dataset("wds/toy", root=root, transform=transform, split="test", task=task)
    loader = DataLoader(data.batched(batch), batch_size=None, num_workers=workers)
    metrics = zeroshot_classification.evaluate(
        model, loader, tokenizer, data.classes, data.templates, "cpu", amp=False
    )
    return {"seconds": time.perf_counter() - start, "top1": metrics["acc1"]}


if __name__ == "__main__":
    side, place, batch_size, workers = sys.argv[1:]
    run = {"ours": ours, "clip_benchmark": clip_benchmark}[side]
    print(json.dumps(run(Path(place), int(batch_size), int(workers))))
