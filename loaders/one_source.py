"""The sampler `one_source`: each global batch comes from one data set, as in ZeroVL.

ZeroVL (arXiv 2112.09331, "debiased sampling") draws the data set of each step with a probability
proportional to its size, so that a batch does not tell data sets apart. Here the numbers are exact:
the steps are cut into blocks of BLOCK, the sets share each block by their weights, and only the
order in a block is random. Which set a step has, and how many steps it had before, are functions of
(seed, step), so resuming is a seek here too.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from loaders.order import Order, permutation

BLOCK = 1024  # steps


class OneSourceOrder(Order):
    """`Order` whose global batches are of one stream each.

    The weight of a stream is its share of the steps. Arguments and errors as of `Order`; a stream
    that is smaller than a whole global batch is refused.
    """

    _block_plan: tuple[int, list[int], np.ndarray] | None = None  # of the block asked for last

    def _shares(self) -> list[int]:
        return [self.batch_size] * len(self.streams)

    def stream_of(self, step: int) -> int:
        """Number of the stream that fills the global batch of `step` (0-based)."""
        _, streams = self._plan(step // BLOCK)
        return int(streams[step % BLOCK])

    def steps_of(self, step: int) -> list[int]:
        """How many of the steps before `step` each stream has filled."""
        before, streams = self._plan(step // BLOCK)
        inside = np.bincount(streams[: step % BLOCK], minlength=len(self.streams))
        return [earlier + int(now) for earlier, now in zip(before, inside, strict=True)]

    def passes(self, step: int) -> list[float]:
        """How often each stream has been run through before `step`."""
        done = zip(self.steps_of(step), self.stream_sizes, strict=True)
        return [steps * self.batch_size / size for steps, size in done]

    def global_batch(self, step: int) -> np.ndarray:
        """Sample ids (batch_size,) int64 of the global batch of `step` (0-based)."""
        stream = self.stream_of(step)
        return self._take(stream, self.steps_of(step)[stream] * self.batch_size, self.batch_size)

    def _plan(self, block: int) -> tuple[list[int], np.ndarray]:
        """Steps of each stream before a block, and the stream of each of its steps (BLOCK,)."""
        if self._block_plan is None or self._block_plan[0] != block:
            weights = [stream.weight for stream in self.streams]
            before, after = (shared(blocks * BLOCK, weights) for blocks in (block, block + 1))
            counts = np.subtract(after, before)
            streams = np.repeat(np.arange(len(weights)), counts)
            # In the place of a stream's number stands one that no stream has.
            order = permutation(BLOCK, (self.seed, len(weights), block))
            self._block_plan = block, before, streams[order]
        return self._block_plan[1:]


def shared(total: int, weights: Sequence[int]) -> list[int]:
    """`total` steps shared by weights, by the method of Sainte-Laguë.

    Each of the steps goes to the weight w with the largest w / (2 n + 1), n being the steps that it
    has, the first of equal ones. So no count falls when `total` grows, which sharing by largest
    remainders does not promise, and each stays beside its exact share.

    Args:
        total: number of steps. weights: positive whole numbers.
    """
    whole = sum(weights)
    # A lower bound of the result, from which the last few steps are given one by one.
    counts = [max(0, total * weight // whole - len(weights)) for weight in weights]
    for _ in range(total - sum(counts)):
        claims = [Fraction(w, 2 * n + 1) for w, n in zip(weights, counts, strict=True)]
        counts[claims.index(max(claims))] += 1
    return counts
