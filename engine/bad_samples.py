"""RUN/bad_samples.tsv: every sample of all ranks that could not be used, with step and reason.

The ranks keep theirs until a line of the log, or a checkpoint, is due; then rank 0 appends all.
Like metrics.jsonl the file is cut to the steps done when a run is continued.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch.distributed

from engine import dist
from engine.log import replace_lines
from loaders.batch import BadSample, BadSampleCounter
from loaders.printable import printable

NAME = "bad_samples.tsv"
HEADER = ("source", "shard", "key", "reason", "step")


class BadSamples:
    """Bad samples of the run.

    Args:
        folder: the run folder. max_fraction: of the samples seen; more end the run.
    """

    def __init__(self, folder: Path, max_fraction: float):
        self.path = folder / NAME
        self.own = BadSampleCounter(max_fraction)
        self.waiting: list[tuple[str, ...]] = []  # rows of this rank that are not written yet
        self.counts: Counter[tuple[str, str]] = Counter()  # rank 0: of the whole run
        self.bad = self.seen = 0  # of all ranks in this start

    def begin(self, done: int) -> None:
        """The run goes on after `done` steps: later rows of an earlier attempt are cut."""
        if dist.rank() or not self.path.exists():
            return
        rows = [line.split("\t") for line in self.path.read_text(encoding="utf-8").splitlines()]
        kept = [
            row
            for row in rows[1:]
            # A line that a kill cut off has no number at its end.
            if len(row) == len(HEADER) and row[-1].isdigit() and int(row[-1]) <= done
        ]
        self.counts = Counter((row[0], row[3]) for row in kept)
        replace_lines(self.path, ["\t".join(row) for row in (HEADER, *kept)])

    def add(self, step: int, bad: Sequence[BadSample], seen: int) -> None:
        """Those of this rank among the `seen` samples of a step."""
        self.own.update(bad, seen)
        self.waiting += [tuple(_field(part) for part in (*sample, str(step))) for sample in bad]

    def write(self, count: int) -> str | None:
        """Append what waits on all ranks; collective if `count` is not 0.

        Args:
            count: 0 if no rank has any, the same on all ranks.

        Returns:
            On rank 0 what to say of the first bad sample of the run, else None.
        """
        if not count:
            return None
        parts = [self.waiting]
        if dist.world_size() > 1:
            parts = [[] for _ in range(dist.world_size())]
            torch.distributed.all_gather_object(parts, self.waiting)
        self.waiting = []
        rows = sorted((row for part in parts for row in part), key=lambda row: int(row[-1]))
        if dist.rank() or not rows:
            return None
        known = bool(self.counts)
        new = not self.path.exists()
        self.counts.update((row[0], row[3]) for row in rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines("\t".join(row) + "\n" for row in ([HEADER] if new else []) + rows)
        if known:
            return None
        source, shard, key, reason, step = rows[0]
        return (
            f"first bad sample: {shard}, sample {key!r} of {source} in step {step}: {reason}; "
            f"another took its place. All are listed in {self.path}"
        )

    def check(self, bad: int, seen: int) -> None:
        """Add a window's samples of all ranks; raises `TooManyBadSamples` above the fraction."""
        self.bad += bad
        self.seen += seen
        self.own.check(self.bad, self.seen)

    def totals(self) -> str | None:
        """On rank 0 the counts by source and reason, most frequent first; None without any."""
        if not self.counts:
            return None
        counts = ", ".join(f"{n} {reason} in {s}" for (s, reason), n in self.counts.most_common())
        return f"{self.counts.total()} bad samples: {counts}; listed in {self.path}"


def _field(text: str) -> str:
    """Harmless on a terminal, and without the characters that end a field or a line."""
    return printable(text).replace("\t", "\\t").replace("\n", "\\n")
