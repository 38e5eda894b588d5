"""Families of claims against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from sapf_ray.audit.families import events_family, gaussian_family
from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.events import gaussian_event

POINTS = np.linspace(1e-4, 1 - 1e-4, 200)


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
