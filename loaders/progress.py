"""How far long work has come: a bar on a terminal, and a plain line now and then anywhere else.

The one place that uses tqdm. The output of a batch job or a pipe gets whole lines, at most one in
EVERY seconds and one at the end, and no carriage return.
"""

import sys
import threading
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

EVERY = 30.0  # seconds between two plain lines
REFRESH = 0.5  # seconds between two states of a bar on a terminal


class Progress(tqdm):
    """Counts what is done; iterates over `items`, or is told by `update(n)`, also with n = 0.

    Args:
        items: what is iterated over, counted one by one; None: `update` counts.
        desc: what is done. unit: what is counted.
        total: how many there will be; None: as many as `items` has, if that is known.
        initial: how many were done before, and are in `total`.
        scaled: numbers as 1.05G, for bytes. after: seconds before which nothing is shown.
        leave: whether the last state stays. show: False shows nothing at all.
        file: where to; None: stderr.
    """

    # Each update looks at the clock, so no thread has to; and the lock is this process's own, for
    # a process that is forked and killed may hold it.
    monitor_interval = 0
    _lock = threading.RLock()

    def __init__(
        self,
        items: Iterable | None = None,
        *,
        desc: str,
        unit: str,
        total: int | None = None,
        initial: int = 0,
        scaled: bool = False,
        after: float = 0.0,
        leave: bool = True,
        show: bool = True,
        file: TextIO | None = None,
    ):
        file = file or sys.stderr
        self.plain, self.after, self.shown = not file.isatty(), after, None
        look: dict[str, Any] = {"mininterval": REFRESH, "delay": after, "dynamic_ncols": True}
        if self.plain:
            look = {"mininterval": EVERY, "delay": EVERY}
        super().__init__(
            items, desc, total, leave, file, initial=initial, unit=unit, unit_scale=scaled,
            miniters=0, disable=not show, **look,
        )  # fmt: skip

    @property
    def line(self) -> str:
        """The state in plain words; with the time that is left, unless this is the last state."""
        facts = self.format_dict
        elapsed, rate = facts["elapsed"], facts["rate"]
        if rate is None and elapsed:
            rate = (self.n - self.initial) / elapsed
        count = self._count(self.n)
        if self.total:
            share = 100 * self.n / self.total
            count = f"{self._number(self.n)} of {self._count(self.total)} ({share:.0f} %)"
        words = f"{self.desc}: {count}, {self._count(rate or 0)}/s, "
        words += f"{self.format_interval(elapsed)} elapsed"
        if self.total and rate and self.n < self.total and not self.disable:
            words += f", {self.format_interval((self.total - self.n) / rate)} left"
        return words + (f", {self.postfix}" if self.postfix else "")

    def _number(self, value: float) -> str:
        if self.unit_scale:
            return self.format_sizeof(value)
        return str(value) if isinstance(value, int) else f"{value:.{2 if value < 10 else 0}f}"

    def _count(self, value: float) -> str:
        return f"{self._number(value)}{'' if self.unit_scale else ' '}{self.unit}"

    def name(self, desc: str) -> None:
        """Another text for what is done, shown with the next state."""
        self.set_description_str(desc, refresh=False)

    def quiet(self) -> None:
        """Something else has just said how it goes: the next plain line comes EVERY seconds on."""
        if self.plain:
            self.last_print_t = self._time()

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show the state now; tqdm asks for it when one is due."""
        if not self.plain:
            return super().display(msg, pos)
        self.fp.write(f"{self.line}\n")
        self.fp.flush()
        self.last_print_t, self.shown = self._time(), self.n
        return True

    def refresh(self, nolock: bool = False, lock_args: tuple | None = None) -> None:
        """As tqdm's, but a plain line is written only when one is due."""
        if not self.plain or self._time() - self.last_print_t >= EVERY:
            super().refresh(nolock, lock_args)

    def clear(self, nolock: bool = False) -> None:
        """As tqdm's; plain lines stay."""
        if not self.plain:
            super().clear(nolock)

    def close(self) -> None:
        """Show the last state, with the rate over all the time, and end."""
        if self.disable or not self.plain:
            super().close()
            return
        self.disable = True
        self._decr_instances(self)
        new = self.n != self.shown
        if self.leave and new and self._time() - self.start_t >= self.after:
            self._ema_dt = lambda: None  # no moving average
            self.display()
