"""One draw of the right size per release; missing, weak and repeated noise is rejected."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chi2, gumbel_r, kstest, laplace

from sapf_ray.privacy.fixed_point import ExactSum, grid_step
from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.noise import add_gumbel, add_laplace, noisy_sum

KEY = NoiseKey(bytes(range(32)))
SIGMA, SENSITIVITY, SHAPE, RANKS = 1.7, 0.6, (100, 200), 3


def release(total, stream):
    return noisy_sum(total, SIGMA, stream)[0]


def noise_missing(total, stream):
    return total.values()[0]


def noise_halved(total, stream):
    return noisy_sum(total, SIGMA / 2, stream)[0]


def noise_without_sensitivity(total, stream):
    return noisy_sum(total, SIGMA / SENSITIVITY, stream)[0]


def noise_per_rank(total, stream):
    parts = [total, *[ExactSum.zeros([SHAPE], SENSITIVITY) for _ in range(RANKS - 1)]]
    return sum(noisy_sum(part, SIGMA, KEY.stream("rank", r))[0] for r, part in enumerate(parts))


def noise_shared_by_rows(total, stream):
    """Right variance, one draw for all rows."""
    row = ExactSum.zeros([SHAPE[1:]], SENSITIVITY)
    return total.values()[0] + noisy_sum(row, SIGMA, stream)[0]


def check_noise(mechanism) -> None:
    """Asserts that the noise has the planned variance (chi-square), mean 0 and independent
    coordinates.
    """
    values = torch.linspace(-3, 3, math.prod(SHAPE)).view(SHAPE)
    total = ExactSum.rounded([values], SENSITIVITY)
    noise = mechanism(total, KEY.stream("noise")) - total.values()[0]
    n = noise.numel()
    statistic = float((noise**2).sum()) / (SIGMA * SENSITIVITY) ** 2
    assert chi2.ppf(1e-6, n) < statistic < chi2.ppf(1 - 1e-6, n), "variance is not (sigma C)^2"
    rows = noise.mean(0) * math.sqrt(SHAPE[0]) / (SIGMA * SENSITIVITY)
    assert float((rows**2).sum()) < chi2.ppf(1 - 1e-6, SHAPE[1]), "rows share noise"


def test_noise_is_as_planned():
    check_noise(release)


@pytest.mark.parametrize(
    "twin",
    [
        noise_missing,
        noise_halved,
        noise_without_sensitivity,
        noise_per_rank,
        noise_shared_by_rows,
    ],
)
def test_broken_twins_are_rejected(twin):
    with pytest.raises(AssertionError):
        check_noise(twin)


def test_equal_streams_give_equal_noise_and_the_sum_is_kept():
    total = ExactSum.rounded([torch.ones(3), torch.ones(2, 2)], 1.0)
    digest = total.digest()
    first, second = (noisy_sum(total, 1.0, KEY.stream("a", 1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert total.digest() == digest and [part.shape for part in first] == [(3,), (2, 2)]
    assert not torch.equal(first[0][:2], first[1][0])


def test_outputs_lie_on_the_grid_whatever_the_sum():
    step = grid_step(SENSITIVITY)
    for value in (0.0, 0.1, 1e6):
        total = ExactSum.rounded([torch.full((500,), value)], SENSITIVITY)
        units = release(total, KEY.stream("a")) / step
        assert torch.equal(units, units.round()) and units.dtype == torch.float64


@pytest.mark.parametrize("multiplier", [0.0, -1.0, math.nan])
def test_noise_is_never_left_out(multiplier):
    with pytest.raises(ValueError, match="noise_multiplier"):
        noisy_sum(ExactSum.zeros([(2,)], 1.0), multiplier, KEY.stream("a"))


@pytest.mark.parametrize("add,distribution", [(add_gumbel, gumbel_r), (add_laplace, laplace)])
def test_noise_of_choices_has_its_distribution_and_broken_twins_do_not(add, distribution):
    total = torch.linspace(-3, 3, 20_000).view(100, 200)
    scale = SIGMA * SENSITIVITY

    def fits(noisy: torch.Tensor) -> bool:
        noise = ((noisy - total.double()) / scale).flatten()
        return bool(kstest(noise.numpy(), distribution.cdf).pvalue > 1e-6)

    def drawn(by=add, scale=scale) -> torch.Tensor:
        return by(total, scale, KEY.stream("choice"))

    noisy = drawn()
    assert fits(noisy) and noisy.dtype == torch.float64 and torch.equal(noisy, drawn())
    other = add_laplace if add is add_gumbel else add_gumbel
    for broken in (total.double(), drawn(scale=scale / 2), drawn(scale=SIGMA), drawn(by=other)):
        assert not fits(broken)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            add(total, wrong, KEY.stream("choice"))
