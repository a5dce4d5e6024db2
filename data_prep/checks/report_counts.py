"""Counters for report.py: the fate of rows, sizes of images, captions, repeated files.

Memory: 2 bytes a row of the list, 8 bytes a caption and an image, and the distinct words.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.download.reasons import SUCCESS, reason_group

PERCENTILES = (5, 50, 95)
MOST_COMMON = 10
SIZES = ("width", "height", "original_width", "original_height")
_PUNCTUATION = "".join(map(chr, range(33, 48))) + ":;<=>?@[\\]^_`{|}~…“”„‘’«»–—"


class Rows:
    """The fate of every row of the list over all attempts: kept if one succeeded, else the
    reason of the last."""

    def __init__(self) -> None:
        self.known = True  # whether every shard says which rows it tried
        self.groups = ["", SUCCESS]
        self.state = np.zeros(0, dtype=np.uint8)  # 0: not tried, 1: kept, 2 and on: reason
        self.tries = np.zeros(0, dtype=np.uint8)

    def add(self, table: pa.Table | None) -> None:
        """The rows of one shard; None or without `row`: it does not name them."""
        if table is None or "row" not in table.column_names:
            self.known = False
            return
        rows = table["row"].to_numpy()
        grow = int(rows.max(initial=-1)) + 1 - len(self.state)
        if grow > 0:
            grow = max(grow, len(self.state) // 2)  # so that growing is rare
            self.state = np.pad(self.state, (0, grow))
            self.tries = np.pad(self.tries, (0, grow))
        succeeded = pc.equal(table["status"], SUCCESS)
        messages = pc.if_else(succeeded, SUCCESS, pc.fill_null(table["error_message"], ""))
        coded = messages.combine_chunks().dictionary_encode()
        codes = np.array([self._code(text) for text in coded.dictionary.to_pylist()], np.uint8)
        code = codes[coded.indices.to_numpy()]
        self.state[rows] = np.where(self.state[rows] == 1, 1, code)
        self.tries[rows] += 1

    def _code(self, message: str) -> int:
        group = reason_group(message)
        if group not in self.groups:
            self.groups.append(group)
        return self.groups.index(group)

    def summary(self) -> dict:
        """Counts over the rows tried so far."""
        numbers = np.bincount(self.state, minlength=len(self.groups))
        again = self.tries > 1
        return {
            "attempted": int(numbers[1:].sum()),
            "kept": int(numbers[1]),
            "reasons": {
                self.groups[i]: int(numbers[i])
                for i in np.argsort(-numbers[2:], kind="stable") + 2
                if numbers[i]
            },
            "retried": int(again.sum()),
            "recovered": int((again & (self.state == 1)).sum()),
        }


class Sizes:
    """Histogram of every width and height."""

    def __init__(self) -> None:
        self.counts: dict[str, np.ndarray] = {}

    def add(self, table: pa.Table) -> None:
        for name in set(SIZES).intersection(table.column_names):
            values = table[name].drop_null().to_numpy().astype(np.int64)
            self.counts[name] = _sum(self.counts.get(name), np.bincount(values))

    def percentiles(self) -> dict[str, dict[int, int]]:
        """Pixels at each of `PERCENTILES`, by column."""
        return {
            name: {
                q: int(np.searchsorted(np.cumsum(counts), q / 100 * counts.sum()))
                for q in PERCENTILES
            }
            for name in SIZES
            if (counts := self.counts.get(name)) is not None and counts.sum()
        }


class Texts:
    """Length, words and repetitions of captions."""

    def __init__(self) -> None:
        self.words: set[str] = set()
        self.lengths = np.zeros(1, dtype=np.int64)  # captions by number of words
        self.hashes: list[np.ndarray] = []  # of each shard: 8 bytes a caption instead of its text

    def add(self, captions: list[str]) -> None:
        split = [text.split() for text in captions]
        self.words.update(word.strip(_PUNCTUATION).casefold() for text in split for word in text)
        self.lengths = _sum(self.lengths, np.bincount([len(text) for text in split], minlength=1))
        self.hashes.append(np.fromiter(map(hash, captions), np.int64, len(captions)))

    def summary(self, captions_of: Callable[[int], list[str]]) -> dict | None:
        """Counts, and the most common captions; None if there are none. `captions_of(n)` reads
        those of the n-th shard that was added."""
        number = int(self.lengths.sum())
        if not number:
            return None
        words = int((self.lengths * np.arange(len(self.lengths))).sum())
        return {
            "count": number,
            "empty": int(self.lengths[0]),
            "mean_words": words / number,
            "distinct_words": len(self.words - {""}),
            "most_common": self._most_common(captions_of),
        }

    def _most_common(self, captions_of: Callable[[int], list[str]]) -> list[tuple[str, int]]:
        """Captions that occur more than once, found again by the place of their first."""
        _, first, times = np.unique(
            np.concatenate(self.hashes), return_index=True, return_counts=True
        )
        ends = np.cumsum([len(hashes) for hashes in self.hashes])
        found = []
        for i in np.argsort(-times, kind="stable")[:MOST_COMMON]:
            if times[i] > 1:
                shard = int(np.searchsorted(ends, first[i], side="right"))
                texts = captions_of(shard)
                found.append((texts[int(first[i] - ends[shard]) + len(texts)], int(times[i])))
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def _sum(a: np.ndarray | None, b: np.ndarray) -> np.ndarray:
    """Sum of two histograms of unequal length."""
    if a is None:
        return b
    size = max(len(a), len(b))
    return np.pad(a, (0, size - len(a))) + np.pad(b, (0, size - len(b)))


class Files:
    """Images by the sha256 of the bytes that were downloaded."""

    def __init__(self) -> None:
        self._prefixes: list[np.ndarray] = []

    def add(self, table: pa.Table) -> None:
        """The kept rows of one shard."""
        if "sha256" in table.column_names:
            # 64 bits of 256: that two of 15 million differing files agree has probability 6e-6.
            texts = table["sha256"].drop_null().to_pylist()
            self._prefixes.append(np.array([int(text[:16], 16) for text in texts], np.uint64))

    def summary(self) -> dict | None:
        """Images, distinct ones, and the difference; None where no hash is recorded."""
        if not self._prefixes:
            return None
        every = np.concatenate(self._prefixes)
        distinct = len(np.unique(every))
        return {"images": len(every), "distinct": distinct, "repeated": len(every) - distinct}
