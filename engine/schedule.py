"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

SCHEDULES = ("cosine", "constant")


def learning_rate(
    step: int, steps: int, warmup: int, lr: float, warmup_lr: float, min_lr: float, schedule: str
) -> float:
    """Learning rate of the update number `step` (0-based).

    It rises linearly from `warmup_lr` to `lr` over `warmup` steps. Then it is constant, or follows
    half a cosine that ends at `min_lr` after `steps` steps (Loshchilov and Hutter, arXiv
    1608.03983, one cycle).
    """
    if step < warmup:
        return warmup_lr + (lr - warmup_lr) * (step + 1) / warmup
    if schedule == "constant":
        return lr
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
