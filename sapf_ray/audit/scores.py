"""From what releases tell of the canaries to one score each, and to what a claim predicts of it.

One release of a stage, in units of its sensitivity, shows of a canary x = b s + z with its coin b,
its place in the sample s (1 with probability q, secret) and noise z of standard deviation sigma.
Its log-likelihood ratio, in against out, is that of the Poisson mixture,

    log(1 - q + q exp(x / sigma**2 - 1 / (2 sigma**2))),

and as noise, samples and coins are independent, the score of a run is the sum over its releases: no
attack on the same canary is better. The sample is not used: whoever knows it attacks T q full
releases, against which nothing was claimed.

References:
    1. Nasr et al. Tight auditing of differentially private machine learning. USENIX Security 2023.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sapf_ray.privacy.stage_plan import StagePlan


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What one release tells of the first canaries.

    Attributes:
        name: Name of the release.
        stage: Its stage, as planned.
        seen: (k,) noise and contributions, in units of the sensitivity.
        drawn: (k,) bool, whether the sample holds each.
    """

    name: str
    stage: StagePlan
    seen: np.ndarray
    drawn: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Canaries with their coins.

    Attributes:
        scores: (m,) float64.
        coins: (m,) bool.
    """

    scores: np.ndarray
    coins: np.ndarray

    @property
    def of_in(self) -> np.ndarray:
        """Scores of those in."""
        return self.scores[self.coins]

    @property
    def of_out(self) -> np.ndarray:
        """Scores of those out."""
        return self.scores[~self.coins]


def log_ratio(seen: np.ndarray, stage: StagePlan) -> np.ndarray:
    """Of what one release shows of each canary, in against out.

    Args:
        seen: (k,) in units of the sensitivity.
        stage: Noise and sample rate as planned; without noise, what is seen itself is the score.
    """
    noise, rate = stage.noise_multiplier, stage.sample_rate
    if noise == 0:
        return seen.astype(np.float64)
    loss = (seen.astype(np.float64) - 0.5) / noise**2
    if rate == 1:
        return loss
    # 1 - q + q exp(loss), where exp may overflow
    return np.logaddexp(np.log1p(-rate), np.log(rate) + loss)


def score(observed: Iterable[Observed], coins: np.ndarray) -> Scored:
    """Sums over releases; a canary that a small release has no room for gets nothing from it.

    Args:
        observed: All releases.
        coins: (m,) bool.
    """
    total = np.zeros(len(coins))
    for release in observed:
        total[: len(release.seen)] += log_ratio(release.seen, release.stage)
    return Scored(scores=total, coins=coins)


def simulate(
    observed: Sequence[Observed], canaries: int, *, broken: float = 1.0, seed: int = 0
) -> Scored:
    """Scores of canaries in the same releases with ``broken`` times less noise than planned.

    A simulation, with random numbers of its own: what an audit may expect to see.

    Args:
        observed: Real releases, whose stages and sizes alone are used.
        canaries: m.
        broken: By which the noise is divided.
        seed: Of the simulation.
    """
    generator = np.random.default_rng(seed)
    coins = generator.random(canaries) < 0.5

    def again() -> Iterable[Observed]:
        for release in observed:
            k = len(release.seen)
            drawn = generator.random(k) < release.stage.sample_rate
            noise = generator.normal(0.0, release.stage.noise_multiplier / broken, k)
            seen = (drawn & coins[:k]) + noise
            yield Observed(name=release.name, stage=release.stage, seen=seen, drawn=drawn)

    return score(again(), coins)
