"""The white-box audit: canaries' scores from a run's own releases.

Bounds on epsilon first. Then parts of the same claim, each by the test that sees most: whether the
noise is as large as planned, whether a clipped canary moves a sum by no more than the sensitivity,
whether samples are Poisson, whether the ledger has every release. These tests are at a level of
one in a million, so that honest runs pass.

References:
    1. Steinke, Nasr, Jagielski. Privacy auditing with one (1) training run. NeurIPS 2023.
    2. Mahloujifar, Melis, Chaudhuri. Auditing f-differential privacy in one run. 2024.
    3. Chua et al. How private are DP-SGD implementations? ICML 2024. (shuffling is not Poisson)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2, norm

from sapf_ray.audit.auditor import CanaryScoreAuditor, Estimate
from sapf_ray.audit.bounds import Guesses, fdp_epsilon, one_run_epsilon
from sapf_ray.audit.findings import Finding
from sapf_ray.audit.scores import Observed, Scored, score, simulate
from sapf_ray.audit.tradeoff import events_family
from sapf_ray.privacy.canaries import RAW_NORM
from sapf_ray.privacy.events import DpEvent

SHARES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
BROKEN = (2, 5, 10)
LEVEL = 1e-6  # of the tests of parts
_SIMULATIONS = 3


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a run says of itself.

    Attributes:
        epsilon: Of all releases together.
        delta: Its delta.
        charges: The events that it is made of, and how often each occurs.
        paid: Names of the releases that the ledger has.
    """

    epsilon: float
    delta: float
    charges: Sequence[tuple[DpEvent, int]]
    paid: Iterable[str]


def white_box(
    observed: Sequence[Observed], coins: np.ndarray, *, claim: Claim, confidence: float
) -> list[Finding]:
    """All findings of one run.

    Args:
        observed: What each release tells of the canaries.
        coins: (m,) bool: which were in.
        claim: What the run says.
        confidence: Of each bound.
    """
    family = events_family(claim.charges, claim.delta)

    def by_curve(guesses: Guesses, confidence: float) -> float:
        return fdp_epsilon(guesses, family, confidence=confidence)

    def by_pair(guesses: Guesses, confidence: float) -> float:
        return one_run_epsilon(guesses, delta=claim.delta, confidence=confidence)

    attack = Attack(
        claim=claim,
        confidence=confidence,
        scored=score(observed, coins),
        honest=[simulate(observed, len(coins), seed=1 + i) for i in range(_SIMULATIONS)],
        broken={factor: simulate(observed, len(coins), broken=factor) for factor in BROKEN},
    )
    return [
        attack.guess("one run, f-DP", by_curve),
        attack.guess("one run, (ε, δ)", by_pair),
        attack.gaussian(),
        noise_test(observed, coins),
        sensitivity_test(observed, coins),
        sampling_test(observed),
        ledger_test(observed, claim),
    ]


Bound = Callable[[Guesses, float], float]
"""Guesses and confidence to epsilon."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Guesses at the coins, against one claim.

    Attributes:
        claim: What the run says.
        confidence: Of each bound.
        scored: The run's canaries.
        honest: Simulated runs as planned.
        broken: Factor to a simulated run with as many times less noise.
    """

    claim: Claim
    confidence: float
    scored: Scored
    honest: Sequence[Scored]
    broken: Mapping[int, Scored]

    def guess(self, audit: str, bound: Bound) -> Finding:
        """The best of two attacks that guess more or fewer coins, at half the risk each.

        Few guesses, the surest, show most of an honest run, but even if all are right they cannot
        falsify a large claim; more guesses can. Both shares are chosen from simulations of the
        plan alone, so choosing costs no confidence.

        Args:
            audit: Name of the bound.
            bound: The bound.
        """
        each = 1 - (1 - self.confidence) / 2

        def shown(run: Scored, share: float) -> float:
            return bound(_auditor(run).guesses(share), each)

        def mean(share: float) -> float:
            return float(np.mean([shown(run, share) for run in self.honest]))

        alarm = self.broken[min(self.broken)]
        shares = (max(SHARES, key=mean), max(SHARES, key=lambda share: shown(alarm, share)))
        canaries = len(self.scored.coins)
        most = 0.0
        for share in shares:
            made = _auditor(self.scored).guesses(share).made
            all_right = Guesses(canaries=canaries, made=made, right=made)
            most = max(most, bound(all_right, each))

        def best(run: Scored) -> float:
            return max(shown(run, share) for share in shares)

        found = best(self.scored)
        return Finding(
            audit=audit,
            quantity="ε",
            claim=self.claim.epsilon,
            shown=found,
            falsified=found > self.claim.epsilon,
            confidence=self.confidence,
            ceiling=most,
            power={factor: best(run) for factor, run in self.broken.items()},
            note=f"{shares[0]:.0%} and {shares[1]:.0%} of {canaries:,} canaries guessed",
        )

    def gaussian(self) -> Finding:
        """The estimate from the separation of the scores."""

        def estimate(run: Scored) -> Estimate:
            return _auditor(run).gaussian(delta=self.claim.delta, confidence=self.confidence)

        found = estimate(self.scored)
        return Finding(
            audit="Gaussian estimate",
            quantity="ε",
            claim=self.claim.epsilon,
            shown=found.epsilon,
            falsified=False,
            confidence=None,
            power={factor: estimate(run).epsilon for factor, run in self.broken.items()},
            note=f"scores are {found.mu:.3f} standard deviations apart; lower limit at "
            f"{self.confidence:.0%}: ε = {found.low:.2f}",
        )


