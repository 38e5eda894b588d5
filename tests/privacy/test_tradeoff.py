"""Trade-off curves against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from sapf_ray.privacy.tradeoff import (
    curve_of,
    gaussian_curve,
    gaussian_delta,
    gaussian_epsilon,
    gdp_parameter,
    true_positive_rate,
)

POINTS = np.linspace(1e-4, 1 - 1e-4, 200)


def test_a_curve_from_epsilons_and_deltas_lies_just_below_the_gaussians():
    mu = 1.3
    epsilons = np.linspace(0, 12, 400)
    ours = curve_of(epsilons.tolist(), [gaussian_delta(e, mu) for e in epsilons])
    exact = gaussian_curve(mu)
    gap = np.array([exact(x) - ours(x) for x in POINTS])
    assert gap.min() > -1e-9, "a weaker claim, never a stronger one"
    assert gap.max() < 1e-3


def test_pure_dp_has_the_curve_of_randomized_response():
    curve = curve_of([1.0], [0.0])
    for x in POINTS:
        assert curve(x) == pytest.approx(max(x / np.e, 1 - np.e * (1 - x)), abs=1e-12)
    assert curve(0.0) == 0.0 and curve(1.0) == 1.0


def test_epsilon_and_delta_of_gdp_invert_each_other():
    for mu in (0.1, 1.0, 5.0):
        for delta in (1e-3, 1e-6):
            epsilon = gaussian_epsilon(mu, delta)
            assert gaussian_delta(epsilon, mu) == pytest.approx(delta, rel=1e-6)
    assert gaussian_epsilon(0.0, 1e-5) == 0.0


@pytest.mark.parametrize("mu", [0.1, 1.3, 5.0])
def test_an_attackers_true_positive_rate_is_the_gaussians_own(mu):
    epsilons = np.linspace(0, 10 * mu + mu * mu, 1000).tolist()
    deltas = [gaussian_delta(e, mu) for e in epsilons]
    for rate in (1e-3, 1e-2, 0.5):
        exact = norm.sf(norm.isf(rate) - mu)
        found = true_positive_rate(epsilons, deltas, false_positive_rate=rate)
        assert exact <= found * (1 + 1e-9), "an upper bound"
        assert found == pytest.approx(exact, rel=2e-3)


def test_mu_is_that_of_the_worst_pair():
    epsilons = [0.0, 1.0, 4.0]
    deltas = [gaussian_delta(e, 1.3) for e in epsilons]
    assert gdp_parameter(epsilons, deltas) == pytest.approx(1.3, rel=1e-6)
    worse = [deltas[0], gaussian_delta(1.0, 2.0), deltas[2]]
    assert gdp_parameter(epsilons, worse) == pytest.approx(2.0, rel=1e-6)
    assert gdp_parameter([1.0], [0.0]) == 0.0 and gdp_parameter([1.0], [1.0]) == np.inf
