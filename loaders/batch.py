"""From sample ids to batches: triplets, micro-batches of a rank, bad samples.

The order names the samples of a global batch; rank r of R owns its r-th contiguous slice, cut
into contiguous micro-batches. Everything random about a sample follows from (seed, step,
position in the global batch), so ranks, workers and micro-batches change nothing.
"""

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from loaders.bad_samples import BadSample, describe_failure
from loaders.bad_samples import BadSampleCounter as BadSampleCounter
from loaders.captions import check_sources, draw
from loaders.choices import CAPTION_LABELS
from loaders.decoders import BadImage, Decoder, decode
from loaders.errors import ConfigError, DataError
from loaders.labels import PAIR, LabelSpace, caption_group
from loaders.manifest import MissingMember, ShardSet
from loaders.text_shapes import shaped_texts
from loaders.texts import BadText, TextOptions, label_text
from loaders.views import View, check_parameters, stack
from loaders.workers import GuardedLoader, ReadingNotes

ATTEMPTS = 10
NUMBERS = ("label", "uid", "source", "seed", "step_seed")  # of a sample, one each


class GlobalOrder(Protocol):
    """What is asked of `loaders.order.Order`."""

    def global_batch(self, step: int) -> np.ndarray:
        """Sample ids (B,) int64 of a step."""


class TripletDataset(Dataset):
    """Triplets (image views, text views, label) addressed by (step, position, uid).

    Args:
        sources: data sets; the uid of sample i of source s is i plus the sizes of those before.
        label_space: global class ids, built from the same sources.
        views: V image views (`loaders.views.View`) of one size.
        texts: prompts, caption sources, and the number T of text views.
        tokenizer: list of n strings -> (n, L) int64, or pictures (n, 1, H, W) uint8.
        seed: of the run.
        caption_labels: `unique`: a caption has the label -1; `by_text`: equal captions share a
            label <= -2 (Florence, arXiv 2111.11432, section 2.2); of several captions, the one
            that is drawn first.
        decode: bytes -> what the views take (`loaders.decoders.decoder`).

    Raises `ConfigError` for an unknown `caption_labels`, and where only some views report their
    parameters.
    """

    def __init__(
        self,
        sources: Sequence[ShardSet],
        label_space: LabelSpace,
        views: Sequence[View],
        texts: TextOptions,
        tokenizer: Callable[[list[str]], Tensor],
        seed: int,
        caption_labels: str = "unique",
        decode: Decoder = decode,
    ) -> None:
        if caption_labels not in CAPTION_LABELS:
            raise ConfigError(
                f"data.caption_labels={caption_labels!r} is not one of {', '.join(CAPTION_LABELS)}"
            )
        check_parameters(views)
        self.sources, self.label_space, self.views = list(sources), label_space, list(views)
        self.texts, self.tokenizer, self.seed = texts, tokenizer, seed
        self.caption_labels, self.decode = caption_labels, decode
        self.ends = np.cumsum([len(source) for source in self.sources])
        self.notes = ReadingNotes(0)  # a worker gets its loader's

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, uid: int) -> tuple[int, int]:
        """(source, index in the source) of a global sample id."""
        source = int(np.searchsorted(self.ends, uid, side="right"))
        return source, int(uid) - self.uid(source, 0)

    def uid(self, source: int, index: int) -> int:
        """Global sample id of a sample of a source."""
        return int(self.ends[source]) - len(self.sources[source]) + index

    def describe(self, uid: int) -> dict[str, str]:
        """`source`, `shard` and `key` of a global sample id."""
        sample = self._describe(*self.locate(uid), "")
        return {"source": sample.source, "shard": sample.shard, "key": sample.key}

    def try_sources(self) -> None:
        """Make a sample of each source, so that what none of them has is said before a run.

        A bad one is replaced, as in training. Raises `DataError` as `__getitems__`, and for a
        caption source that none of some samples has.
        """
        for shards in self.sources:
            if shards.kind != "image_label":
                check_sources(shards, self.texts.recipes)
        # Short of its tokens: the workers of a process whose tokenizer has used its threads
        # would get none.
        with _generators_kept():
            for source in range(len(self.sources)):
                self._sample((0, 0, self.uid(source, 0)))

    def __getitem__(self, address: tuple[int, int, int]) -> dict:
        """Sample of one position; as `__getitems__`."""
        return self.__getitems__([address])[0]

    def __getitems__(self, addresses: Sequence[tuple[int, int, int]]) -> list[dict]:
        """Samples of several positions: image (V, 3, H, W) uint8, text (T, …), and numbers;
        augmentation (V, P) float32 where the views report it.

        Called by torch's loader; the texts of all are tokenized in one call, and the trainer's
        random state is put aside once. A bad sample is recorded and replaced by another of its
        source. Raises `DataError` after ATTEMPTS bad ones, and for a sample whose shard cannot
        be read or whose decoding fails.
        """
        with _generators_kept():
            samples = [self._sample(address) for address in addresses]
        ids = self.tokenizer([text for sample in samples for text in sample["text"]])
        for number, sample in enumerate(samples):
            sample["text"] = ids[number * self.texts.views : (number + 1) * self.texts.views]
        return samples

    def _sample(self, address: tuple[int, int, int]) -> dict:
        """One sample, its texts as strings."""
        step, position, uid = (int(number) for number in address)
        source, index = self.locate(uid)
        bad, caption = [], ("data.caption", self.texts.caption_source)
        for attempt in range(ATTEMPTS):
            if attempt:
                index = _hash(self.seed, step, position, attempt, "other") % len(
                    self.sources[source]
                )
            try:
                with self.notes.reading(source, index):
                    sample = self._make(source, index, _hash(self.seed, step, position, attempt))
            except (BadImage, BadText, MissingMember) as error:
                bad.append(self._describe(source, index, error.reason))
                caption = getattr(error, "where", None) or caption
            except (OSError, RuntimeError, ValueError, MemoryError) as error:
                where = self._describe(source, index, "")
                raise DataError(
                    f"{where.shard}, sample {where.key!r}: {type(error).__name__}: {error}"
                ) from error
            else:
                uid = self.uid(source, index)
                step_seed = _hash(self.seed, step) >> 1  # one for the whole global batch
                facts = {"uid": uid, "source": source, "step": step, "step_seed": step_seed}
                return {**sample, **facts, "bad": bad}
        raise DataError(describe_failure(self.sources[source], index, bad, caption))

    def _make(self, source: int, index: int, seed: int) -> dict:
        """Read one sample and draw its views; all randomness from `seed`."""
        shards = self.sources[source]
        rng = random.Random(seed)
        if shards.kind == "image_label":
            label = self.label_space.to_global(source, shards.label(index))
            names = self.label_space.names(label)
            texts = [label_text(names, self.texts.templates, rng) for _ in range(self.texts.views)]
        else:  # a `.cls` beside a caption is for evaluation and must not reach the loss
            texts, first = draw(shards, index, self.texts, rng)
            label = caption_group(first) if self.caption_labels == "by_text" else PAIR
        picture = self.decode(shards.read_image(index))
        _seed(seed)
        views = stack([view(picture) for view in self.views])
        return {**views, "text": texts, "label": label, "seed": seed >> 1}  # fits int64

    def _describe(self, source: int, index: int, reason: str) -> BadSample:
        shards = self.sources[source]
        return BadSample(shards.name, shards.shard_of(index), shards.key(index), reason)


