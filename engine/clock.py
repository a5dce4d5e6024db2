"""Speed and remaining time, measured over the last window of steps."""

import time
from collections import deque


class Clock:
    """Samples per second, share of time spent waiting for data, and time left.

    Args:
        global_batch: samples of a step. steps: of the whole run. window: steps looked back on;
            the first step of a process, which warms up, is left out.
    """

    def __init__(self, global_batch: int, steps: int, window: int = 50):
        self.global_batch, self.steps = global_batch, steps
        self.marks: deque[tuple[float, float]] = deque(maxlen=window + 1)
        self.waiting = 0.0

    def waited(self, seconds: float) -> None:
        """Add time that a step spent waiting for its data."""
        self.waiting += seconds

    def tick(self) -> None:
        """Call at the end of each step."""
        self.marks.append((time.perf_counter(), self.waiting))

    def pause(self) -> None:
        """Leave out the time until the next step: something else than training took it."""
        self.marks.clear()

    def read(self, done: int) -> dict[str, float]:
        """`samples_per_second`, `data_seconds` per step, `eta_seconds`; empty before two steps."""
        if len(self.marks) < 2:
            return {}
        (start, waited), (end, waiting) = self.marks[0], self.marks[-1]
        seconds = (end - start) / (len(self.marks) - 1)
        return {
            "samples_per_second": self.global_batch / seconds,
            "data_seconds": (waiting - waited) / (len(self.marks) - 1),
            "eta_seconds": seconds * (self.steps - done),
        }


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
