"""Epsilon from the scores of canaries that were in and of those that were not.

The interface follows jax_privacy's ``CanaryScoreAuditor``; whatever made the scores, only their
order counts, save for :meth:`CanaryScoreAuditor.gaussian`.

Example::

    auditor = CanaryScoreAuditor(scores[coins], scores[~coins])
    auditor.epsilon_one_run(delta=1e-5, confidence=0.95, share=0.1)

References:
    1. Steinke, Nasr, Jagielski. Privacy auditing with one (1) training run. NeurIPS 2023.
    2. Mahloujifar, Melis, Chaudhuri. Auditing f-differential privacy in one run. 2024.
    3. Nasr et al. Tight auditing of differentially private machine learning. USENIX Security 2023.
    4. Dong, Roth, Su. Gaussian differential privacy. JRSS-B 2022. (Theorem 3.4: compositions tend
       to mu-GDP)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri
from scipy.stats import mannwhitneyu

from sapf_ray.audit.bounds import (
    Guesses,
    Rates,
    clopper_pearson_epsilon,
    fdp_epsilon,
    one_run_epsilon,
)
from sapf_ray.audit.families import Family
from sapf_ray.privacy.tradeoff import gaussian_epsilon


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the separation of the scores says, if they are normal.

    Attributes:
        mu: Difference of the means over the common standard deviation; at least 0.
        epsilon: Of mu-GDP at delta.
        low: The same at the lower confidence limit of mu.
    """

    mu: float
    epsilon: float
    low: float


THRESHOLDS = 199  # that are tried on the half that chooses


class CanaryScoreAuditor:
    """Scores, the higher the likelier in.

    Args:
        in_scores: (n,) of the canaries that were in.
        out_scores: (k,) of those that were not.

    Raises:
        ValueError: A score that is not finite, or none at all.
    """

    def __init__(self, in_scores: np.ndarray, out_scores: np.ndarray) -> None:
        self._in = np.asarray(in_scores, dtype=np.float64)
        self._out = np.asarray(out_scores, dtype=np.float64)
        if not len(self._in) + len(self._out):
            raise ValueError("there must be at least one score")
        if not (np.isfinite(self._in).all() and np.isfinite(self._out).all()):
            raise ValueError("a score is not finite")

    @property
    def canaries(self) -> int:
        """m, those in and those out."""
        return len(self._in) + len(self._out)

    def guesses(self, share: float) -> Guesses:
        """Guesses "in" for the highest scores and "out" for the lowest, as many of either.

        Args:
            share: Of the canaries that are guessed, in (0, 1]; the rest is in the middle.
        """
        each = int(share * self.canaries / 2)
        scores = np.concatenate([self._in, self._out])
        was_in = np.arange(len(scores)) < len(self._in)
        # in random order first, so that ties are not broken by the coin
        places = np.random.default_rng(0).permutation(len(scores))
        order = places[np.argsort(scores[places], kind="stable")]
        right = int(was_in[order[len(order) - each :]].sum()) + int((~was_in[order[:each]]).sum())
        return Guesses(canaries=self.canaries, made=2 * each, right=right)

    def epsilon_one_run(self, *, delta: float, confidence: float, share: float) -> float:
        """Lower bound by [1], of any mechanism.

        Args:
            delta: In [0, 1).
            confidence: In (0, 1).
            share: Of the canaries that are guessed, chosen before the scores are seen.
        """
        return one_run_epsilon(self.guesses(share), delta=delta, confidence=confidence)

    def epsilon_one_run_fdp(self, family: Family, *, confidence: float, share: float) -> float:
        """Lower bound by [2] within a family of claims; above the claim it falsifies that.

        Args:
            family: The claim and those with more and less noise.
            confidence: In (0, 1).
            share: Of the canaries that are guessed, chosen before the scores are seen.
        """
        return fdp_epsilon(self.guesses(share), family, confidence=confidence)

    def epsilon_clopper_pearson(self, *, delta: float, confidence: float) -> float:
        """Lower bound for scores of independent runs, not of one: rates at a threshold.

        Every second score chooses the threshold, the others are counted.
        """
        levels = np.linspace(0, 1, THRESHOLDS + 2)[1:-1]
        thresholds = np.unique(np.quantile(np.concatenate([self._in[::2], self._out[::2]]), levels))

        def bound(threshold: float, half: int) -> float:
            rates = self._rates(threshold, half)
            return clopper_pearson_epsilon(rates, delta=delta, confidence=confidence)

        best = max(thresholds, key=lambda threshold: bound(threshold, 0))
        return bound(best, 1)

    def _rates(self, threshold: float, half: int) -> Rates:
        ours, theirs = self._in[half::2], self._out[half::2]
        return Rates(
            hits=int((ours >= threshold).sum()),
            runs=len(ours),
            false_hits=int((theirs >= threshold).sum()),
            false_runs=len(theirs),
        )

    def gaussian(self, *, delta: float, confidence: float) -> Estimate:
        """An estimate, no bound: epsilon of the mu-GDP that separates the scores so far [3].

        Log-likelihood ratios summed over T releases tend to normal ones, N(+-mu**2 / 2, mu**2),
        with the mu of the central limit theorem for the composition [4]: T and the Poisson mixture
        enter through the scores (:mod:`sapf_ray.audit.scores`), not through this formula. The
        claim's own curve lies below the Gaussian's at small delta, so an honest run is estimated
        below its claim, the more so the fewer the steps. The limit is that of a normal mu with
        variance
        1 / n + 1 / k + mu**2 / 2 (n + k).
        """
        n, k = len(self._in), len(self._out)
        if n < 2 or k < 2:
            return Estimate(mu=0.0, epsilon=0.0, low=0.0)
        spread = ((n - 1) * self._in.var(ddof=1) + (k - 1) * self._out.var(ddof=1)) / (n + k - 2)
        distance = float(self._in.mean() - self._out.mean())
        mu = max(0.0, distance / math.sqrt(spread)) if spread > 0 else 0.0
        error = math.sqrt(1 / n + 1 / k + mu**2 / (2 * (n + k)))
        low = mu - float(ndtri(confidence)) * error
        return Estimate(
            mu=mu, epsilon=gaussian_epsilon(mu, delta), low=gaussian_epsilon(low, delta)
        )

    def attack_auroc(self) -> float:
        """Area under the curve of true against false positives; 0.5 is chance."""
        if not (len(self._in) and len(self._out)):
            return 0.5
        statistic = mannwhitneyu(self._in, self._out).statistic
        return float(statistic / (len(self._in) * len(self._out)))

    def tpr_at_given_fpr(self, fpr: float) -> float:
        """Share of the canaries in, above the lowest threshold with at most this share out."""
        if not (len(self._in) and len(self._out)):
            return 0.0
        allowed = int(fpr * len(self._out))
        ranked = np.sort(self._out)[::-1]
        threshold = ranked[allowed] if allowed < len(ranked) else -math.inf
        return float((self._in > threshold).mean())
