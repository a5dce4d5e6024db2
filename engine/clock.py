"""Speed and remaining time, measured over the last window of steps."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

SLOW = 0.5  # of the median speed; below it a window is worth a warning
ENOUGH = 5  # windows that make a median


class Clock:
    """Samples per second, share of time spent waiting for data, and time left.

    Args:
        global_batch: how many samples a step has. steps: how many steps the whole run has.
        window: how many steps are looked back on; the first step of a process, which warms up, is
            left out. now: returns the time in seconds.
    """

    def __init__(
        self,
        global_batch: int,
        steps: int,
        window: int = 50,
        now: Callable[[], float] = time.perf_counter,
    ):
        self.global_batch, self.steps, self.now = global_batch, steps, now
        self.marks: deque[tuple[float, float]] = deque(maxlen=window + 1)
        self.waiting = self.left_out = 0.0
        self.ticks = 0
        self.speeds: list[float] = []  # samples/s between two reads, of this process
        self.last_read: tuple[int, float] | None = None

    def waited(self, seconds: float) -> None:
        """Add time that a step spent waiting for its data."""
        self.waiting += seconds

    def tick(self) -> None:
        """Call at the end of each step."""
        self.ticks += 1
        self.marks.append((self.now() - self.left_out, self.waiting))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of something else than training: a save, an evaluation."""
        start = self.now()
        yield
        self.left_out += self.now() - start

    def read(self, done: int, waits: Sequence[float]) -> dict[str, float]:
        """Facts for the log; there are none before two steps.

        Args:
            done: how many steps are done. waits: seconds that each rank waited for data since the
                last read.

        Returns:
            `samples_per_second`, `data_seconds` per step and `eta_seconds` over the steps looked
            back on. Over the steps since the last read: `data_share`, the largest share of the
            time that a rank waited for data, and `speed_ratio`, the speed divided by the median of
            such speeds of this process, once ENOUGH of them are known.
        """
        if len(self.marks) < 2:
            return {}
        (start, waited), (end, waiting) = self.marks[0], self.marks[-1]
        seconds = (end - start) / (len(self.marks) - 1)
        facts = {
            "samples_per_second": self.global_batch / seconds,
            "data_seconds": (waiting - waited) / (len(self.marks) - 1),
            "eta_seconds": seconds * (self.steps - done),
        }
        before, self.last_read = self.last_read, (self.ticks, end)
        if before is not None and self.ticks > before[0]:
            facts["data_share"] = max(waits) / (end - before[1])
            speed = self.global_batch * (self.ticks - before[0]) / (end - before[1])
            if len(self.speeds) >= ENOUGH:
                facts["speed_ratio"] = speed / statistics.median(self.speeds)
            self.speeds.append(speed)
        return facts


def slow_line(facts: dict[str, float], waits: Sequence[float]) -> str | None:
    """A warning for a window slower than SLOW times the median, or None.

    Args:
        facts: what `Clock.read` returned. waits: what it was given.
    """
    ratio = facts.get("speed_ratio", 1.0)
    if ratio >= SLOW:
        return None
    share, rank = facts["data_share"], max(range(len(waits)), key=waits.__getitem__)
    advice = (
        "its file system or data.workers are the bottleneck"
        if share > 0.5
        else "data is not the reason: look at other jobs on the nodes, clocks, the network"
    )
    return (
        f"warning: this window ran at {100 * ratio:.0f} % of the run's median speed; rank {rank} "
        f"waited for data {100 * share:.0f} % of the time, the most of all ranks: {advice}"
    )


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
