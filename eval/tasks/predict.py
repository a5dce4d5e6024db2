"""Classes and embeddings of a stream of pictures, for `eval.predict`; memory as one batch needs."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.tasks import growing_files
from eval.tasks.evaluation import make_accelerator
from eval.tasks.features import IMAGES_ALONE, TOKENS, Extractor, Features
from eval.tasks.pictures import Item, Pictures
from eval.tasks.scores import compare
from loaders.decoders import decoder
from loaders.errors import ConfigError, DataError
from loaders.manifest import MissingMember
from loaders.printable import printable
from loaders.progress import Progress
from loaders.views import BadImage
from loaders.workers import GuardedLoader
from models import weights
from models.transform import Transform

WIDEST = 40  # characters of a class name in the printed table


@dataclass
class Batch:
    """Pictures of a batch: `keys` (b,) and `pixels` (b, 3, size, size) uint8 of those that can be
    used, and (key, reason) of each that cannot."""

    keys: list[str]
    pixels: Tensor
    bad: list[tuple[str, str]]


class Decoded:
    """Reads and transforms: a list of items -> `Batch`, by data workers."""

    def __init__(self, pictures: Pictures, transform: Transform) -> None:
        self.pictures, self.transform, self.decode = pictures, transform, decoder()

    def __getitems__(self, items: list[Item]) -> Batch:
        keys, pixels, bad = [], [], []
        for item in items:
            key = self.pictures.key(item)
            try:
                data = self.pictures.read(item)
                pixels.append(self.transform.pixels(self.decode(data)))
                keys.append(key)
            except (BadImage, MissingMember) as error:
                bad.append((key, error.reason))
            except OSError:
                bad.append((key, "unreadable"))
        size = self.transform.size
        return Batch(keys, torch.stack(pixels) if pixels else torch.empty(0, 3, size, size), bad)


class Classifier:
    """Probabilities of classes: the softmax, over the classes given, of the model's own multiplier
    times the score that zero-shot evaluation takes."""

    def __init__(self, extractor: Extractor, names: list[str], templates: list[str]) -> None:
        self.extractor = extractor
        self.classes, self.each = extractor.classes(names, templates)
        self.scale = extractor.model.scale().item()

    def __call__(self, images: Features) -> Tensor:
        """Image features of a batch -> probabilities (b, K) float64."""
        device = self.extractor.accelerator.device
        scores = compare(images, self.classes, self.extractor.run.name, device, self.each)
        return (self.scale * scores.whole()).softmax(dim=1)


def run(args: argparse.Namespace, pictures: Pictures, shown: list[str], texts: list[str]) -> str:
    """Predict, print and write.

    Args:
        args: of `eval.predict`. shown: names of the classes, none for embeddings alone. texts: the
            same as they go into the templates.

    Returns:
        What was done, in words.

    Raises:
        ConfigError: several processes, or what the model has no features for. DataError: as
            `models.weights.load`; no picture that can be used.
    """
    accelerator = make_accelerator()
    if accelerator.num_processes > 1:
        raise ConfigError("eval.predict runs in one process; give each its own share of the images")
    loaded = weights.load(args.checkpoint)
    _check(loaded, args)
    extractor = Extractor(accelerator, loaded, None, args.batch_size, args.workers)
    kept = extractor.embedding
    with torch.inference_mode(), ExitStack() as opened:
        classify = Classifier(extractor, texts, args.templates) if shown else None
        table = opened.enter_context(growing_files.growing(args.output)) if args.output else None
        vectors = opened.enter_context(growing_files.growing(args.embed)) if args.embed else None
        used, bad = 0, Counter()
        for batch in _batches(extractor, pictures, bad):
            used += len(batch.keys)
            features = _features(extractor, batch.pixels)
            if vectors:
                vectors({"key": batch.keys, "embedding": features[kept].numpy()})
            if classify:
                columns = _table(batch.keys, classify(features), shown, args.top)
                _print(columns, shown)
                if table:
                    table(columns)
        if not used:
            raise DataError(f"none of {bad.total()} images can be used: {_counted(bad)}")
    return _summary(args, loaded, used, bad, kept, len(shown))


def _check(loaded: weights.LoadedRun, args: argparse.Namespace) -> None:
    """Raise ConfigError for what the model was not trained for."""
    method = (loaded.cfg.get("loss") or {}).get("name")
    if args.classes and method in IMAGES_ALONE:
        raise ConfigError(
            f"{loaded.name}: trained with loss.name={method}, which sees no texts, so nothing "
            "connects its images with names of classes; leave --classes out and give --embed, or "
            "fit a classifier with eval.linear_probe"
        )
    if args.embed and loaded.model.cfg.similarity == "late":
        raise ConfigError(
            f"{loaded.name}: model.similarity=late compares tokens, and no one vector of an image "
            "is trained; leave --embed out (--classes works)"
        )


def _batches(extractor: Extractor, pictures: Pictures, bad: Counter) -> Iterator[Batch]:
    """Batches with at least one picture; names the bad ones on stderr and counts their reasons."""
    loader = GuardedLoader(
        Decoded(pictures, extractor.transform),
        batch_sampler=_chunks(pictures, extractor.batch_size),
        num_workers=extractor.workers,
        collate_fn=_as_it_is,
        pin_memory=False,
    )
    with Progress(total=pictures.count(), desc="pictures", unit="image") as progress:
        for batch in loader:
            for key, reason in batch.bad:
                bad[reason] += 1
                Progress.write(f"left out: {key}: {reason}", file=sys.stderr)
            if batch.keys:
                yield batch
            progress.update(len(batch.keys) + len(batch.bad))


def _chunks(pictures: Pictures, size: int) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    for item in pictures:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _features(extractor: Extractor, pixels: Tensor) -> Features:
    images = extractor.transform.normalize(pixels.to(extractor.accelerator.device))
    found = extractor.model.encode_image(images)
    names = ("feature", "pooled", *(token for token in TOKENS if token in found))
    return {name: found[name].float().cpu() for name in names}


def _table(keys: list[str], probabilities: Tensor, names: Sequence[str], top: int) -> dict:
    """Columns: image, and of each rank the class and its probability."""
    best = probabilities.topk(min(top, len(names)))
    columns: dict[str, list] = {"image": keys}
    for rank, (values, indices) in enumerate(zip(best.values.T, best.indices.T, strict=True), 1):
        columns[f"class_{rank}"] = [names[i] for i in indices.tolist()]
        columns[f"probability_{rank}"] = values.tolist()
    return columns


def _print(columns: dict[str, list], names: Sequence[str]) -> None:
    width = max(map(len, columns["image"]))
    wide = min(WIDEST, max(map(len, names)))
    for image, *rest in zip(*columns.values(), strict=True):
        pairs = zip(rest[::2], rest[1::2], strict=True)
        cells = [f"{name:<{wide}} {100 * probability:5.1f} %" for name, probability in pairs]
        Progress.write("  ".join([f"{image:<{width}}", *cells]))


def _counted(bad: Counter) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in bad.most_common())


def _summary(args, loaded, used: int, bad: Counter, kept: str, classes: int) -> str:
    lines = [f"{used} images by {printable(loaded.name)}"]
    if loaded.step is not None:
        lines[0] += f" at step {loaded.step}"
    if bad:
        lines[0] += f"; {bad.total()} left out: {_counted(bad)}"
    if classes:
        prompts = f"{len(args.templates)} templates of each"
        lines.append(f"probabilities among {classes} classes, mean of {prompts}")
    if args.output:
        lines.append(f"-> {args.output}")
    if args.embed:
        what = "of unit length, in the space of the texts"
        if kept == "pooled":
            what = "pooled, before the projection, which this method does not train"
        beside = f" and {growing_files.keys_of(args.embed)}" if args.embed.suffix == ".npy" else ""
        lines.append(f"-> {args.embed}{beside}: {what}")
    return "\n".join(lines)
