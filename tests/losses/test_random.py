"""Numbers from seeds: an implementation of its own, uniformity, and no dependence on the batch."""

import numpy as np
import pytest
import torch

from losses._random import symmetric_beta, uniform

# Of the published generator: SplittableRandom with seed 0 (also the first line of the test vectors
# that come with xoshiro's splitmix64.c).
FIRST_OF_ZERO = 0xE220A8397B1DCDAF


def mix(bits):
    """SplitMix64's output function in unsigned Python integers."""
    full = 2**64 - 1
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & full
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & full
    return bits ^ (bits >> 31)


def reference(seed, count):
    """The numbers of one sample, one by one."""
    start = mix(seed % 2**64)
    bits = [mix((start + k * 0x9E3779B97F4A7C15) % 2**64) for k in range(1, count + 1)]
    return np.array([b >> 40 for b in bits], dtype=np.float32) / np.float32(2**24)


def test_the_hash_is_the_published_one():
    assert mix(0x9E3779B97F4A7C15) == FIRST_OF_ZERO
    # Seed 0 is a fixed point of the hash, so its numbers are those of the published generator.
    assert uniform(torch.tensor([0]), 1).item() == (FIRST_OF_ZERO >> 40) / 2**24


def test_numbers_equal_those_of_unsigned_arithmetic():
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789]
    actual = uniform(torch.tensor(seeds), 3, 5)
    assert actual.dtype == torch.float32
    assert actual.shape == (6, 3, 5)
    for row, seed in zip(actual, seeds, strict=True):
        np.testing.assert_array_equal(row.reshape(-1).numpy(), reference(seed, 15))


def test_pinned_because_runs_continue_on_other_versions():
    actual = uniform(torch.tensor([7, -7]), 3) * 2**24
    # What `reference` gave when this test was written.
    assert actual.tolist() == [[8797065, 5069051, 15787297], [10722193, 2292895, 14336690]]


def test_a_sample_does_not_depend_on_the_others():
    seeds = torch.randint(-(2**62), 2**62, (64,), generator=torch.Generator().manual_seed(0))
    whole = uniform(seeds, 10)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(uniform(seeds[order], 10), whole[order])
    pieces = torch.cat([uniform(part, 10) for part in seeds.split([1, 20, 0, 43])])
    assert torch.equal(pieces, whole)
    before = torch.random.get_rng_state()
    assert torch.equal(uniform(seeds, 2, 5).view(64, 10), whole)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_uniform_and_uncorrelated_for_consecutive_seeds_and_positions():
    numbers = uniform(torch.arange(1000), 1000).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, bins=100, min=0, max=1)
    chi_squared = ((counts - 1e4) ** 2 / 1e4).sum().item()
    assert 29 < chi_squared < 169  # 99 degrees of freedom: 99 +- 5 standard deviations of 14
    centred = (numbers - 0.5) * 12**0.5
    for shifted, own in (
        (centred[1:], centred[:-1]),  # the next sample
        (centred[:, 1:], centred[:, :-1]),  # the next position
        (centred[:, 8:], centred[:, :-8]),
        (centred.T, centred),  # position and seed exchanged; a diagonal of 1000 is the same
    ):
        assert abs((shifted * own).mean().item()) < 5e-3  # 5 standard deviations of 1e-3
    assert (numbers.mean(1) - 0.5).abs().max() < 5 * 1 / (12 * 1000) ** 0.5
    assert len(torch.unique(numbers.view(-1)[:10000])) > 9990


@pytest.mark.parametrize("concentration", [0.1, 0.5, 1.0])
def test_symmetric_beta_has_the_moments_of_the_distribution(concentration):
    first, second = uniform(torch.arange(50000), 2, 64).unbind(1)
    numbers = symmetric_beta(first, second, concentration).double()
    assert numbers.min() >= 0
    assert numbers.max() <= 1
    centred = numbers - 0.5
    variance = 1 / (4 * (2 * concentration + 1))
    fourth = 3 / (16 * (2 * concentration + 1) * (2 * concentration + 3))
    for power, moment, larger in ((1, 0, variance), (2, variance, fourth)):
        sigma = ((larger - moment**2) / 50000) ** 0.5
        assert abs((centred**power).mean().item() - moment) < 5 * sigma, power
    exact = np.random.default_rng(0).beta(concentration, concentration, 50000)
    places = np.linspace(0, 1, 101)
    ours, theirs = (
        np.searchsorted(np.sort(x), places, side="right") / 50000 for x in (numbers.numpy(), exact)
    )
    assert np.abs(ours - theirs).max() < 0.015


def test_symmetric_beta_takes_the_first_pair_that_is_accepted_or_the_last():
    first, second = torch.tensor([[0.9, 0.3, 0.1], [0.9, 0.8, 0.9]]), torch.full((2, 3), 0.6)
    found = symmetric_beta(first, second, 1.0)
    torch.testing.assert_close(found, torch.tensor([0.3 / 0.9, 0.9 / 1.5]))
