"""USR1 and TERM set a flag; the loop acts on it at the edge of a step, on all ranks together."""

import signal


class StopRequest:
    """Catches SIGUSR1 (SLURM's warning before the time limit) and SIGTERM (preemption)."""

    def __init__(self):
        self.received: str | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._catch)

    def _catch(self, number: int, _frame) -> None:
        self.received = signal.Signals(number).name
