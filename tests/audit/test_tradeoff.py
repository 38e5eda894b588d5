"""Trade-off curves against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from sapf_ray.audit.tradeoff import (
    curve_of,
    events_family,
    gaussian_curve,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_family,
)
from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.events import gaussian_event

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


def test_family_of_one_gaussian_release_is_that_of_its_mu():
    ours = events_family([(gaussian_event(0.8), 1)], 1e-5)
    exact = gaussian_family(1 / 0.8, 1e-5)
    for k in (0.5, 1.0, 3.0):
        assert ours.epsilon(k) == pytest.approx(exact.epsilon(k), rel=0.01)
        gap = np.array([exact.curve(k)(x) - ours.curve(k)(x) for x in POINTS])
        assert gap.min() > -1e-6 and gap.max() < 0.02


def test_family_of_a_plan_composes_to_its_epsilon():
    charges = [(gaussian_event(25.0), 1), (gaussian_event(1.8, 0.4), 60)]
    family = events_family(charges, 1e-4)
    assert family.epsilon(1.0) == pytest.approx(
        compose_epsilon(charges, 1e-4, accountant="pld"), rel=1e-3
    )
    assert family.epsilon(0.5) < family.epsilon(1.0) < family.epsilon(2.0)


def test_epsilon_and_delta_of_gdp_invert_each_other():
    for mu in (0.1, 1.0, 5.0):
        for delta in (1e-3, 1e-6):
            epsilon = gaussian_epsilon(mu, delta)
            assert gaussian_delta(epsilon, mu) == pytest.approx(delta, rel=1e-6)
    assert gaussian_epsilon(0.0, 1e-5) == 0.0