def _auditor(run: Scored) -> CanaryScoreAuditor:
    return CanaryScoreAuditor(run.of_in, run.of_out)


# Parts of the claim -----------------------------------------------------------------------------


def noise_test(observed: Sequence[Observed], coins: np.ndarray) -> Finding:
    """Noise on the coordinates of canaries that are out, over what was planned: 1, or more."""
    squares, n = 0.0, 0
    for release in observed:
        out = release.seen[~coins[: len(release.seen)]].astype(np.float64)
        if release.stage.noise_multiplier > 0:
            squares += float(((out / release.stage.noise_multiplier) ** 2).sum())
            n += len(out)
    shown = math.sqrt(squares / n) if n else 0.0
    least = math.sqrt(chi2.ppf(LEVEL, n) / n) if n else 0.0
    return Finding(
        audit="noise of the releases",
        quantity="σ / planned",
        claim=1.0,
        shown=shown,
        falsified=shown < least,
        confidence=1 - LEVEL,
        power={factor: 1 / factor for factor in BROKEN},
        note=f"from {n:,} values; falsified below {least:.4f}",
    )


def sensitivity_test(observed: Sequence[Observed], coins: np.ndarray) -> Finding:
    """By how much a canary that is in and drawn moves a sum, in units of C: 1, or less."""
    weighted, weight = 0.0, 0.0
    for release in observed:
        held = release.drawn & coins[: len(release.seen)]
        precision = max(release.stage.noise_multiplier, 1e-3) ** -2
        weighted += precision * float(release.seen[held].sum())
        weight += precision * int(held.sum())
    shown = weighted / weight if weight else 0.0
    margin = float(norm.isf(LEVEL)) / math.sqrt(weight) if weight else 0.0
    return Finding(
        audit="contribution of a canary",
        quantity="C",
        claim=1.0,
        shown=shown,
        falsified=shown > 1 + margin,
        confidence=1 - LEVEL,
        note=f"falsified above {1 + margin:.4f}; canaries have {RAW_NORM:,.0f} C before clipping",
    )


def sampling_test(observed: Sequence[Observed]) -> Finding:
    """How often canaries are drawn: over the releases of a stage each a binomial number.

    Shuffled epochs draw each equally often, so the counts hardly vary [3].
    """
    statistic, degrees, drawn, expected = 0.0, 0, 0, 0.0
    for stage in {release.stage for release in observed if release.stage.sample_rate < 1}:
        rows = np.stack([release.drawn for release in observed if release.stage == stage])
        n, rate = len(rows), stage.sample_rate
        counts = rows.sum(0)
        statistic += float(((counts - n * rate) ** 2 / (n * rate * (1 - rate))).sum())
        degrees += len(counts)
        drawn += int(counts.sum())
        expected += n * rate * len(counts)
    shown = statistic / degrees if degrees else 1.0
    low, high = chi2.ppf(LEVEL / 2, max(1, degrees)), chi2.isf(LEVEL / 2, max(1, degrees))
    return Finding(
        audit="Poisson sampling",
        quantity="variance / binomial",
        claim=1.0,
        shown=shown,
        falsified=bool(degrees) and not low < statistic < high,
        confidence=1 - LEVEL,
        note=f"drawn {drawn:,} times, {expected:,.0f} expected; shuffled epochs vary far less",
    )


def ledger_test(observed: Sequence[Observed], claim: Claim) -> Finding:
    """Releases that the ledger has not paid, and whether the events compose to the claim."""
    unpaid = Counter(release.name for release in observed) - Counter(set(claim.paid))
    return Finding(
        audit="releases without a ledger line",
        quantity="releases",
        claim=0,
        shown=sum(unpaid.values()),
        falsified=bool(unpaid),
        confidence=1.0,
        note=f"{len(observed):,} releases seen",
    )
