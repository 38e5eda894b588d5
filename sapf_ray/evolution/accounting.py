"""Privacy of an evolution: T Gaussian releases on the full pass, each of L2 sensitivity 1.

Example::

    stage = evolution_stage(epsilon=10.0, delta=1e-5, iterations=7, accountant="pld")
    stage.noise_multiplier      # 1.323: std of the noise on every count, in votes

References:
    1. Lin et al. ICLR 2024, (T-fold composition of the Gaussian mechanism: the one with noise
       sigma / sqrt(T))
"""

from __future__ import annotations

from sapf_ray.errors import ConfigError
from sapf_ray.privacy.planner import MAX_NOISE_MULTIPLIER, StagePlan, smallest_noise

STAGE = "evolution"


def noise_multiplier_for(epsilon: float, delta: float, iterations: int, accountant: str) -> float:
    """The smallest 4-digit noise multiplier with which ``iterations`` histograms stay within epsilon.

    Raises:
        ConfigError: None does.
    """
    noise = smallest_noise((), 1.0, iterations, epsilon, delta, accountant)
    if noise is None:
        raise ConfigError(
            "privacy.epsilon", epsilon,
            f"cannot be met by {iterations} histograms at any noise multiplier up to {MAX_NOISE_MULTIPLIER:g}; "
            "raise privacy.epsilon or lower evolution.iterations",
        )
    return noise


def evolution_stage(
    epsilon: float, delta: float, iterations: int, accountant: str, non_private: bool = False
) -> StagePlan | None:
    """The stage as the plan holds it; None when nothing is released.

    Args:
        non_private: No noise at all; epsilon is then infinite.
    """
    if iterations == 0:
        return None
    noise = 0.0 if non_private else noise_multiplier_for(epsilon, delta, iterations, accountant)
    return StagePlan(noise_multiplier=noise, sample_rate=1.0, count=iterations, share=None if non_private else 1.0)
