"""The job that compares groups with group privacy, where an answer is known."""

from __future__ import annotations

import pytest
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant

from jobs.person_level import EPSILON, Made, noise_for


def test_of_full_passes_a_person_of_k_images_needs_k_times_the_noise_of_one():
    """So the noise of a mean over kN images is that of a mean over N groups: none has less."""
    one, five = (noise_for(1.0, k, steps=4, delta=1e-3) for k in (1, 5))
    assert five == pytest.approx(5 * one, rel=0.005)
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(GaussianDpEvent(one), 4)
    assert accountant.get_epsilon(1e-3) == pytest.approx(EPSILON, rel=0.01)


def test_each_k_has_writers_of_its_own_in_one_folder(tmp_path):
    found = [Made(tmp_path, k).cache(grouped=True).groups for k in (2, 5)]
    assert [len(groups) for groups in found if groups is not None] == [649, 260]
