from __future__ import annotations

import math

import pytest

from sapf_ray.errors import ConfigError
from sapf_ray.evolution import evolution_stage, noise_multiplier_for
from sapf_ray.privacy.accountants import compose_epsilon, gaussian_event


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(("epsilon", "iterations"), [(1.0, 7), (10.0, 17)])
def test_t_histograms_cost_what_one_with_less_noise_costs(accountant, epsilon, iterations):
    noise = noise_multiplier_for(epsilon, 1e-5, iterations, accountant)
    together = compose_epsilon([(gaussian_event(noise), iterations)], 1e-5, accountant)
    one = compose_epsilon(gaussian_event(noise / math.sqrt(iterations)), 1e-5, accountant)
    assert together == pytest.approx(one, rel=1e-3)
    assert 0.998 * epsilon < together <= epsilon


def test_the_gaussian_bound_of_the_literature():
    """Balle & Wang 2018: sigma = 3.7306 is enough for (1, 1e-5), and no less is."""
    assert noise_multiplier_for(1.0, 1e-5, 1, "pld") == pytest.approx(3.7306, rel=1e-3)


def test_stage_of_no_iterations_and_of_no_noise():
    assert evolution_stage(1.0, 1e-5, 0, "rdp") is None
    stage = evolution_stage(1.0, 1e-5, 3, "rdp", non_private=True)
    assert stage.noise_multiplier == 0 and stage.count == 3
    stage = evolution_stage(1.0, 1e-5, 3, "rdp")
    assert (stage.sample_rate, stage.count, stage.share) == (1.0, 3, 1.0)


def test_an_epsilon_out_of_reach_is_said():
    with pytest.raises(ConfigError, match=r"evolution\.iterations"):
        noise_multiplier_for(1e-6, 1e-12, 10**6, "rdp")
