"""How much noise a remedy's release gets, from public facts alone."""

from __future__ import annotations

import math

from sapf_ray.privacy.calibration import Budget, smallest_noise
from sapf_ray.privacy.facts import Facts
from sapf_ray.privacy.stage_plan import StagePlan

ENOUGH = 0.07
"""Noise of a vote, in records of a class, that a clear winner stands: the votes of a class fall
mostly to a few look-alikes, so the first is ahead by more than some tenths of them."""

MOST = 0.05
"""Largest share of the budget that a vote takes."""


def vote_noise(facts: Facts, budget: Budget) -> float:
    """Noise multiplier of the vote: as much as a clear winner stands, but no less than the share
    ``MOST`` of the budget can pay.

    Shares are those of Gaussian differential privacy, in which one release of noise ``s`` is a
    share ``(t / s)**2`` of a release of noise ``t`` that spends everything (Dong, Roth, Su 2022).
    """
    whole = smallest_noise(
        StagePlan(noise_multiplier=0.0, sample_rate=1.0, count=1, share=None), budget
    )
    paid = 0.0 if whole is None else whole / math.sqrt(MOST)
    return float(f"{max(paid, ENOUGH * facts.records_per_class):.3g}")
