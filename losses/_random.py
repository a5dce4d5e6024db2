"""Random numbers on the device that are a function of a sample's seed, and of nothing else.

torch's generator cannot serve here: its state depends on the rank and the micro-batch, so masks,
coins and mixing coefficients would change with the number of ranks. A counter-based generator has
no state: number k of a sample is a hash of (seed of the sample, k). The batch carries the seeds,
`seed` for what belongs to a sample and `step_seed` for what all samples of a step share.

The hash is the output function of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014; constants of `java.util.SplittableRandom`), applied to the seed and
again to its sum with k. It is integer arithmetic, so CPUs and GPUs give the same bits.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def _signed(bits: int) -> int:
    """A 64-bit pattern as the int64 that has it, for torch has no arithmetic on uint64."""
    return bits - 2**64 if bits >= 2**63 else bits


GAMMA = _signed(0x9E3779B97F4A7C15)  # odd, near 2**64 / golden ratio: the step of the counter
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def uniform(seed: Tensor, *shape: int) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2**-24, each sample's a function of its seed alone.

    Two calls with the same seed give the same numbers: whoever needs several draws asks for one
    tensor with all of them.

    Args:
        seed: (b,) int64, any numbers; near ones (0, 1, 2) give unrelated samples.
        shape: of what each sample gets.

    Returns:
        (b, *shape) float32 on the device of `seed`.
    """
    count = torch.Size(shape).numel()
    position = torch.arange(1, count + 1, device=seed.device)
    bits = _mix(_mix(seed)[:, None] + position * GAMMA)
    # The upper 24 bits: a float32 holds exactly so many.
    return (_shifted(bits, 40).float() * 2.0**-24).view(len(seed), *shape)


def symmetric_beta(first: Tensor, second: Tensor, concentration: float) -> Tensor:
    """Numbers of the distribution Beta(c, c), by Jöhnk's rejection: with u and v uniform and
    X = u^(1/c), Y = v^(1/c), X / (X + Y) has it, given that X + Y <= 1.

    Args:
        first, second: (b, n) of `uniform`; the first accepted pair of a row counts, the last one
            if none is. A pair is rejected with probability 0.02 for c = 0.1, and 1/2 for c = 1.
        concentration: c in (0, 1]; beyond, most pairs are rejected.

    Returns:
        (b,) float32 in [0, 1].
    """
    # Half a step from 0, and in logarithms, because the powers of small numbers vanish.
    x, y = ((number + 2.0**-25).log() / concentration for number in (first, second))
    accepted = F.pad((torch.logaddexp(x, y) <= 0)[:, :-1], (0, 1), value=True)
    place = accepted.to(torch.uint8).argmax(dim=1, keepdim=True)
    return torch.sigmoid((x - y).gather(1, place)[:, 0])


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's output function, a bijection of int64 that changes half of all bits."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Shift to the right that fills with zeros; torch's own fills with the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)
