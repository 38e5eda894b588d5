"""What tests of Gaussian releases share: a check of drawn noise, and twins that must fail it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from scipy.stats import chi2

from sapf_ray.privacy.keyed_rng import NoiseKey
from sapf_ray.privacy.ledger import Ledger
from sapf_ray.privacy.noise import noisy_sum  # kept here, while a test puts a twin in its place
from sapf_ray.privacy.planner import StagePlan
from sapf_ray.privacy.release import Releaser
from tests.evolution.toy import plan_of

__all__ = ["check_drawn", "half_the_noise", "noisy_sum", "releaser_of", "without_noise"]

KEY = NoiseKey(bytes(range(32)))


def releaser_of(
    stage: str, folder: Path, *, noise: float = 4.0, epsilon: float = 1e3, count: int = 1
) -> Releaser:
    """A releaser whose plan has one stage of full passes, with its ledger in a folder."""
    planned = StagePlan(noise_multiplier=noise, sample_rate=1.0, count=count, share=1.0)
    plan = dataclasses.replace(plan_of(epsilon), **{stage: planned})
    return Releaser(key=KEY, ledger=Ledger.create(folder / "ledger.jsonl", plan), plan=plan)


def without_noise(total, multiplier, stream):
    return total.values()


def half_the_noise(total, multiplier, stream):
    return noisy_sum(total, multiplier / 2, stream)


def check_drawn(noise: np.ndarray) -> None:
    """Asserts that noise is standard normal, by chi-square: all of it, and where it has rows and
    columns the means of both, which shared draws would blow up.

    Args:
        noise: float (n,) or (rows, columns), over its planned standard deviation.
    """
    statistics = [(noise**2, noise.size)]
    if noise.ndim == 2:
        rows, columns = noise.shape
        statistics += [(noise.mean(1) ** 2 * columns, rows), (noise.mean(0) ** 2 * rows, columns)]
    for statistic, n in statistics:
        assert chi2.ppf(1e-6, n) < statistic.sum() < chi2.ppf(1 - 1e-6, n)
