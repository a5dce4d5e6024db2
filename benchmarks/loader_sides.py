"""One loader in a process of its own: `python -m benchmarks.loader_sides SIDE SHARDS SAMPLES BATCH
WORKERS SCALE`, SIDE ours or open_clip; SCALE the least share of a crop.

The last line of the output is JSON: samples, CPU seconds of this process and its workers, wall
seconds, from the start of the workers to the last batch; imports and set-up do not count.
"""

import json
import sys
import time
from types import SimpleNamespace

import psutil

SIZE = 224
MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
RECIPES = {0.9: "clip", 0.08: "paper"}


def ours(shards: str, samples: int, batch: int, workers: int, scale: float):
    """The loader of the trainer: order, triplets, workers."""
    from loaders import tokenizers, views
    from loaders.batch import TripletDataset, make_loader
    from loaders.labels import LabelSpace
    from loaders.manifest import open_shards
    from loaders.order import Order, Source, plan_streams
    from loaders.texts import TextOptions

    sources = [open_shards(shards)]
    dataset = TripletDataset(
        sources,
        LabelSpace(sources),
        [views.build_train(RECIPES[scale], SIZE, MEAN, STD)],
        TextOptions(["{}"]),
        tokenizers.build("clip", 77),
        seed=0,
        decode=views.decoder(),
    )
    facts = [Source(s.name, s.kind, s.shard_sizes) for s in sources]
    order = Order(facts, plan_streams(facts, "balanced"), batch, seed=0)
    loader = make_loader(dataset, order, 0, 1, batch, 0, samples // batch, workers)
    return loader, lambda item: item["image"]


def open_clip(shards: str, samples: int, batch: int, workers: int, scale: float):
    """open_clip's training pipeline with its default transform and tokenizer."""
    import open_clip
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    arguments = SimpleNamespace(
        train_data=shards, train_num_samples=samples, train_data_upsampling_factors=None,
        dataset_resampled=False, seed=0, workers=workers, world_size=1, batch_size=batch,
    )  # fmt: skip
    transform = image_transform(SIZE, True, MEAN, STD, aug_cfg={"scale": (scale, 1.0)})
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    info = get_wds_dataset(arguments, transform, True, tokenizer=tokenizer)
    return info.dataloader, lambda item: item[0]


def cpu_seconds() -> float:
    """Of this process and its workers so far."""
    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children())]
    return sum(each.user + each.system for each in times)


def main() -> None:
    """Read all batches once and print the figures."""
    side, shards, *numbers = sys.argv[1:]
    samples, batch, workers = (int(number) for number in numbers[:3])
    arguments = (shards, samples, batch, workers, float(numbers[3]))
    loader, images = open_clip(*arguments) if side == "open_clip" else ours(*arguments)
    cpu, start, seen = cpu_seconds(), time.perf_counter(), 0
    for item in loader:
        assert images(item).shape[-2:] == (SIZE, SIZE)
        seen += len(images(item))
    wall, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    print(json.dumps({"samples": seen, "cpu": cpu, "wall": wall}))


if __name__ == "__main__":
    main()