class StepBatches(Sampler):
    """Micro-batches of one rank for steps start_step <= step < end_step, in order.

    Each is a list of (step, position, uid). Raises `ConfigError` if the global batch is not a
    multiple of world_size * micro_batch.
    """

    def __init__(
        self,
        order: GlobalOrder,
        rank: int,
        world_size: int,
        micro_batch: int,
        start_step: int,
        end_step: int,
    ) -> None:
        self._order, self._rank, self._micro_batch = order, rank, micro_batch
        self._steps = range(start_step, end_step)
        size = len(order.global_batch(start_step))
        if size % (world_size * micro_batch):
            raise ConfigError(
                f"global batch {size} is not a multiple of {world_size} ranks x micro-batch "
                f"{micro_batch}; change one of them"
            )
        self._share = size // world_size

    def __len__(self) -> int:
        return len(self._steps) * (self._share // self._micro_batch)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for step in self._steps:
            uids = self._order.global_batch(step)
            first = self._rank * self._share
            for start in range(first, first + self._share, self._micro_batch):
                positions = range(start, start + self._micro_batch)
                yield [(step, position, int(uids[position])) for position in positions]


def collate(samples: Sequence[dict], tokenizer: Callable | None = None) -> dict:
    """Samples of one micro-batch to a batch, whose keys docs/design.md ("Batch") describes.

    Every tensor of a sample is stacked.

    Args:
        tokenizer: of the texts; None leaves them as long as they are.
    """
    tensors = [name for name, value in samples[0].items() if isinstance(value, Tensor)]
    # In a worker it stacks straight into memory that is shared with the trainer.
    batch = {name: default_collate([sample[name] for sample in samples]) for name in tensors}
    batch |= shaped_texts(batch["text"], tokenizer)
    for name in NUMBERS:
        batch[name] = torch.tensor([sample[name] for sample in samples], dtype=torch.int64)
    batch["step"] = samples[0]["step"]
    batch["bad"] = [bad for sample in samples for bad in sample["bad"]]
    return batch


def make_loader(
    dataset: TripletDataset,
    order: GlobalOrder,
    rank: int,
    world_size: int,
    micro_batch: int,
    start_step: int,
    end_step: int,
    workers: int,
    notes: ReadingNotes | None = None,
    timeout: float = 0,
) -> GuardedLoader:
    """Loader of the micro-batches of one rank, in order; resuming is a later `start_step`.

    Args:
        notes: in which the workers note what they read. timeout: seconds after which a batch
            that has not come from the workers is a RuntimeError, for `notes.explain`; 0: none.
    """
    notes = notes or ReadingNotes(workers)
    return GuardedLoader(
        dataset,
        batch_sampler=StepBatches(order, rank, world_size, micro_batch, start_step, end_step),
        collate_fn=partial(collate, tokenizer=dataset.tokenizer),
        num_workers=workers,
        timeout=timeout if workers else 0,
        worker_init_fn=partial(_start_worker, notes=notes),
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else its start draws from the trainer's generator
    )


def _hash(*values: object) -> int:
    """A 64-bit number that depends on the values alone (`hash` differs between processes)."""
    return int.from_bytes(blake2b(repr(values).encode(), digest_size=8).digest(), "big")


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Put the states of the global CPU generators back afterwards."""
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)  # noqa: NPY002


def _seed(seed: int) -> None:
    """Seed the global CPU generators.

    torch.manual_seed would also seed the devices, whose generators belong to the trainer.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 timm draws from it
    torch.default_generator.manual_seed(seed)


def _start_worker(worker: int, notes: ReadingNotes) -> None:
    """Workers note what they read (torch has limited them to one thread each)."""
    # What the trainer holds is never collected here: looking at it would copy its memory pages.
    gc.freeze()
    notes.start(worker)
    torch.utils.data.get_worker_info().dataset.notes = notes
