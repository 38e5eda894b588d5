"""One draw of the right size per release; missing, weak and repeated noise is rejected."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, gumbel_r, kstest, laplace

from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.noise import (
    add_gaussian_noise,
    add_gumbel_noise,
    add_laplace_noise,
    clip_factors,
    clipped_sum,
)

KEY = NoiseKey(bytes(range(32)))
SIGMA, SENSITIVITY, SHAPE, RANKS = 1.7, 0.6, (100, 200), 3


def release(total, stream):
    return add_gaussian_noise(total, SIGMA, SENSITIVITY, stream)


def release_by_torch(total, stream):
    return add_gaussian_noise(total, SIGMA, SENSITIVITY, KEY.generator("by torch"))


def noise_missing(total, stream):
    return total.clone()


def noise_halved(total, stream):
    return add_gaussian_noise(total, SIGMA / 2, SENSITIVITY, stream)


def noise_without_sensitivity(total, stream):
    return add_gaussian_noise(total, SIGMA, 1.0, stream)


def noise_per_rank(total, stream):
    return sum(
        add_gaussian_noise(total / RANKS, SIGMA, SENSITIVITY, KEY.stream("rank", r))
        for r in range(RANKS)
    )


def noise_shared_by_rows(total, stream):
    """Right variance, one draw for all rows."""
    return total + release(torch.zeros(SHAPE[1]), stream)


def check_noise(mechanism) -> None:
    """Asserts that the noise has the planned variance (chi-square), mean 0 and independent
    coordinates.
    """
    total = torch.linspace(-3, 3, math.prod(SHAPE)).view(SHAPE)
    noise = (mechanism(total, KEY.stream("noise")) - total).double()
    n = noise.numel()
    statistic = float((noise**2).sum()) / (SIGMA * SENSITIVITY) ** 2
    assert chi2.ppf(1e-6, n) < statistic < chi2.ppf(1 - 1e-6, n), "variance is not (sigma C)^2"
    rows = noise.mean(0) * math.sqrt(SHAPE[0]) / (SIGMA * SENSITIVITY)
    assert float((rows**2).sum()) < chi2.ppf(1 - 1e-6, SHAPE[1]), "rows share noise"


@pytest.mark.parametrize("mechanism", [release, release_by_torch])
def test_noise_is_as_planned(mechanism):
    check_noise(mechanism)


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


def test_equal_streams_give_equal_noise_and_the_input_is_kept():
    total = [torch.ones(3), torch.ones(2, 2)]
    first, second = (add_gaussian_noise(total, 1.0, 1.0, KEY.stream("a", 1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(t, torch.ones_like(t)) for t in total)
    assert first[0].shape == (3,) and not torch.equal(first[0][:2], first[1][0])


def test_dtype_is_kept_and_noise_is_float32():
    total = torch.zeros(1000, dtype=torch.bfloat16)
    noisy = add_gaussian_noise(total, 1.0, 1.0, KEY.stream("a"))
    assert noisy.dtype == torch.bfloat16
    assert torch.equal(
        noisy, add_gaussian_noise(total.float(), 1.0, 1.0, KEY.stream("a")).bfloat16()
    )


@pytest.mark.parametrize("multiplier", [0.0, -1.0, math.nan])
def test_no_noise_has_to_be_asked_for(multiplier):
    with pytest.raises(ValueError, match="noise_multiplier"):
        add_gaussian_noise(torch.zeros(2), multiplier, 1.0, KEY.stream("a"))


def test_non_private_adds_nothing():
    assert torch.equal(
        add_gaussian_noise(torch.ones(2), 0.0, 1.0, KEY.stream("a"), non_private=True),
        torch.ones(2),
    )
    with pytest.raises(ValueError):
        add_gaussian_noise(torch.ones(2), -1.0, 1.0, KEY.stream("a"), non_private=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sums_that_are_not_finite_are_not_released(value):
    with pytest.raises(ValueError, match="finite"):
        add_gaussian_noise(torch.tensor([1.0, value]), 1.0, 1.0, KEY.stream("a"))


def test_sensitivity_above_zero():
    with pytest.raises(ValueError, match="sensitivity"):
        add_gaussian_noise(torch.zeros(2), 1.0, 0.0, KEY.stream("a"))


@settings(max_examples=50, deadline=None)
@given(
    norms=st.lists(st.floats(0, 1e30, allow_subnormal=False), min_size=1, max_size=20),
    bound=st.floats(1e-3, 1e3),
    mode=st.sampled_from(["automatic", "flat"]),
    gamma=st.floats(1e-6, 1.0),
)
def test_no_record_contributes_more_than_the_bound(norms, bound, mode, gamma):
    norms = torch.tensor(norms, dtype=torch.float32)
    factors = clip_factors(norms, bound, mode=mode, gamma=gamma)
    assert torch.isfinite(factors).all() and (factors >= 0).all()
    assert (factors.double() * norms.double() <= bound * (1 + 1e-6)).all()
    if mode == "flat":
        assert (factors[norms < bound * (1 - 1e-6)] == 1).all()


@pytest.mark.parametrize("mode", ["automatic", "flat"])
def test_records_that_are_not_finite_contribute_nothing(mode):
    rows = torch.randn(5, 3, 2)
    rows[1, 0, 0], rows[3, 1, 1] = math.inf, math.nan
    factors = clip_factors(rows.flatten(1).norm(dim=1), 1.0, mode=mode, gamma=0.01)
    assert factors[1] == factors[3] == 0
    kept = [0, 2, 4]
    assert torch.allclose(clipped_sum(rows, factors), clipped_sum(rows[kept], factors[kept]))
    assert torch.isfinite(clipped_sum(rows, factors)).all()


def test_clipped_sum_of_no_record_is_zero():
    assert torch.equal(clipped_sum(torch.zeros(0, 2, 3), torch.zeros(0)), torch.zeros(2, 3))


def test_clipping_formulas():
    norms = torch.tensor([0.0, 0.5, 2.0])
    assert torch.allclose(clip_factors(norms, 1.0, mode="flat"), torch.tensor([1.0, 1.0, 0.5]))
    assert torch.allclose(
        clip_factors(norms, 1.0, mode="automatic", gamma=0.5), torch.tensor([2.0, 1.0, 0.4])
    )


@pytest.mark.parametrize("kwargs", [{"clipping_norm": 0.0}, {"mode": "soft"}, {"gamma": 0.0}])
def test_clipping_without_a_bound_is_refused(kwargs):
    with pytest.raises(ValueError):
        clip_factors(
            torch.ones(2), **{"clipping_norm": 1.0, "mode": "automatic", "gamma": 0.1, **kwargs}
        )


@pytest.mark.parametrize(
    "add,distribution", [(add_gumbel_noise, gumbel_r), (add_laplace_noise, laplace)]
)
def test_noise_of_choices_has_its_distribution_and_broken_twins_do_not(add, distribution):
    total = torch.linspace(-3, 3, 20_000).view(100, 200)

    def fits(noisy: torch.Tensor) -> bool:
        noise = ((noisy - total.double()) / (SIGMA * SENSITIVITY)).flatten()
        return bool(kstest(noise.numpy(), distribution.cdf).pvalue > 1e-6)

    def drawn(by=add, noise=SIGMA, sensitivity=SENSITIVITY) -> torch.Tensor:
        return by(total, noise, sensitivity, KEY.stream("choice"))

    noisy = drawn()
    assert fits(noisy) and noisy.dtype == torch.float64 and torch.equal(noisy, drawn())
    other = add_laplace_noise if add is add_gumbel_noise else add_gumbel_noise
    gaussian = release(total, KEY.stream("choice")).double()
    for broken in (
        total.double(),
        drawn(noise=SIGMA / 2),
        drawn(sensitivity=1.0),
        drawn(by=other),
        gaussian,
    ):
        assert not fits(broken)
    for wrong in ((0.0, 1.0), (1.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="above 0"):
            add(total, *wrong, KEY.stream("choice"))
    with pytest.raises(ValueError, match="finite"):
        add(torch.tensor([math.nan]), 1.0, 1.0, KEY.stream("choice"))
