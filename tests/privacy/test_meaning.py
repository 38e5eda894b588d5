"""What epsilon means, against closed forms."""

from __future__ import annotations

import math

import pytest
from dp_accounting import NonPrivateDpEvent
from scipy.stats import norm

from sapf_ray.privacy.accountants import compose_epsilon
from sapf_ray.privacy.events import approximate_event, gaussian_event
from sapf_ray.privacy.meaning import meaning
from sapf_ray.privacy.repeat import Repeat
from sapf_ray.privacy.tradeoff import gaussian_delta


@pytest.mark.parametrize(("sigma", "count"), [(0.8, 1), (5.0, 9), (40.0, 1)])
def test_gaussian_releases_have_the_mu_and_the_attacker_of_theory(sigma, count):
    mu = math.sqrt(count) / sigma
    found = meaning([(gaussian_event(sigma), count)], 1e-5)
    assert found.mu == pytest.approx(mu, rel=5e-3)
    assert found.coin == pytest.approx(norm.cdf(mu / 2), rel=1e-3)
    for attack in found.attacks:
        exact = norm.sf(norm.isf(attack.false_positive_rate) - mu)
        assert exact * (1 - 1e-6) <= attack.true_positive_rate
        assert attack.true_positive_rate == pytest.approx(exact, rel=0.02)


def test_a_sampled_composition_allows_no_more_than_its_mu_says():
    charges = [(gaussian_event(25.0), 1), (gaussian_event(1.8, 0.4), 60)]
    delta = 1e-4
    found = meaning(charges, delta)
    epsilon = compose_epsilon(charges, delta, accountant="pld")
    assert gaussian_delta(epsilon, found.mu) >= delta * (1 - 1e-3)
    tpr = [attack.true_positive_rate for attack in found.attacks]
    assert 0.001 < tpr[0] < tpr[1] < 1 and 0.5 < found.coin < 1
    fewer = meaning([(gaussian_event(1.8, 0.4), 6)], delta)
    assert fewer.mu < found.mu and fewer.attacks[0].true_positive_rate < tpr[0]


def test_an_attacker_on_random_draws_stays_below_the_bound():
    """The likelihood-ratio test on 400,000 draws of 30 sampled releases, the worst pair."""
    import numpy as np

    q, sigma, steps, draws = 0.3, 1.2, 30, 200_000
    rng = np.random.default_rng(0)

    def score(present: bool) -> np.ndarray:
        total = np.zeros(draws)
        for _ in range(steps):
            mean = (rng.random(draws) < q) * present
            x = mean + sigma * rng.standard_normal(draws)
            total += np.log1p(q * np.expm1((x - 0.5) / sigma**2))
        return total

    absent, there = score(False), score(True)
    found = meaning([(gaussian_event(sigma, q), steps)], 1e-5)
    for attack in found.attacks:
        threshold = np.quantile(absent, 1 - attack.false_positive_rate)
        measured = (there > threshold).mean()
        assert measured <= attack.true_positive_rate * 1.1
        assert measured >= attack.true_positive_rate * 0.6, "and the bound is not idle"


def test_where_nothing_is_known_nothing_is_said():
    assert meaning([], 1e-5) is None
    assert meaning([(NonPrivateDpEvent(), 1)], 1e-5) is None
    tested = meaning([(approximate_event(1.0, 1e-6), 1)], 1e-5)
    assert tested.attacks[0].true_positive_rate == pytest.approx(math.e * 1e-3, rel=0.03)


def test_a_private_choice_is_told_by_rdp_and_allows_more_than_one_trial():
    charges = ((gaussian_event(2.0, 0.3), 20),)
    event = Repeat(distribution="poisson", mean=5.0).event(charges)
    chosen, alone = meaning([(event, 1)], 1e-5), meaning(charges, 1e-5)
    assert (chosen.accountant, alone.accountant) == ("RDP", "PLD")
    assert chosen.mu > alone.mu and chosen.coin > alone.coin
