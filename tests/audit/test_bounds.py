"""Bounds against closed forms, published code, and mechanisms whose epsilon is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import logit
from scipy.stats import beta, binom

from sapf_ray.audit.bounds import (
    Guesses,
    Rates,
    ceiling,
    clopper_pearson_epsilon,
    fdp_epsilon,
    one_run_epsilon,
    one_run_p_value,
)
from sapf_ray.audit.families import gaussian_family


def guesses(m: int, made: int, right: int) -> Guesses:
    return Guesses(canaries=m, made=made, right=right)


@pytest.mark.parametrize(("made", "right"), [(100, 80), (1000, 900), (50, 50)])
def test_without_delta_the_bound_is_the_odds_of_the_lower_limit(made, right):
    """Steinke et al., Theorem 5.2 with delta = 0: v is at most Binomial(r, e^eps / (1 + e^eps))."""
    found = one_run_epsilon(guesses(made, made, right), delta=0.0, confidence=0.95)
    limit = beta.ppf(0.05, right, made - right + 1)
    assert found == pytest.approx(max(0.0, logit(limit)), abs=1e-4)


def p_value_as_printed(m, r, v, epsilon, delta):
    """Steinke et al., appendix D, their listing."""
    q = 1 / (1 + math.exp(-epsilon))
    tail = binom.sf(v - 1, r, q)
    largest = total = 0.0
    for i in range(1, v + 1):
        total += binom.pmf(v - i, r, q)
        largest = max(largest, total / i)
    return min(1.0, tail + largest * delta * 2 * m)


@pytest.mark.parametrize("case", [(1000, 100, 99, 2.0, 1e-3), (200, 200, 150, 0.5, 1e-2)])
def test_p_value_is_that_of_the_papers_listing(case):
    m, made, right, epsilon, delta = case
    ours = one_run_p_value(guesses(m, made, right), epsilon, delta=delta)
    assert ours == pytest.approx(p_value_as_printed(*case), rel=1e-9)


# `_epsilon_one_run` and `_epsilon_one_run_fdp` of jax_privacy/auditing.py, commit 8967688, run on
# these arguments: canaries, guesses, right ones, significance, delta
JAX_PRIVACY = [
    ((1000, 1000, 800, 0.05, 1e-5), 1.25398, 2.33324),
    ((1000, 100, 99, 0.05, 1e-3), 0.76516, 3.40714),
    ((5000, 500, 480, 0.01, 1e-4), 1.37869, 3.01509),
    ((200, 200, 200, 0.05, 1e-6), 4.19309, 10.47522),
    ((1000, 400, 380, 0.05, 1e-2), 0.0, 2.34168),
]


@pytest.mark.parametrize(("case", "steinke", "fdp"), JAX_PRIVACY)
def test_bounds_are_those_of_jax_privacy(case, steinke, fdp):
    m, made, right, significance, delta = case
    outcome, confidence = guesses(m, made, right), 1 - significance
    assert one_run_epsilon(outcome, delta=delta, confidence=confidence) == pytest.approx(
        steinke, abs=1e-4
    )
    ours = fdp_epsilon(outcome, gaussian_family(1.0, delta), confidence=confidence)
    # ours is the largest member, on a grid of 2 %, that is falsified
    assert 0.96 * fdp <= ours <= fdp + 1e-3


def test_ceiling_of_a_thousand_canaries():
    """field.md: r right guesses of r show about log(r / log(1 / alpha))."""
    for r in (100, 1000, 66_000):
        assert ceiling(r, delta=0.0, confidence=0.95) == pytest.approx(
            math.log(r / math.log(20)), rel=0.01
        )
    assert ceiling(1000, delta=1e-4, confidence=0.95) < ceiling(1000, delta=0.0, confidence=0.95)


def randomized_response(epsilon: float, m: int, generator: np.random.Generator) -> Guesses:
    right = generator.random(m) < 1 / (1 + math.exp(-epsilon))
    return guesses(m, m, int(right.sum()))


def test_exact_randomized_response_is_bounded_at_the_stated_confidence_and_tightly():
    generator = np.random.default_rng(0)
    epsilon, runs = 2.0, 400
    found = np.array(
        [
            one_run_epsilon(randomized_response(epsilon, 500, generator), delta=0.0, confidence=0.9)
            for _ in range(runs)
        ]
    )
    above = int((found > epsilon).sum())
    assert above <= binom.ppf(1 - 1e-4, runs, 0.1), "the bound fails more often than stated"
    assert above >= binom.ppf(1e-4, runs, 0.05), "and it is no vacuous one"
    assert np.median(found) > 0.8 * epsilon


def gaussian_guesses(mu: float, m: int, made: int, generator: np.random.Generator) -> Guesses:
    coins = generator.random(m) < 0.5
    scores = mu * coins + generator.normal(size=m)
    order = np.argsort(scores)
    right = coins[order[m - made // 2 :]].sum() + (~coins[order[: made // 2]]).sum()
    return guesses(m, made, int(right))


@pytest.mark.parametrize("made", [200, 1000])
def test_exact_gaussian_mechanism_is_never_above_its_claim_often(made):
    generator = np.random.default_rng(1)
    family = gaussian_family(1.5, 1e-5)
    claim = family.epsilon(1.0)
    found = np.array(
        [
            fdp_epsilon(gaussian_guesses(1.5, 1000, made, generator), family, confidence=0.9)
            for _ in range(100)
        ]
    )
    assert (found > claim).sum() <= binom.ppf(1 - 1e-4, 100, 0.1)
    assert np.median(found) > (0.5 if made == 200 else 0.3) * claim
    broken = gaussian_guesses(4.5, 1000, 1000, generator)  # a third of the noise
    assert fdp_epsilon(broken, family, confidence=0.9) > claim


def test_clopper_pearson_of_an_exact_gaussian_mechanism():
    generator = np.random.default_rng(2)
    found, runs, mu, threshold = [], 2000, 1.0, 1.5
    for _ in range(300):
        rates = Rates(
            hits=int((generator.normal(mu, size=runs) > threshold).sum()),
            runs=runs,
            false_hits=int((generator.normal(size=runs) > threshold).sum()),
            false_runs=runs,
        )
        found.append(clopper_pearson_epsilon(rates, delta=0.0, confidence=0.9))
    exact = math.log(0.308538 / 0.066807)  # normal tails at 0.5 and 1.5
    assert (np.array(found) > exact).sum() <= binom.ppf(1 - 1e-4, 300, 0.1)
    assert np.median(found) > 0.8 * exact


def test_impossible_guesses_are_refused():
    with pytest.raises(ValueError, match="right <= made"):
        guesses(10, 5, 6)
