"""Which samples make the global batch of a step: a pure function of (seed, step).

Nothing is stored but the step, so resuming is a seek, and the order knows nothing of ranks,
workers or micro-batches: rank r of R takes the r-th contiguous slice of the global batch.

Sources are joined into *streams*; a stream runs through all its samples once per *pass*, in an
order drawn anew for each pass on two levels, so that reads stay near-sequential: its shards are
permuted and cut into blocks of a few shards, then the samples of a block are shuffled. A fixed
repeating pattern says which stream fills which position of the batch, for example
label, text, label, text … for the balanced sampler of UniCL ("the same number of image-label and
image-text pairs per epoch", arXiv 2204.03610 section 4; here exactly so in every global batch,
and on every rank and in every micro-batch of even size).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loaders.choices import SAMPLERS
from loaders.errors import ConfigError, DataError


@dataclass(frozen=True)
class Source:
    """What the order needs to know of a data set: name, kind and samples per shard."""

    name: str
    kind: str  # image_label | image_text
    shard_sizes: np.ndarray


@dataclass(frozen=True)
class Stream:
    """Sources (by index) that are shuffled together, and their share of the batch."""

    name: str
    sources: tuple[int, ...]
    weight: int


class Order:
    """Sample ids of every global batch.

    The id (uid) of sample i of source s is i plus the number of samples of sources before s.

    Args:
        sources: all data sets, in the order of the configuration.
        streams: how they are joined; see `plan_streams`.
        batch_size: samples of a global batch.
        seed: any non-negative integer.
        block_shards: shards whose samples are shuffled together.

    Raises:
        ConfigError: the batch cannot hold the exact shares that the weights ask for.
        DataError: a stream has fewer samples than its share of one batch.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        streams: Sequence[Stream],
        batch_size: int,
        seed: int,
        block_shards: int = 16,
    ):
        self.batch_size, self.seed, self.block_shards = batch_size, seed, block_shards
        self.streams = list(streams)
        sizes = [np.asarray(source.shard_sizes, dtype=np.int64) for source in sources]
        starts = np.cumsum([0, *(int(s.sum()) for s in sizes)])
        self._shards = []  # per stream: (first uid, size) of each of its shards
        for stream in self.streams:
            parts = [_shard_table(sizes[s], starts[s]) for s in stream.sources]
            self._shards.append(np.concatenate(parts))
        self.stream_sizes = [int(table[:, 1].sum()) for table in self._shards]
        self.shares = self._shares()  # samples of each stream in a global batch that it is in
        self._blocks: dict[tuple[int, int, int], np.ndarray] = {}
        self._passes: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._check()

    def _shares(self) -> list[int]:
        self._pattern = _pattern([stream.weight for stream in self.streams])
        period = len(self._pattern)
        if len(self.streams) > 1 and self.batch_size % period:
            shares = ", ".join(f"{s.name}: {s.weight}" for s in self.streams)
            raise ConfigError(
                f"train.global_batch={self.batch_size} cannot be split exactly by the sampler's "
                f"shares ({shares}); use a multiple of {period}"
            )
        return [round(stream.weight * self.batch_size / period) for stream in self.streams]

    def _check(self) -> None:
        for stream, size, share in zip(self.streams, self.stream_sizes, self.shares, strict=True):
            if size < share:
                raise DataError(
                    f"{stream.name} has {size} samples, fewer than the {share} of them that one "
                    f"global batch of {self.batch_size} needs; lower train.global_batch"
                )

    def passes(self, step: int) -> list[float]:
        """How often each stream has been run through before `step`."""
        return [step * n / size for n, size in zip(self.shares, self.stream_sizes, strict=True)]

    def global_batch(self, step: int) -> np.ndarray:
        """Sample ids (batch_size,) int64 of the global batch of `step` (0-based)."""
        which = np.resize(self._pattern, self.batch_size)
        batch = np.empty(self.batch_size, dtype=np.int64)
        for stream, share in enumerate(self.shares):
            batch[which == stream] = self._take(stream, step * share, share)
        return batch

    def _take(self, stream: int, position: int, count: int) -> np.ndarray:
        """`count` uids from a position of the endless stream; crosses blocks and passes."""
        parts = []
        while count:
            turn, offset = divmod(position, self.stream_sizes[stream])
            _, ends = self._pass(stream, turn)
            block = int(np.searchsorted(ends, offset, side="right"))
            inside = offset - (int(ends[block - 1]) if block else 0)
            part = self._block(stream, turn, block)[inside : inside + count]
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return np.concatenate(parts)

    def _pass(self, stream: int, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard order of a pass, and where each block of shards ends in it."""
        key = (stream, turn)
        if key not in self._passes:
            if len(self._passes) > 2 * len(self.streams):
                self._passes.clear()
            table = self._shards[stream]
            order = permutation(len(table), (self.seed, stream, turn))
            ends = np.cumsum(table[order, 1])
            last = np.arange(self.block_shards - 1, len(table) - 1, self.block_shards)
            self._passes[key] = order, ends[np.append(last, len(table) - 1)]
        return self._passes[key]

    def _block(self, stream: int, turn: int, block: int) -> np.ndarray:
        """Shuffled uids of one block of shards."""
        key = (stream, turn, block)
        if key not in self._blocks:
            if len(self._blocks) > 2 * len(self.streams):
                self._blocks.clear()
            order, _ = self._pass(stream, turn)
            rows = order[block * self.block_shards : (block + 1) * self.block_shards]
            table = self._shards[stream][rows]
            uids = np.concatenate([np.arange(first, first + size) for first, size in table])
            shuffle = permutation(len(uids), (self.seed, stream, turn, block + 1))
            self._blocks[key] = uids[shuffle]
        return self._blocks[key]


def plan_streams(
    sources: Sequence[Source], sampler: str, ratios: Mapping[str, int] | None = None
) -> list[Stream]:
    """Streams of a named sampler.

    Args:
        sources: all data sets.
        sampler: `balanced` (image-label and image-text half and half; one kind alone fills the
            batch), `proportional` (everything shuffled together), `ratio` (`ratios`), `one_source`
            (each batch of one source: `loaders.one_source`).
        ratios: whole-numbered share of each source by name. `ratio` needs them, of the samples of
            every batch; for `one_source` they are shares of the steps instead of the sizes.

    Raises:
        ConfigError: unknown sampler, ratios for another one, or ratios that do not name every
            source with a positive whole number.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"data.sampler={sampler!r} is unknown; there are {', '.join(SAMPLERS)}")
    if bool(ratios) != (sampler == "ratio") and sampler != "one_source":
        raise ConfigError(
            "data.ratios belongs to data.sampler=ratio, which needs it, and to one_source"
        )
    every = range(len(sources))
    if sampler == "proportional":
        return [Stream("all sources", tuple(every), 1)]
    if sampler == "balanced":
        kinds = [k for k in ("image_label", "image_text") if any(s.kind == k for s in sources)]
        return [Stream(k, tuple(i for i in every if sources[i].kind == k), 1) for k in kinds]
    names = [source.name for source in sources]
    if not ratios:
        sizes = [int(np.sum(source.shard_sizes)) for source in sources]
        return [Stream(name, (i,), sizes[i]) for i, name in enumerate(names)]
    if sorted(ratios) != sorted(names) or any(int(r) != r or r < 1 for r in ratios.values()):
        raise ConfigError(
            f"data.ratios must give a whole number of at least 1 to each of {', '.join(names)}"
        )
    divisor = math.gcd(*(int(r) for r in ratios.values()))
    return [Stream(name, (i,), int(ratios[name]) // divisor) for i, name in enumerate(names)]


def _shard_table(sizes: np.ndarray, start: int) -> np.ndarray:
    ends = start + np.cumsum(sizes)
    return np.stack([ends - sizes, sizes], axis=1)


def _pattern(weights: Sequence[int]) -> np.ndarray:
    """Stream numbers, each as often as its weight, spread as evenly as possible."""
    total, credit, pattern = sum(weights), [0] * len(weights), []
    for _ in range(total):
        credit = [c + w for c, w in zip(credit, weights, strict=True)]
        pattern.append(int(np.argmax(credit)))
        credit[pattern[-1]] -= total
    return np.asarray(pattern)


def permutation(length: int, key: tuple[int, ...]) -> np.ndarray:
    """A permutation that depends on `key` alone.

    From the raw bits of Philox, whose stream numpy guarantees for all versions (unlike that of
    `Generator.permutation`), so that a resumed run sees the same order after an upgrade.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(bits, kind="stable")
