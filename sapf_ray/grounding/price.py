"""How much noise a remedy's release gets, from public facts alone.

References:
    1. Balle, Wang. Improving the Gaussian mechanism for differential privacy. ICML 2018, theorem 8.
"""

from __future__ import annotations

import math

from scipy.special import log_ndtr, ndtr

from sapf_ray.privacy.calibration import Budget, smallest_noise
from sapf_ray.privacy.facts import Facts
from sapf_ray.privacy.stage_plan import StagePlan

ENOUGH = 0.07
"""Noise of a vote, in records of a class, that a clear winner stands: the votes of a class fall
mostly to a few look-alikes, so the first is ahead by more than some tenths of them."""

MOST = 0.05
"""Largest share of the budget that a vote takes."""

NEAR = 0.02
"""Noise of a class's count, in records of a class: proportions are then right to a fiftieth."""

LITTLE = 0.01
"""Largest share of the budget that the counts take."""


def vote_noise(facts: Facts, budget: Budget) -> float:
    """Noise multiplier of the vote: as much as a clear winner stands, but no less than the share
    ``MOST`` of the budget can pay.

    Shares are those of Gaussian differential privacy, in which one release of noise ``s`` is a
    share ``(t / s)**2`` of a release of noise ``t`` that spends everything (Dong, Roth, Su 2022).
    """
    return stood_or_paid(budget, share=MOST, stood=ENOUGH * facts.records_per_class)


def proportions_noise(facts: Facts, budget: Budget) -> float:
    """Noise multiplier of the classes' counts; as :func:`vote_noise`, with the share ``LITTLE``."""
    return stood_or_paid(budget, share=LITTLE, stood=NEAR * facts.records_per_class)


def stood_or_paid(budget: Budget, *, share: float, stood: float) -> float:
    """The noise that can be stood, or the least that a share of the budget buys."""
    if delta_of_release(stood * math.sqrt(share), budget.epsilon) <= budget.delta:
        return float(f"{stood:.3g}")  # the share buys less noise than that: no need to search
    release = StagePlan(noise_multiplier=0.0, sample_rate=1.0, count=1, share=None)
    whole = smallest_noise(release, budget)
    paid = 0.0 if whole is None else whole / math.sqrt(share)
    return float(f"{max(paid, stood):.3g}")


def delta_of_release(noise_multiplier: float, epsilon: float) -> float:
    """The least δ with which one Gaussian release over all records is (ε, δ)-private (reference 1).

    An accountant's discretised answer would take gigabytes where the noise is very small.

    >>> round(delta_of_release(4.0, 1.0), 6)
    3e-06
    """
    wide = epsilon * noise_multiplier
    narrow = 1 / (2 * noise_multiplier)
    return float(ndtr(narrow - wide) - math.exp(epsilon + log_ndtr(-narrow - wide)))
