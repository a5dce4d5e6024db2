"""`python -m tests.gpu.hooks HOOK ...`: `train.py` with something changed inside first."""

import sys
from collections.abc import Callable

import torch

FIRST, LAST = 5, 8  # steps that must not wait for the device


def deterministic() -> None:
    """Operators with one order of sums; torch warns of those that have none."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def no_waiting(set_mode: Callable[[str], None] = torch.cuda.set_sync_debug_mode) -> None:
    """An error wherever the host waits for the device in steps FIRST to LAST."""
    from engine.clock import Clock

    tick, steps = Clock.tick, 0

    def counted(self, *arguments, **options):
        nonlocal steps
        steps += 1  # called behind each step
        if steps == FIRST - 1:
            set_mode("error")
        if steps == LAST:
            set_mode("default")
        return tick(self, *arguments, **options)

    Clock.tick = counted


def say_modes() -> None:
    """`no_waiting` that only tells, for machines without a device."""
    no_waiting(lambda mode: print(f"waiting is: {mode}", flush=True))


if __name__ == "__main__":
    import train
    from loaders.errors import run_cli

    globals()[sys.argv.pop(1)]()
    run_cli(train.main)
