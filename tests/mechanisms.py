"""What tests of Gaussian releases share: a check of drawn noise, and twins that must fail it."""

from __future__ import annotations

import numpy as np
from scipy.stats import chi2

from sapf_ray.privacy.noise import noisy_sum  # kept here, while a test puts a twin in its place

__all__ = ["check_drawn", "half_the_noise", "noisy_sum", "without_noise"]


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
